"""Captioning: pictures with their references, and the training captions of the mini world for a language model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.captioned import CaptionedDataModule
from datamodules.coco import CocoCaptions
from datamodules.datamodule import task_of
from datamodules.flickr import Flickr8kCaptions, Flickr30kCaptions
from datamodules.images import Picture, PictureDataset
from datamodules.mini import EpochBatches, MiniCaptions
from datamodules.sampler import shard
from lit_clipq.contracts import OffersTokenizer
from lit_clipq.errors import ConfigError
from lit_clipq.mini.captions import CAPTIONS_PER_IMAGE
from lit_clipq.mini.world import PRESETS, picture_captions


class CaptioningDataset(Dataset):
    """Pictures with their references: index -> (picture, position).

    Args:
        pictures: The evaluation, in order.
        image: Preprocessing of one PIL picture.
    """

    def __init__(self, pictures: Sequence[Picture], image: Callable[[Image.Image], Tensor]) -> None:
        self.pictures = list(pictures)
        self.decoded = PictureDataset([picture.path for picture in pictures], image)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.decoded[index], index

    def collate(self, samples: Sequence[tuple[Tensor, int]]) -> dict[str, Any]:
        """Batch pictures (B, 3, H, W), their ids int64 (B,), references and file names."""
        chosen = [self.pictures[index] for _, index in samples]
        ids = [index if p.image_id is None else p.image_id for (_, index), p in zip(samples, chosen, strict=True)]
        return {
            "images": torch.stack([image for image, _ in samples]),
            "image_ids": torch.tensor(ids, dtype=torch.int64),
            "references": [list(picture.captions) for picture in chosen],
            "file_names": [str(picture.path) for picture in chosen],
        }


class CaptioningDataModule(CaptionedDataModule):
    """One evaluation loader of pictures with their references.

    It yields `{"images": float (B, 3, H, W), "image_ids": int64 (B,), "references": list of B lists of texts,
    "file_names": list of B paths}`. An id is the one of the annotation file where it has ids (COCO's `id` and
    `cocoid`, Karpathy's `imgid`), else the position of the picture.
    """

    def val_dataloader(self) -> DataLoader:
        """Return the batches of this process."""
        data = CaptioningDataset(self.pictures, self.checked_preprocessing().image)
        return self.loader(data, collate_fn=data.collate)


class CocoCaptioning(CaptioningDataModule, CocoCaptions):
    """COCO for captioning: as `CocoCaptions`, but with all references of a picture in either preset.

    `limit: 100` evaluates the first 100 pictures of the Karpathy test split. CIDEr depends on the number of pictures.

    Args:
        root: Folder with the annotation file and the pictures.
        preset: "karpathy_test": 5,000 pictures of val2014 (`dataset_coco.json`, `val2014/`). "val2017": 5,000 pictures
            (`annotations/captions_val2017.json`, `val2017/`).
        captions_per_image: How many references of a picture to take, in the order of the file; null for all.
        download_train: With `download`, fetch the train pictures too, to calibrate with.
        **kwargs: See `QuantDataModule`.

    Raises:
        ConfigError: An unknown preset, or fewer than one caption.
    """

    def __init__(
        self,
        root: str,
        preset: Literal["karpathy_test", "val2017"] = "karpathy_test",
        captions_per_image: int | None = None,
        download_train: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, preset, captions_per_image, download_train, **kwargs)


class Flickr30kCaptioning(CaptioningDataModule, Flickr30kCaptions):
    """Flickr30k for captioning; options as for `Flickr30kCaptions`."""


class Flickr8kCaptioning(CaptioningDataModule, Flickr8kCaptions):
    """Flickr8k for captioning; options as for `Flickr8kCaptions`."""


class MiniCaptioning(CaptioningDataModule, MiniCaptions):
    """The mini world for captioning; options as for `MiniCaptions`."""


class MiniCaptionText(LightningDataModule):
    """Training captions of the mini world as tokens for a causal language model; no picture is drawn.

    Batches are `{"input_ids": int64 (B, L), "attention_mask": int64 (B, L)}`, padded on the right to the longest text
    of the batch. A text is the tokenizer's beginning-of-text token, the caption with `end`, and the end-of-text token,
    as far as the tokenizer has these. Each epoch takes the next of every picture's five captions, in an order drawn
    from the seed; the last, smaller batch is left out. The validation loader has all captions of the dev split.

    Args:
        tokenizer: Folder of a transformers tokenizer; by default the `tokenizer` of the task. It may also be set as an
            attribute of this object.
        batch_size: Texts in a batch of one device.
        seed: Seed of the order.
        limit: Train on the captions of the first N pictures only.
        end: What ends a caption.

    Raises:
        ConfigError: An option outside its range.
    """

    def __init__(
        self,
        tokenizer: str | None = None,
        batch_size: int = 256,
        seed: int = 0,
        limit: int | None = None,
        end: str = ".",
    ) -> None:
        super().__init__()
        if batch_size < 1 or (limit is not None and limit < batch_size):
            raise ConfigError(
                f"MiniCaptionText needs a batch_size of 1 or more and a limit of a batch or more, got {batch_size} and "
                f"{limit}."
            )
        self.tokenizer: Any = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        self.limit = limit
        self.end = end
        self._train: TokenDataset | None = None
        self._dev: TokenDataset | None = None

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002 - training and validation share it
        """Tokenise the captions. Called again, it does nothing.

        Raises:
            ConfigError: No tokenizer: neither given nor offered by the task of the trainer.
        """
        if self._train is not None:
            return
        tokenizer = self.tokenizer
        if tokenizer is None:
            task = task_of(self)
            tokenizer = task.tokenizer if isinstance(task, OffersTokenizer) else None
        if isinstance(tokenizer, str | Path):
            tokenizer = _load_tokenizer(Path(tokenizer))
        if tokenizer is None:
            raise ConfigError(
                "MiniCaptionText needs --data.tokenizer, or a task that has a `tokenizer`; give a folder."
            )
        pictures = PRESETS["train"].captioned
        for split, count in (("train", self.limit or pictures["train"]), ("dev", pictures["dev"])):
            texts = [picture_captions(split, i) for i in range(min(count, pictures[split]))]
            tokens = _encode([text + self.end for five in texts for text in five], tokenizer)
            setattr(self, f"_{split}", TokenDataset(tokens, _padding(tokenizer)))

    def train_dataloader(self) -> DataLoader:
        """Return shuffled batches of this process."""
        data = self._ready(self._train)
        pictures = len(data) // CAPTIONS_PER_IMAGE
        batches = EpochBatches(pictures, self.batch_size, self.seed, CAPTIONS_PER_IMAGE)
        return DataLoader(data, batch_size=None, sampler=batches)

    def val_dataloader(self) -> DataLoader:
        """Return all captions of the dev split in order, this process's share."""
        data = self._ready(self._dev)
        own = torch.arange(len(data))[slice(shard()[0], None, shard()[1])]
        rows = torch.stack([own // CAPTIONS_PER_IMAGE, own % CAPTIONS_PER_IMAGE], dim=1)
        return DataLoader(data, batch_size=None, sampler=list(rows.split(self.batch_size)))

    @staticmethod
    def _ready(data: "TokenDataset | None") -> "TokenDataset":
        if data is None:
            raise ConfigError("Call setup() of the data module first.")
        return data


class TokenDataset(Dataset):
    """Tokens of captions, five to a picture; an index is a whole batch, rows (picture, caption) int64 (B, 2).

    Args:
        texts: Tokens of each caption, the five of a picture one after another.
        padding: Token behind shorter texts; the attention mask is 0 there.
    """

    def __init__(self, texts: Sequence[Sequence[int]], padding: int) -> None:
        self.lengths = torch.tensor([len(tokens) for tokens in texts])
        self.tokens = torch.full((len(texts), int(self.lengths.max())), padding, dtype=torch.int32)
        for row, tokens in zip(self.tokens, texts, strict=True):
            row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int32)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor) -> dict[str, Tensor]:
        pictures, captions = rows.unbind(1)
        index = pictures * CAPTIONS_PER_IMAGE + captions
        lengths = self.lengths[index]
        columns = torch.arange(int(lengths.max()))
        mask = (columns < lengths[:, None]).long()  # (B, L)
        return {"input_ids": self.tokens[index, : len(columns)].long(), "attention_mask": mask}


def _load_tokenizer(folder: Path) -> Any:
    """Read a tokenizer from a folder.

    Raises:
        ConfigError: No transformers, or no tokenizer in the folder.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError(
            "--data.tokenizer needs the package transformers, which is not installed: pip install transformers"
        ) from error
    if not folder.is_dir():
        raise ConfigError(f"--data.tokenizer {folder} is no folder; give one with a tokenizer.json.")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--data.tokenizer {folder} holds no tokenizer that can be read ({error}).") from error


def _encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    before, after = (
        [] if token is None else [int(token)] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [[*before, *tokens, *after] for tokens in encoded]


def _padding(tokenizer: Any) -> int:
    return next((int(t) for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
