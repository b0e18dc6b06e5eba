"""COCO captions: the Karpathy test split and val2017."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from datamodules.captioned import CaptionedDataModule
from datamodules.captions import KARPATHY_TRAIN, find_file, read_coco_captions, read_karpathy
from datamodules.datamodule import describe_absent
from datamodules.download import (
    COCO_ANNOTATIONS_2017,
    COCO_TRAIN_2014,
    COCO_TRAIN_2017,
    COCO_VAL_2014,
    COCO_VAL_2017,
    KARPATHY_SPLITS,
    Archive,
)
from datamodules.images import Picture
from datamodules.retrieval import RetrievalDataModule
from lit_clipq.errors import ConfigError


@dataclass(frozen=True)
class CocoPreset:
    """One published way to evaluate on COCO."""

    annotations: str
    """Annotation file below the root."""
    images: str
    """Folder of the pictures below the root."""
    captions_per_image: int | None
    """Captions of a picture that count, in the order of the file; None for all."""
    archives: tuple[Archive, ...]
    """What `download` fetches for the evaluation."""
    train: Archive
    """Pictures that only calibrate; fetched on demand."""


PRESETS = {
    "karpathy_test": CocoPreset(
        "dataset_coco.json", "val2014", None, (KARPATHY_SPLITS, COCO_VAL_2014), COCO_TRAIN_2014
    ),
    "val2017": CocoPreset(
        "annotations/captions_val2017.json", "val2017", 5, (COCO_ANNOTATIONS_2017, COCO_VAL_2017), COCO_TRAIN_2017
    ),
}
TRAIN_SPLITS = ("train2017", "train2014")


class CocoCaptions(CaptionedDataModule):
    """COCO captions.

    Calibration pictures are the train and restval rows of the Karpathy split, or train2017 / train2014 with their
    caption file, as far as they are on disk.

    Args:
        root: Folder with the annotation file and the pictures.
        preset: "karpathy_test": 5,000 pictures of val2014 with all 25,010 captions (`dataset_coco.json`, `val2014/`).
            "val2017": 5,000 pictures with their first 5 captions (`annotations/captions_val2017.json`, `val2017/`).
        captions_per_image: How many captions of a picture to take, in the order of the file; null for all.
        download_train: With `download`, fetch the train pictures too (13 to 19 GB), to calibrate with. Without them
            the val2017 preset gives up a slice of the evaluation.
        **kwargs: See `QuantDataModule`.

    Raises:
        ConfigError: An unknown preset, or fewer than one caption.
    """

    def __init__(
        self,
        root: str,
        preset: Literal["karpathy_test", "val2017"] = "karpathy_test",
        captions_per_image: int | Literal["preset"] | None = "preset",
        download_train: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, **kwargs)
        if preset not in PRESETS:
            raise ConfigError(f"--data.preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
        self.preset = preset
        self.choice = PRESETS[preset]
        self.captions_per_image: int | None = (
            self.choice.captions_per_image if isinstance(captions_per_image, str) else captions_per_image
        )
        if self.captions_per_image is not None and self.captions_per_image < 1:
            raise ConfigError(f"--data.captions_per_image must be at least 1 or null, got {captions_per_image}.")
        self.download_train = download_train

    def archives(self) -> tuple[Archive, ...]:
        """Official archives of the preset, with the train pictures where asked for."""
        return (*self.choice.archives, self.choice.train) if self.download_train else self.choice.archives

    def absent(self) -> str | None:
        """Say which files of the preset are absent and where they come from."""
        annotations, images = self.choice.archives
        karpathy = find_file(self.root, [self.choice.annotations]) if self.preset == "karpathy_test" else None
        name = str(karpathy.relative_to(self.root)) if karpathy else self.choice.annotations
        expected = {name: annotations.url, f"{self.choice.images}/": images.url}
        return describe_absent(f"COCO ({self.preset})", self.root, expected, download=True)

    def read_evaluation(self) -> list[Picture]:
        """List the pictures of the preset with their captions."""
        if self.preset == "karpathy_test":
            return self._karpathy({"test"}, self.gaps)
        source = self.root / self.choice.annotations
        return read_coco_captions(source, self.root / self.choice.images, self.captions_per_image, self.gaps)

    def read_train(self) -> list[Picture]:
        """List train pictures with their captions, as far as annotation files and folders are there."""
        if self.preset == "karpathy_test":
            return self._karpathy(KARPATHY_TRAIN, self.gaps_elsewhere())
        sources = [(self.root / f"annotations/captions_{split}.json", self.root / split) for split in TRAIN_SPLITS]
        there = [(file, images) for file, images in sources if file.is_file() and images.is_dir()]
        return read_coco_captions(*there[0], gaps=self.gaps_elsewhere()) if there else []

    def options(self) -> dict[str, Any]:
        """Add preset and captions per picture."""
        return {**super().options(), "preset": self.preset, "captions_per_image": self.captions_per_image}

    def _karpathy(self, splits: set[str] | frozenset[str], gaps: Counter[str] | None) -> list[Picture]:
        file = find_file(self.root, [self.choice.annotations]) or self.root / self.choice.annotations
        return read_karpathy(file, self.root, splits, self.captions_per_image, gaps)


class CocoRetrieval(RetrievalDataModule, CocoCaptions):
    """COCO captions for retrieval; options as for `CocoCaptions`."""
