"""What all data modules share: checked pictures, a calibration set disjoint from the evaluation, one fingerprint."""

import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.calibration_split import choose_pictures, hold_out
from datamodules.download import Archive, fetch
from datamodules.images import (
    EvaluationDataset,
    Picture,
    PictureDataset,
    are_files,
    describe_unread,
    usable_pictures,
)
from datamodules.sampler import ShardSampler
from lit_clipq.contracts import (
    CalibrationBatch,
    CalibrationData,
    CountedData,
    IdentifiedData,
    OffersPreprocessing,
    Preprocessing,
)
from lit_clipq.errors import ConfigError, DataError
from lit_clipq.models.preprocessing import count_cut_texts
from lit_clipq.pictures import DECODING

logger = logging.getLogger(__name__)


class QuantDataModule(LightningDataModule, ABC):
    """Evaluation pictures of one data set, and calibration pictures that are not among them.

    Calibration pictures come from `calibration_root`, else from the data set's train split where that is on disk,
    else from a slice that leaves the evaluation: the same slice in every run with the same options, however many
    samples a calibration asks for. `sample_counts` tells its size.

    Args:
        root: Folder of the data set.
        batch_size: Pictures, or texts, in a batch of one device.
        num_workers: Processes that decode pictures.
        on_error: What a missing or damaged picture does, a picture without captions and a blank caption or question:
            "raise" names it, "skip" leaves it out and counts it.
        limit: Take the first N usable pictures only; a held-out slice comes out of these.
        calibration_root: Folder of other pictures to calibrate with: any folder of pictures, or a COCO or Flickr
            folder with captions.
        held_out_calibration: Size of the slice that leaves the evaluation where there are no other pictures; by
            default 128, or a tenth of the pictures where that is less.
        download: Fetch the official archives when files are absent.

    Raises:
        ConfigError: An option outside its range.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 64,
        num_workers: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
        limit: int | None = None,
        calibration_root: str | None = None,
        held_out_calibration: int | None = None,
        download: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("limit", limit, 1),
            ("held_out_calibration", held_out_calibration, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"--data.{name} must be at least {least}, got {value}.")
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"--data.on_error must be 'raise' or 'skip', got {on_error!r}.")
        self.root = Path(root).expanduser()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.on_error = on_error
        self.limit = limit
        self.calibration_root = Path(calibration_root).expanduser() if calibration_root else None
        self.held_out_calibration = held_out_calibration
        self.download = download
        self.preprocessing: Preprocessing | None = None
        self.pictures: list[Picture] = []
        self._pool: list[Picture] = []
        self._held_out = 0
        self._skipped = 0
        self.gaps: Counter[str] | None = Counter() if on_error == "skip" else None
        """Captions and pictures that the annotation files give no text, left out; None where this is an error."""
        self.unread: Counter[str] = Counter()
        """Files of the evaluation that are no pictures, by suffix."""

    # What a data set says about itself

    @abstractmethod
    def absent(self) -> str | None:
        """Say which files are expected where and how to get them, or None where they are there."""

    @abstractmethod
    def read_evaluation(self) -> list[Picture]:
        """List the pictures of the evaluation, whether or not the files exist."""

    @abstractmethod
    def read_train(self) -> list[Picture]:
        """List pictures of the train split; empty where there is none on disk."""

    @abstractmethod
    def read_folder(self, folder: Path) -> list[Picture]:
        """List the pictures of a calibration folder that the user named."""

    @abstractmethod
    def calibration_texts(self, pictures: Sequence[Picture], seed: int) -> Tensor | None:
        """Return one tokenised text per picture, int64 (n, context length), or None where there are no texts."""

    def archives(self) -> tuple[Archive, ...]:
        """Official archives that `download` fetches."""
        return ()

    def options(self) -> dict[str, Any]:
        """Options that change what is evaluated, for the fingerprint."""
        return {"on_error": self.on_error, "limit": self.limit}

    def gaps_elsewhere(self) -> Counter[str] | None:
        """Return where to count the gaps of what is not evaluated; None where they are an error."""
        return None if self.gaps is None else Counter()

    # Lightning

    def prepare_data(self) -> None:
        """Fetch what is absent if asked to, on one process per machine.

        Raises:
            DataError: Files are absent and cannot be fetched.
        """
        if self.download:
            for archive in self.archives():
                fetch(archive, self.root)
        self._require_files()

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002 - the evaluation is the same in every stage
        """List, check and split the pictures. Called again, it does nothing.

        Raises:
            DataError: Absent, damaged or contradictory data.
            ConfigError: No preprocessing: neither set nor offered by the task of the trainer.
        """
        offered = offered_preprocessing(self)
        if self.pictures:
            if offered is not None and offered.fingerprint != self.checked_preprocessing().fingerprint:
                raise ConfigError("This data module was set up for a model with other preprocessing; make a new one.")
            return
        if self.preprocessing is None:
            self.preprocessing = offered
        if self.preprocessing is None:
            raise ConfigError("A data module needs `preprocessing`: set it before setup(), or run it in a Trainer.")
        self._require_files()
        if self.gaps is not None:
            self.gaps.clear()
        self.unread.clear()
        listed = self.read_evaluation()
        if self.unread:
            logger.warning("files beside the pictures that are not read: %s", describe_unread(self.unread))
        if not listed:
            raise DataError(f"{type(self).__name__} finds no picture of its evaluation split listed in {self.root}.")
        pictures, self._skipped = usable_pictures(listed, self.on_error, self.limit)
        if self._skipped:
            logger.warning("%d missing or damaged pictures were skipped, %d are left", self._skipped, len(pictures))
        self._pool = self._calibration_pool()
        if not self._pool:
            pictures, self._pool = hold_out(pictures, self.held_out_calibration)
            self._held_out = len(self._pool)
            logger.info("%d pictures leave the evaluation for calibration", self._held_out)
        self.pictures = pictures

    def val_dataloader(self) -> Any:
        """Return batches `{"images", "image_ids"}` of this process, with `"labels"` where there are classes."""
        return self.loader(EvaluationDataset(self.pictures, self.checked_preprocessing().image))

    def test_dataloader(self) -> Any:
        """The same as `val_dataloader`."""
        return self.val_dataloader()

    def loader(self, data: Any, workers: int | None = None, collate_fn: Callable | None = None) -> DataLoader:
        """Batch this process's share of a data set, by default with `num_workers` processes."""
        return DataLoader(
            data,
            batch_size=self.batch_size,
            sampler=ShardSampler(data),
            num_workers=self.num_workers if workers is None else workers,
            collate_fn=collate_fn,
        )

    # Calibration

    def calibration_dataloader(self, samples: int, batch_size: int, seed: int) -> DataLoader:
        """Return batches (pictures, texts) to calibrate with; they carry no labels and are never evaluated.

        The set is drawn from `seed` alone and is the same for any number of processes: sample i goes to rank
        i % world size.

        Args:
            samples: Number of pictures over all processes; fewer, with a warning, where there are not as many.
            batch_size: Samples in a batch of one process.
            seed: Seed of the draw.

        Returns:
            Loader of (float (B, 3, H, W), int64 (B, L) or None where the pictures come without texts).

        Raises:
            ConfigError: `samples` or `batch_size` below 1.
            CalibrationError: No picture to calibrate with.
            DataError: A damaged picture, or one that is also evaluated.
        """
        if samples < 1 or batch_size < 1:
            raise ConfigError(f"Calibration needs at least 1 sample and batches of 1, got {samples} and {batch_size}.")
        foreign = self.calibration_root is not None
        chosen = choose_pictures(self._pool, self.pictures, samples, seed, self.on_error, foreign)
        pictures = PictureDataset([picture.path for picture in chosen], self.checked_preprocessing().image)
        data = _CalibrationDataset(pictures, self.calibration_texts(chosen, seed))
        return DataLoader(
            data,
            batch_size=batch_size,
            sampler=ShardSampler(data),
            num_workers=self.num_workers,
            collate_fn=_collate_calibration,
        )

    # What a report says

    def fingerprint(self) -> str:
        """Hash of everything that decides the float result: files (name, size, time), captions, labels, options."""
        digest = hashlib.sha256()
        header = {"data": type(self).__name__, "preprocessing": self.checked_preprocessing().fingerprint}
        digest.update(json.dumps({**header, "decoding": DECODING, **self.options()}, sort_keys=True).encode())
        for picture in self.pictures:
            status = os.stat(picture.path)
            row = (picture.path.name, status.st_size, status.st_mtime_ns, picture.captions, picture.label)
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()

    def sample_counts(self) -> dict[str, int]:
        """Return what is there to evaluate, what was skipped, and what left the evaluation for calibration.

        What may happen and did not, such as files that are not read, is left out.
        """
        counts = {"images": len(self.pictures), "skipped": self._skipped, "calibration_held_out": self._held_out}
        happened = {**(self.gaps or {}), "files_not_read": self.unread.total()}
        return {**counts, **{name: count for name, count in happened.items() if count}}

    def cut_counts(self, texts: Sequence[str]) -> dict[str, int]:
        """Return how many of the evaluated texts the model cuts, and at which length; empty where it cuts none."""
        preprocessing = self.checked_preprocessing()
        cut = count_cut_texts(preprocessing, texts)
        found = {"texts": len(texts), "texts_cut": cut, "context_length": preprocessing.context_length}
        return found if cut else {}

    def batch_limit(self) -> int | float:
        """Return the Trainer's limit on the batches of an evaluation: a number, or as float a share; 1.0 is all."""
        if self.trainer is None:
            return 1.0
        testing = self.trainer.state.fn == TrainerFn.TESTING
        limit: int | float = self.trainer.limit_test_batches if testing else self.trainer.limit_val_batches
        return limit

    def checked_preprocessing(self) -> Preprocessing:
        """Return the preprocessing.

        Raises:
            ConfigError: `setup` was not called.
        """
        if self.preprocessing is None:
            raise ConfigError("Call setup() of the data module first.")
        return self.preprocessing

    def _require_files(self) -> None:
        message = self.absent()
        if message:
            raise DataError(message)

    def _calibration_pool(self) -> list[Picture]:
        folder = self.calibration_root
        listed = self.read_train() if folder is None else self.read_folder(folder)
        there = are_files(picture.path for picture in listed)
        pool = [picture for picture, exists in zip(listed, there, strict=True) if exists]
        if folder is not None and not pool:
            raise DataError(f"--data.calibration_root {folder} holds no pictures; give a folder that does.")
        return pool


def task_of(data: LightningDataModule) -> object:
    """Return the task that a Trainer runs on a data module, or None without a Trainer."""
    return None if data.trainer is None else data.trainer.lightning_module


def offered_preprocessing(data: LightningDataModule) -> Preprocessing | None:
    """Return the preprocessing of the task that a Trainer runs on a data module, or None where there is none."""
    task = task_of(data)
    return task.preprocessing if isinstance(task, OffersPreprocessing) else None


if TYPE_CHECKING:

    def _fulfils(data: QuantDataModule) -> tuple[CalibrationData, CountedData, IdentifiedData]:
        """Let the type checker hold the class against its contracts."""
        return data, data, data


class _CalibrationDataset(Dataset):
    """Pairs (picture, tokens), or (picture, None)."""

    def __init__(self, pictures: PictureDataset, texts: Tensor | None) -> None:
        self.pictures = pictures
        self.texts = texts

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> CalibrationBatch:
        return self.pictures[index], None if self.texts is None else self.texts[index]


def _collate_calibration(samples: list[CalibrationBatch]) -> CalibrationBatch:
    images = torch.stack([image for image, _ in samples if image is not None])
    texts = [text for _, text in samples if text is not None]
    return images, torch.stack(texts) if texts else None


def describe_absent(title: str, root: Path, expected: Mapping[str, str], download: bool) -> str | None:
    """Say which of the expected files are absent and how to get them.

    Args:
        title: Name of the data set.
        root: Its folder.
        expected: Path below `root` -> where it comes from.
        download: `download: true` can fetch them.

    Returns:
        One message, or None where all are there.
    """
    absent = {path: source for path, source in expected.items() if not (root / path).exists()}
    if not absent:
        return None
    sources = list(dict.fromkeys(absent.values()))
    return (
        f"{title} needs {', '.join(expected)} in {root.absolute()}, but {', '.join(absent)} "
        f"{'is' if len(absent) == 1 else 'are'} absent. Set --data.root, or get the files: {'; '.join(sources)}"
        + (" (--data.download true does it)." if download else ".")
    )
