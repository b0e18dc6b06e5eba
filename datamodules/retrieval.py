"""Image-text retrieval: pictures in one loader, distinct captions in another, and who belongs to whom."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import QuantDataModule
from datamodules.calibration import caption_tokens
from datamodules.captions import read_captioned_folder
from datamodules.images import Picture, list_pictures
from lit_clipq.errors import DataError


class CaptionDataset(Dataset):
    """Distinct captions, shortest first, each with the pictures it describes.

    Two captions are the same text where they are equal after stripping; they are then encoded once and tie.

    Args:
        tokens: Tokens of the distinct captions, int64 (T, L).
        lengths: Length of each, (T,); samples are in ascending order of it.
        owners: For each distinct caption the indices of its pictures, one entry per caption, so that a picture may
            occur twice.
    """

    def __init__(self, tokens: Tensor, lengths: Tensor, owners: Sequence[Sequence[int]]) -> None:
        order = torch.argsort(lengths, stable=True)
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


class RetrievalDataModule(QuantDataModule):
    """Two evaluation loaders: 0 yields pictures, 1 yields distinct captions sorted by length, with their pairs."""

    captions: CaptionDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Check the pictures and tokenise each distinct caption once.

        Raises:
            DataError: Absent, damaged or contradictory data.
        """
        super().setup(stage)
        if self.captions is None:
            owners: dict[str, list[int]] = {}
            for index, picture in enumerate(self.pictures):
                for caption in picture.captions:
                    owners.setdefault(caption, []).append(index)
            tokens = self.checked_preprocessing().tokenizer(list(owners))
            self.captions = CaptionDataset(tokens, token_lengths(tokens), list(owners.values()))

    def val_dataloader(self) -> list[DataLoader]:
        """Return the loader of the pictures and the loader of the captions."""
        if self.captions is None:
            raise DataError("Call setup() of the data module before its loaders.")
        texts = self.loader(self.captions, workers=0, collate_fn=self.captions.collate)
        return [super().val_dataloader(), texts]

    def calibration_texts(self, pictures: Sequence[Picture], seed: int) -> Tensor | None:  # noqa: ARG002
        """Return the tokens of each picture's caption, or None where calibration pictures have no captions."""
        return caption_tokens(pictures, self.checked_preprocessing())

    def read_folder(self, folder: Path) -> list[Picture]:
        """List the pictures of a calibration folder, with captions where its layout is one of COCO's or Flickr's."""
        return read_captioned_folder(folder) or [Picture(path) for path in list_pictures(folder)]

    def sample_counts(self) -> dict[str, int]:
        """Return the counts of pictures, captions and distinct captions."""
        counts = super().sample_counts()
        counts["captions"] = sum(len(picture.captions) for picture in self.pictures)
        counts["distinct_captions"] = 0 if self.captions is None else len(self.captions)
        return counts


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
