"""Image-text retrieval: pictures in one loader, distinct captions in another, and who belongs to whom."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.captioned import CaptionedDataModule
from datamodules.images import EvaluationDataset, Picture
from datamodules.sampler import shard
from lit_clipq.contracts import NamedSamples, Preprocessing
from lit_clipq.errors import DataError


class CaptionDataset(Dataset):
    """Distinct captions, shortest first, each with the pictures it describes.

    Two captions are the same text where they are equal after stripping; they are then encoded once and tie.

    Args:
        tokens: Tokens of the distinct captions, int64 (T, L).
        lengths: Length of each, (T,); samples are in ascending order of it, `order` of the captions given.
        owners: For each distinct caption the indices of its pictures, one entry per caption, so that a picture may
            occur twice.
    """

    def __init__(self, tokens: Tensor, lengths: Tensor, owners: Sequence[Sequence[int]]) -> None:
        order = torch.argsort(lengths, stable=True)
        self.order = order
        self.tokens = tokens[order]
        self.owners = [torch.tensor(owners[index], dtype=torch.int64) for index in order.tolist()]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.tokens[index], index

    def collate(self, samples: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
        """Batch texts (B, L), their ids (B,), and rows (text id, picture id) (P, 2), one per caption."""
        ids = [index for _, index in samples]
        pairs = [torch.stack([torch.full_like(self.owners[i], i), self.owners[i]], dim=1) for i in ids]
        return {
            "texts": torch.stack([tokens for tokens, _ in samples]),
            "text_ids": torch.tensor(ids, dtype=torch.int64),
            "pairs": torch.cat(pairs),
        }


class RetrievalDataModule(CaptionedDataModule):
    """Two evaluation loaders: 0 yields pictures, 1 yields distinct captions sorted by length, with their pairs.

    Under a limit on the batches there is one loader, whose batches bring pictures with all of their captions: a limit
    evaluates the pictures of so many batches, among themselves.
    """

    captions: CaptionDataset | None = None
    _cut: Mapping[str, int] = MappingProxyType({})
    _texts: Sequence[str] = ()  # those that the loaders number now
    _all_texts: Sequence[str] = ()

    def setup(self, stage: str | None = None) -> None:
        """Check the pictures and tokenise each distinct caption once.

        Raises:
            DataError: Absent, damaged or contradictory data.
        """
        super().setup(stage)
        if self.captions is None:
            owners = self._owners(range(len(self.pictures)))
            tokens = self.checked_preprocessing().tokenizer(list(owners))
            lengths = token_lengths(tokens)
            self.captions = CaptionDataset(tokens, lengths, list(owners.values()))
            distinct = list(owners)
            self._texts = self._all_texts = [distinct[i] for i in self.captions.order.tolist()]
            self._cut = self.cut_counts([caption for picture in self.pictures for caption in picture.captions])

    def val_dataloader(self) -> list[DataLoader]:
        """Return the loader of the pictures and that of the captions, or under a limit one of both."""
        if self.captions is None:
            raise DataError("Call setup() of the data module before its loaders.")
        limit = self.batch_limit()
        if isinstance(limit, int) or limit < 1:
            data = self._within(limit)
            return [self.loader(data, collate_fn=data.collate)]
        self._texts = self._all_texts
        texts = self.loader(self.captions, workers=0, collate_fn=self.captions.collate)
        return [super().val_dataloader(), texts]

    def picture_file(self, image_id: int) -> Path:
        """Return the file of an evaluated picture."""
        return self.pictures[image_id].path

    def text_of(self, text_id: int) -> str:
        """Return an evaluated caption."""
        return self._texts[text_id]

    def _owners(self, indices: Iterable[int]) -> dict[str, list[int]]:
        """Distinct captions of some pictures, each with the indices of its pictures, one entry per caption."""
        owners: dict[str, list[int]] = {}
        for index in indices:
            for caption in self.pictures[index].captions:
                owners.setdefault(caption, []).append(index)
        return owners

    def _within(self, limit: int | float) -> "CaptionedPictures":
        processes = shard()[1]
        evaluated = set()
        for rank in range(processes):
            own = range(rank, len(self.pictures), processes)
            batches = -(-len(own) // self.batch_size)
            evaluated |= set(own[: (limit if isinstance(limit, int) else int(batches * limit)) * self.batch_size])
        owners = self._owners(sorted(evaluated))
        data = EvaluationDataset(self.pictures, self.checked_preprocessing().image)
        self._texts = list(owners)
        return CaptionedPictures(data, self.pictures, owners, self.checked_preprocessing())

    def sample_counts(self) -> dict[str, int]:
        """Return the counts of pictures, captions, distinct captions and captions that are cut."""
        distinct = 0 if self.captions is None else len(self.captions)
        return {**super().sample_counts(), "distinct_captions": distinct, **self._cut}


if TYPE_CHECKING:

    def _fulfils(data: RetrievalDataModule) -> NamedSamples:
        """Let the type checker hold the class against its contract."""
        return data


class CaptionedPictures(Dataset):
    """Pictures, collated with their distinct captions and the pairs of these.

    Args:
        data: The pictures.
        pictures: Their captions, in the same order.
        owners: For each distinct caption the pictures that are evaluated and have it, one entry per caption.
        preprocessing: Of the model.
    """

    def __init__(
        self,
        data: EvaluationDataset,
        pictures: Sequence[Picture],
        owners: Mapping[str, Sequence[int]],
        preprocessing: Preprocessing,
    ) -> None:
        self.data = data
        self.pictures = pictures
        self.owners = owners
        self.ids = {caption: index for index, caption in enumerate(owners)}
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        return self.data[index]

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Batch pictures (B, 3, H, W) with ids (B,), texts (T, L) with ids (T,), rows (text id, picture id) (P, 2)."""
        indices = [sample["image_ids"] for sample in samples]
        texts = list(dict.fromkeys(caption for index in indices for caption in self.pictures[index].captions))
        return {
            "images": torch.stack([sample["images"] for sample in samples]),
            "image_ids": torch.tensor(indices, dtype=torch.int64),
            "texts": self.preprocessing.tokenizer(texts),
            "text_ids": torch.tensor([self.ids[text] for text in texts], dtype=torch.int64),
            "pairs": torch.tensor([[self.ids[text], owner] for text in texts for owner in self.owners[text]]),
        }


def token_lengths(tokens: Tensor) -> Tensor:
    """Return lengths without the padding, whatever its id: the run of equal tokens that ends a row is padding.

    Args:
        tokens: int64 (T, L).

    Returns:
        int64 (T,). A row without padding counts one short, which does not matter for sorting.

    Example:
        >>> token_lengths(torch.tensor([[7, 3, 9, 0, 0], [7, 9, 1, 1, 1]]))
        tensor([3, 2])
    """
    same_as_last = tokens == tokens[:, -1:]
    trailing_run = same_as_last.flip(1).cumprod(1).sum(1)
    return tokens.shape[1] - trailing_run
