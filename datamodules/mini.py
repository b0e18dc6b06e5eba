"""The mini world: training pairs, retrieval, classification and questions, written to disk on first use."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.captioned import CaptionedDataModule
from datamodules.captions import read_coco_captions, read_json
from datamodules.datamodule import offered_preprocessing
from datamodules.imagenet import ImageFolderClassification
from datamodules.images import Picture
from datamodules.retrieval import RetrievalDataModule
from datamodules.sampler import ShuffledBatches, shard
from datamodules.vqa import VQADataModule
from datamodules.vqa_files import Question, read_questions
from lit_clipq.contracts import Preprocessing
from lit_clipq.errors import ConfigError
from lit_clipq.metrics.functional import AnswerVocabulary
from lit_clipq.mini import PRESETS, ensure_world, world_folder
from lit_clipq.mini.world import vqa_annotations

Pairs = tuple[Tensor, Tensor]
ABSENT = "The mini world is not in {}; call prepare_data() of the data module, which writes it."


class MiniCaptions(CaptionedDataModule):
    """Pictures of the mini world with five captions each; calibration pictures are its calibration split.

    Args:
        root: Folder of worlds; by default the cache folder. What is absent is written there, nothing is downloaded.
        preset: "small" evaluates 500 pictures, "full" 2,500.
        captions_per_image: How many captions of a picture to take, from the first on; null for all five.
        **kwargs: See `QuantDataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        preset: Literal["small", "full"] = "small",
        captions_per_image: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=str(world_folder(root, preset)), **kwargs)
        if captions_per_image is not None and captions_per_image < 1:
            raise ConfigError(f"--data.captions_per_image must be at least 1 or null, got {captions_per_image}.")
        self.preset = preset
        self.captions_per_image = captions_per_image

    def prepare_data(self) -> None:
        """Write the world where it is absent, on one process per machine."""
        ensure_world(self.root.parent, self.preset)

    def absent(self) -> str | None:
        """Say that the world is not written yet."""
        return None if self.root.is_dir() else ABSENT.format(self.root)

    def read_evaluation(self) -> list[Picture]:
        """List the pictures of the val split."""
        return self._read("val")

    def read_train(self) -> list[Picture]:
        """List the pictures of the calibration split."""
        return self._read("calibration")

    def options(self) -> dict[str, Any]:
        """Add preset and captions per picture."""
        return {**super().options(), "preset": self.preset, "captions_per_image": self.captions_per_image}

    def _read(self, split: str) -> list[Picture]:
        annotations = self.root / "annotations" / f"captions_{split}.json"
        return read_coco_captions(annotations, self.root / "images", self.captions_per_image)


class MiniRetrieval(RetrievalDataModule, MiniCaptions):
    """The mini world for retrieval; options as for `MiniCaptions`."""


class MiniClassification(ImageFolderClassification):
    """Pictures of one main thing in 24 class folders; calibration pictures are the calibration split.

    Args:
        root: Folder of worlds; by default the cache folder. What is absent is written there, nothing is downloaded.
        preset: "small" evaluates 480 pictures, "full" 2,400.
        **kwargs: See `ImageFolderClassification`.
    """

    def __init__(self, root: str | None = None, preset: Literal["small", "full"] = "small", **kwargs: Any) -> None:
        super().__init__(root=str(world_folder(root, preset) / "classification"), **kwargs)
        self.preset = preset

    def prepare_data(self) -> None:
        """Write the world where it is absent, on one process per machine."""
        ensure_world(self.root.parent.parent, self.preset)

    def absent(self) -> str | None:
        """Say that the world is not written yet."""
        return None if self.root.is_dir() else ABSENT.format(self.root.parent)

    def read_train(self) -> list[Picture]:
        """List the pictures of the calibration split, without their labels."""
        return self.read_folder(self.root / "calibration")

    def options(self) -> dict[str, Any]:
        """Add the preset."""
        return {**super().options(), "preset": self.preset}


class MiniVQA(VQADataModule):
    """Three questions about each picture of the mini world; calibration pictures are its calibration split.

    Training asks about the first 6,000 pictures of the world "train", which is written when training needs it. The
    vocabulary is counted over their questions and those of the "full" evaluation, so that it is the same for both
    presets, and without reading or writing these worlds.

    Args:
        root: Folder of worlds; by default the cache folder. What is absent is written there, nothing is downloaded.
        preset: "small" evaluates 500 pictures, "full" 2,500.
        workers: Processes that draw the training world on first use.
        **kwargs: See `VQADataModule` and `QuantDataModule`.
    """

    calibration_split = "calibration"

    def __init__(
        self, root: str | None = None, preset: Literal["small", "full"] = "small", workers: int = 2, **kwargs: Any
    ) -> None:
        super().__init__(root=str(world_folder(root, preset)), **kwargs)
        if workers < 1:
            raise ConfigError(f"--data.workers must be at least 1, got {workers}.")
        self.preset = preset
        self.workers = workers

    def prepare_data(self) -> None:
        """Write the world where it is absent, and that of training to train, on one process per machine."""
        ensure_world(self.root.parent, self.preset)
        if self.fits():
            ensure_world(self.root.parent, "train", self.workers)

    def absent(self) -> str | None:
        """Say that the world is not written yet."""
        return None if self.root.is_dir() else ABSENT.format(self.root)

    def count_answers(self) -> AnswerVocabulary:
        """Count the vocabulary of the training split and the "full" evaluation, whatever is on disk."""
        counted = (("train", "train"), ("full", "val"))
        rows = [row for preset, split in counted for row in _annotations(preset, split)]
        return AnswerVocabulary.from_common_answers(
            (row["multiple_choice_answer"] for row in rows), self.min_answer_count
        )

    def read_split(self, split: str) -> list[Question]:
        """Read the questions of a split; the world of training is written where it is absent."""
        folder = self._world(split) / "vqa"
        return read_questions(
            folder / f"v2_OpenEnded_mini_{split}_questions.json", folder / f"v2_mini_{split}_annotations.json"
        )

    def picture_paths(self, split: str, image_ids: Sequence[int]) -> list[Path]:
        """Return the file of each picture, as the caption file names it."""
        world = self._world(split)
        listed = read_json(world / "annotations" / f"captions_{split}.json")["images"]
        names = {row["id"]: row["file_name"] for row in listed}
        return [world / "images" / names[image_id] for image_id in image_ids]

    def options(self) -> dict[str, Any]:
        """Add the preset."""
        return {**super().options(), "preset": self.preset}

    def _world(self, split: str) -> Path:
        return ensure_world(self.root.parent, "train", self.workers) if split == "train" else self.root


def _annotations(preset: str, split: str) -> list[dict[str, Any]]:
    return vqa_annotations(split, PRESETS[preset].questioned[split])[1]["annotations"]


class MiniPretrain(LightningDataModule):
    """Pairs of pictures and captions of the mini world's training split, held in memory.

    In each epoch a picture comes with the next of its five captions. The last, smaller batch of an epoch is left out.

    Args:
        root: Folder of worlds; by default the cache folder.
        batch_size: Pairs in a batch of one device.
        seed: Seed of the order.
        limit: Train on the first N pictures only.
        workers: Processes that draw the world on first use.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 256,
        seed: int = 0,
        limit: int | None = None,
        workers: int = 2,
    ) -> None:
        super().__init__()
        if batch_size < 1 or workers < 1 or (limit is not None and limit < batch_size):
            raise ConfigError(
                f"MiniPretrain needs batch_size and workers of 1 or more and a limit of a batch or more, "
                f"got {batch_size}, {workers} and {limit}."
            )
        self.root = None if root is None else Path(root).expanduser()
        self.batch_size = batch_size
        self.seed = seed
        self.limit = limit
        self.workers = workers
        self.preprocessing: Preprocessing | None = None
        self._train: PairDataset | None = None
        self._dev: PairDataset | None = None

    def prepare_data(self) -> None:
        """Write the training world where it is absent."""
        ensure_world(self.root, "train", self.workers)

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002 - training and validation share it
        """Read pictures and captions into memory. Called again, it does nothing.

        Raises:
            ConfigError: No preprocessing: neither set nor offered by the task of the trainer.
        """
        if self._train is not None:
            return
        if self.preprocessing is None:
            self.preprocessing = offered_preprocessing(self)
        if self.preprocessing is None:
            raise ConfigError("A data module needs `preprocessing`: set it before setup(), or run it in a Trainer.")
        world = ensure_world(self.root, "train", self.workers)
        for split in ("train", "dev"):
            pictures = read_coco_captions(world / "annotations" / f"captions_{split}.json", world / "images")
            if split == "train":
                self._train = PairDataset(pictures[: self.limit], self.preprocessing)
            else:
                self._dev = PairDataset(pictures, self.preprocessing)

    def train_dataloader(self) -> DataLoader:
        """Return shuffled batches (float (B, 3, H, W), int64 (B, L)) of this process."""
        data = self._ready(self._train)
        return DataLoader(data, batch_size=None, sampler=EpochBatches(len(data), self.batch_size, self.seed))

    def val_dataloader(self) -> DataLoader:
        """Return the pictures of the dev split, each with its first caption."""
        data = self._ready(self._dev)
        rows = torch.arange(len(data))[slice(shard()[0], None, shard()[1])]
        batches = [torch.stack([part, torch.zeros_like(part)], dim=1) for part in rows.split(self.batch_size)]
        return DataLoader(data, batch_size=None, sampler=batches)

    def on_after_batch_transfer(self, batch: Pairs, dataloader_idx: int) -> Pairs:  # noqa: ARG002
        """Normalise pixels on the device."""
        pixels, tokens = batch
        return self._ready(self._train).normalise(pixels), tokens

    @staticmethod
    def _ready(data: "PairDataset | None") -> "PairDataset":
        if data is None:
            raise ConfigError("Call setup() of the data module first.")
        return data


class PairDataset(Dataset):
    """Pictures with several captions each, in memory as uint8.

    An index is a whole batch, rows (picture, caption) int64 (B, 2); it yields (uint8 (B, 3, H, W), int64 (B, L)).
    """

    def __init__(self, pictures: list[Picture], preprocessing: Preprocessing) -> None:
        stack = np.stack([np.asarray(Image.open(picture.path).convert("RGB")) for picture in pictures])
        self.pixels = torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous()  # uint8 (N, 3, H, W)
        tokens = [preprocessing.tokenizer(list(picture.captions)) for picture in pictures]
        self.tokens = torch.stack(tokens).to(torch.int16)  # (N, captions, L)
        size = (self.pixels.shape[3], self.pixels.shape[2])
        self.black, white = (preprocessing.image(Image.new("RGB", size, (v, v, v)))[:, :1, :1] for v in (0, 255))
        self.range = white - self.black  # the model's normalisation, read off a black and a white picture

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: Tensor) -> Pairs:
        pictures, captions = rows.unbind(1)
        return self.pixels[pictures], self.tokens[pictures, captions].long()

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return the model's input (B, 3, H, W) float of uint8 pixels, on the device of the pixels."""
        return pixels * (self.range / 255).to(pixels.device) + self.black.to(pixels.device)


class EpochBatches(ShuffledBatches):
    """Batches of (picture, caption), int64 (B, 2); see `ShuffledBatches`.

    Args:
        size: Number of pictures.
        batch_size: Pairs in a batch of one process.
        seed: Seed of the order.
        captions: Captions of a picture; epoch e takes caption (picture + e) % captions.
    """

    def __init__(self, size: int, batch_size: int, seed: int, captions: int = 5) -> None:
        super().__init__(size, batch_size, seed)
        self.captions = captions

    def __iter__(self) -> Iterator[Tensor]:
        for pictures in super().__iter__():
            yield torch.stack([pictures, (pictures + self.epoch) % self.captions], dim=1)
