"""Flickr30k and Flickr8k."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from datamodules.captioned import CaptionedDataModule
from datamodules.captions import find_file, find_flickr_images, read_karpathy, read_lines, read_table
from datamodules.images import Picture, composed
from datamodules.retrieval import RetrievalDataModule
from lit_clipq.errors import ConfigError, DataError

KARPATHY_URL = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
HOW_TO_GET = (
    "The pictures are given out on request only: fill in the form at "
    "https://shannon.cs.illinois.edu/DenotationGraph/ ; the split file is in " + KARPATHY_URL
)


class FlickrCaptions(CaptionedDataModule):
    """A Flickr set: a Karpathy split file, or a caption table with a list of the test pictures."""

    title: str
    karpathy: str
    tables: Sequence[str]
    test_lists: Sequence[str]

    def prepare_data(self) -> None:
        """Check that the files are there.

        Raises:
            DataError: Files are absent; there is no free archive that `download` could fetch.
        """
        message = self.absent()
        if self.download and message:
            raise DataError(f"{message} There is no free archive, so --data.download cannot fetch it.")
        super().prepare_data()

    def absent(self) -> str | None:
        """Say what is missing: a caption file, or the list of the test pictures."""
        if self._karpathy_file() is None and self._table() is None:
            return (
                f"{self.title} needs {self.karpathy}, or {' or '.join(self.tables)}, and the pictures in images/ in "
                f"{self.root.absolute()}, but no caption file is there. {HOW_TO_GET}."
            )
        if self._karpathy_file() is None and self._needs_list() and self._test_list() is None:
            return (
                f"{self._table()} does not tell the test pictures apart: put {self.karpathy} (from {KARPATHY_URL}) or "
                f"a list of their names, {' or '.join(self.test_lists)}, into {self.root.absolute()}."
            )
        return None

    def read_evaluation(self) -> list[Picture]:
        """List the evaluated pictures with all their captions."""
        return self._read(test=True)

    def read_train(self) -> list[Picture]:
        """List the pictures outside the test split with their captions; empty where there is no split."""
        split_known = self._karpathy_file() is not None or self._test_list() is not None
        return self._read(test=False) if self._needs_list() and split_known else []

    @abstractmethod
    def _needs_list(self) -> bool:
        """Whether only the test split is evaluated, so that it must be told apart."""

    def _read(self, test: bool) -> list[Picture]:
        karpathy, table, test_list = self._karpathy_file(), self._table(), self._test_list()
        images = find_flickr_images(self.root)
        gaps = self.gaps if test else self.gaps_elsewhere()
        every_split = frozenset({"train", "restval", "val", "test"})
        if karpathy is not None:
            wanted = every_split if not self._needs_list() else frozenset({"test"}) if test else every_split - {"test"}
            return read_karpathy(karpathy, images, wanted, gaps=gaps)
        if table is None:
            raise DataError(str(self.absent()))
        if not self._needs_list() or test_list is None:
            return read_table(table, images, gaps=gaps)
        names = frozenset(map(composed, _names(test_list)))
        return read_table(table, images, names if test else _AllBut(names), gaps)

    def _karpathy_file(self) -> Path | None:
        return find_file(self.root, [self.karpathy])

    def _table(self) -> Path | None:
        return find_file(self.root, self.tables) or find_file(find_flickr_images(self.root), self.tables)

    def _test_list(self) -> Path | None:
        return find_file(self.root, self.test_lists)


class Flickr30kCaptions(FlickrCaptions):
    """Flickr30k, Karpathy test split: 1,000 pictures, 5,000 captions.

    Files in `root`: `dataset_flickr30k.json` (Karpathy), or a caption table (`results.csv`,
    `results_20130124.token`) with the names of the test pictures in `flickr30k_test.txt`; pictures in
    `flickr30k-images/` or `images/`. Calibration pictures are the rest of the data set, where it is on disk.

    Args:
        root: Folder with captions and pictures.
        **kwargs: See `QuantDataModule`. `download` is refused with the address of the request form.
    """

    title = "Flickr30k"
    karpathy = "dataset_flickr30k.json"
    tables = ("results.csv", "results_20130124.token")
    test_lists = ("flickr30k_test.txt", "test.txt")

    def __init__(self, root: str, **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)

    def _needs_list(self) -> bool:
        return True


class Flickr8kCaptions(FlickrCaptions):
    """Flickr8k: 8,091 pictures with 5 captions each, or any part of them.

    Files in `root`: `captions.txt` (`image,caption`), `Flickr8k.token.txt` or `dataset_flickr8k.json`; pictures in
    `images/`, `Images/` or `Flicker8k_Dataset/`.

    Args:
        root: Folder with captions and pictures.
        split: "all": every picture of the caption file, of which a slice calibrates. "test": the 1,000 test pictures
            (`Flickr_8k.testImages.txt` or `dataset_flickr8k.json` is needed); the others calibrate.
        **kwargs: See `QuantDataModule`. `download` is refused with the address of the request form.

    Raises:
        ConfigError: An unknown split.
    """

    title = "Flickr8k"
    karpathy = "dataset_flickr8k.json"
    tables = ("captions.txt", "Flickr8k.token.txt")
    test_lists = ("Flickr_8k.testImages.txt",)

    def __init__(self, root: str, split: Literal["all", "test"] = "all", **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)
        if split not in ("all", "test"):
            raise ConfigError(f"--data.split must be 'all' or 'test', got {split!r}.")
        self.split = split

    def options(self) -> dict[str, Any]:
        """Add the split."""
        return {**super().options(), "split": self.split}

    def _needs_list(self) -> bool:
        return self.split == "test"


class Flickr30kRetrieval(RetrievalDataModule, Flickr30kCaptions):
    """Flickr30k for retrieval; options as for `Flickr30kCaptions`."""


class Flickr8kRetrieval(RetrievalDataModule, Flickr8kCaptions):
    """Flickr8k for retrieval; options as for `Flickr8kCaptions`."""


class _AllBut:
    """Everything outside a set of names."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names

    def __contains__(self, name: object) -> bool:
        return name not in self.names


def _names(path: Path) -> list[str]:
    """Read one picture name a line; a name without a suffix is that of a JPEG."""
    lines = [line.strip() for line in read_lines(path)]
    return [line if Path(line).suffix else f"{line}.jpg" for line in lines if line]
