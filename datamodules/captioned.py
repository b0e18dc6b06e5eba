"""What retrieval and captioning share: pictures with captions."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from datamodules.calibration_split import caption_tokens
from datamodules.captions import read_captioned_folder
from datamodules.datamodule import QuantDataModule
from datamodules.images import Picture, list_pictures


class CaptionedDataModule(QuantDataModule):
    """Pictures with captions; calibration pairs a picture with one of its captions."""

    def calibration_texts(self, pictures: Sequence[Picture], seed: int) -> Tensor | None:  # noqa: ARG002
        """Return the tokens of each picture's caption, or None where calibration pictures have no captions."""
        return caption_tokens(pictures, self.checked_preprocessing())

    def read_folder(self, folder: Path) -> list[Picture]:
        """List the pictures of a calibration folder, with captions where its layout is one of COCO's or Flickr's."""
        return read_captioned_folder(folder, self.gaps_elsewhere()) or [Picture(path) for path in list_pictures(folder)]

    def sample_counts(self) -> dict[str, int]:
        """Return the counts of pictures and captions."""
        captions = sum(len(picture.captions) for picture in self.pictures)
        return {**super().sample_counts(), "captions": captions}
