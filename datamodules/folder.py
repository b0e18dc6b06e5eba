"""Any folder of pictures, with or without captions: what a user has."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from datamodules.captions import KARPATHY_NAMES, read_coco_captions, read_json, read_karpathy, read_table
from datamodules.images import Picture, list_pictures
from datamodules.retrieval import RetrievalDataModule
from lit_clipq.contracts import TextData
from lit_clipq.errors import DataError

EVERY_SPLIT = frozenset({"train", "restval", "val", "test"})


class PictureFolder(RetrievalDataModule):
    """A folder of pictures, searched with all folders below it.

    Without captions there is one loader, of pictures. With a file of captions those pictures are evaluated that it
    names, and there are the loaders of `RetrievalDataModule`. Calibration pictures leave the evaluation, unless
    `calibration_root` names others.

    Args:
        root: The folder.
        captions: File of captions, in COCO's format, a Karpathy split file, or a table of one `picture,caption` a line
            (also with `|`, or `picture#number<tab>caption`); pictures are named relative to `root`.
        **kwargs: See `QuantDataModule`.
    """

    def __init__(self, root: str, captions: str | None = None, **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)
        self.captions_file = None if captions is None else Path(captions).expanduser()

    @property
    def has_texts(self) -> bool:
        """Whether there are captions."""
        return self.captions_file is not None

    def absent(self) -> str | None:
        """Say that the folder or the file of captions is not there."""
        if not self.root.is_dir():
            return f"There is no folder {self.root.absolute()}; give a folder of pictures with --data.root."
        if self.captions_file is not None and not self.captions_file.is_file():
            return f"There is no file {self.captions_file.absolute()}; give a file of captions with --data.captions."
        return None

    def read_evaluation(self) -> list[Picture]:
        """List the pictures, those that have captions where there is a file of them."""
        if self.captions_file is None:
            return [Picture(path) for path in list_pictures(self.root, self.unread)]
        if ".json" not in self.captions_file.suffixes:
            return read_table(self.captions_file, self.root, gaps=self.gaps)
        content = read_json(self.captions_file)
        if isinstance(content, dict) and "annotations" in content:
            return read_coco_captions(self.captions_file, self.root, gaps=self.gaps)
        if isinstance(content, dict) and "images" in content:
            return read_karpathy(self.captions_file, self.root, EVERY_SPLIT, gaps=self.gaps)
        raise DataError(
            f"{self.captions_file} is no file of captions: expected JSON in COCO's format or as in "
            f"{KARPATHY_NAMES[0]}, or a table of one picture,caption a line."
        )

    def read_train(self) -> list[Picture]:
        """Return nothing: calibration pictures leave the evaluation."""
        return []

    def setup(self, stage: str | None = None) -> None:
        """Check the pictures, and tokenise each distinct caption once.

        Raises:
            DataError: Absent, damaged or contradictory data.
        """
        if self.has_texts:
            super().setup(stage)
        else:
            super(RetrievalDataModule, self).setup(stage)

    def val_dataloader(self) -> Any:
        """Return the loader of the pictures, and that of their captions where there are any."""
        return super().val_dataloader() if self.has_texts else super(RetrievalDataModule, self).val_dataloader()

    def calibration_texts(self, pictures: Any, seed: int) -> Tensor | None:
        """Return the tokens of each picture's caption, or None where there are none."""
        return super().calibration_texts(pictures, seed) if self.has_texts else None

    def options(self) -> dict[str, Any]:
        """Add whether there are captions."""
        return {**super().options(), "captions": self.has_texts}

    def sample_counts(self) -> dict[str, int]:
        """Return the counts of pictures, and of captions where there are any."""
        counts = super().sample_counts()
        return counts if self.has_texts else {k: v for k, v in counts.items() if "captions" not in k}


if TYPE_CHECKING:

    def _fulfils(data: PictureFolder) -> TextData:
        """Let the type checker hold the class against its contract."""
        return data
