"""Visual question answering: pictures, questions and soft targets, as VQA v2 publishes them."""

import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.calibration_split import caption_tokens
from datamodules.captions import find_file, read_captioned_folder
from datamodules.datamodule import QuantDataModule, describe_absent, task_of
from datamodules.download import (
    COCO_TRAIN_2014,
    COCO_VAL_2014,
    VQA_TRAIN_ANNOTATIONS,
    VQA_TRAIN_QUESTIONS,
    VQA_VAL_ANNOTATIONS,
    VQA_VAL_QUESTIONS,
    Archive,
)
from datamodules.images import Picture, PictureDataset, list_pictures, usable_pictures
from datamodules.sampler import ResumableLoader, ShuffledBatches, shard
from datamodules.vqa_files import Question, read_questions
from lit_clipq.contracts import AskedQuestion, Collator, OffersWords, Preprocessing, QuestionData, Split, TrainingData
from lit_clipq.errors import ConfigError
from lit_clipq.metrics.functional import AnswerVocabulary
from lit_clipq.pictures import load_rgb

logger = logging.getLogger(__name__)


class VQADataModule(QuantDataModule):
    """Questions about pictures, with soft targets over a vocabulary of answers.

    `setup("validate")` reads the evaluation; `setup("fit")` and `setup()` read the training split too. Afterwards
    `answers` is the vocabulary, `train_questions` and `val_questions` are the questions, picture after picture, and
    `pictures_of(split)` the distinct pictures they ask about. Calibration pairs pictures with questions about them.

    Args:
        root: Folder of the data set.
        vocabulary: JSON file of a saved `AnswerVocabulary`; by default it is counted over train and val.
        min_answer_count: The vocabulary holds the answers that are the most common one of at least this many
            questions. 9 is MCAN's rule (more than 8), 3,129 answers on VQA v2.
        train_batch_size: Questions in a training batch, over all processes together.
        train_limit: Train on the first N usable pictures only; null for all. `limit` is that of the evaluation.
        seed: Seed of the order of training.
        **kwargs: See `QuantDataModule`; `batch_size` counts questions of the evaluation.

    Raises:
        ConfigError: An option outside its range.
    """

    calibration_split = "train"

    def __init__(
        self,
        root: str,
        vocabulary: str | None = None,
        min_answer_count: int = 9,
        train_batch_size: int = 64,
        train_limit: int | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, **kwargs)
        for name, value in (
            ("min_answer_count", min_answer_count),
            ("train_batch_size", train_batch_size),
            ("train_limit", train_limit),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"--data.{name} must be at least 1, got {value}.")
        self.vocabulary = Path(vocabulary).expanduser() if vocabulary else None
        self.min_answer_count = min_answer_count
        self.train_batch_size = train_batch_size
        self.train_limit = train_limit
        self.seed = seed
        self.train_questions: list[Question] = []
        self.val_questions: list[Question] = []
        self.collators: dict[Split, Collator] = {}
        """What makes batches of a split's questions in place of `QuestionBatch`, for example of cached features."""
        self._answers: AnswerVocabulary | None = None
        self._train_pictures: list[Picture] = []
        self._train_skipped = 0
        self._read: dict[str, list[Question]] = {}
        self._cut: dict[str, int] = {}

    # What a data set says about itself

    @abstractmethod
    def read_split(self, split: str) -> list[Question]:
        """Read the questions of "train" or "val", or of `calibration_split`; empty where its files are absent."""

    @abstractmethod
    def picture_paths(self, split: str, image_ids: Sequence[int]) -> list[Path]:
        """Return the file of each picture of a split; the files need not exist."""

    def count_answers(self) -> AnswerVocabulary:
        """Count the vocabulary over all questions of train and val, whether or not their pictures are there."""
        common = (question.common_answer for split in ("train", "val") for question in self._questions(split))
        return AnswerVocabulary.from_common_answers(common, self.min_answer_count)

    def read_evaluation(self) -> list[Picture]:
        """List the pictures of val with their questions."""
        return self._listed("val")

    def read_train(self) -> list[Picture]:
        """List the pictures that calibrate, with their questions."""
        return self._listed(self.calibration_split)

    def read_folder(self, folder: Path) -> list[Picture]:
        """List the pictures of a calibration folder, with captions where its layout is one of COCO's or Flickr's."""
        return read_captioned_folder(folder, self.gaps_elsewhere()) or [Picture(path) for path in list_pictures(folder)]

    def calibration_texts(self, pictures: Sequence[Picture], seed: int) -> Tensor | None:  # noqa: ARG002
        """Return the tokens of a question about each picture, or None where calibration pictures have no texts."""
        return caption_tokens(pictures, self.checked_preprocessing())

    def options(self) -> dict[str, Any]:
        """Add the vocabulary, the questions and their answers."""
        digest = hashlib.sha256()
        for question in self.val_questions:
            digest.update(json.dumps(vars(question), sort_keys=True).encode())
        words = hashlib.sha256(json.dumps(self.answers.words).encode())
        return {**super().options(), "questions": digest.hexdigest(), "vocabulary": words.hexdigest()}

    # Lightning

    def setup(self, stage: str | None = None) -> None:
        """Read questions, vocabulary and pictures; questions go with their pictures where these are skipped.

        Raises:
            DataError: Absent, damaged or contradictory data.
            ConfigError: A Trainer is to train on it, and batches cannot be made; see `train_dataloader`.
        """
        super().setup(stage)
        if self._answers is None:
            saved = self.vocabulary
            self._answers = self.count_answers() if saved is None else AnswerVocabulary.load(saved)
            self.val_questions = self._about("val", self.pictures)
            self._log_coverage("val", self.val_questions)
            self._cut = self.cut_counts([question.text for question in self.val_questions])
        if stage in (None, TrainerFn.FITTING) and not self._train_pictures:
            listed = self._listed("train")
            self._train_pictures, self._train_skipped = usable_pictures(listed, self.on_error, self.train_limit)
            if self._train_skipped:
                logger.warning(
                    "%d missing or damaged training pictures were skipped, %d are left",
                    *(self._train_skipped, len(self._train_pictures)),
                )
            self.train_questions = self._about("train", self._train_pictures)
            self._log_coverage("train", self.train_questions)
        if self.fits():
            self._train_batches()  # what cannot be trained on is told before features are computed
        self._read.clear()

    @property
    def answers(self) -> AnswerVocabulary:
        """The vocabulary.

        Raises:
            ConfigError: `setup` was not called.
        """
        if self._answers is None:
            raise ConfigError("Call setup() of the data module first.")
        return self._answers

    def pictures_of(self, split: Split) -> list[Picture]:
        """Return the distinct pictures of a split; a picture's `captions` are the questions about it."""
        return self._train_pictures if split == "train" else self.pictures

    def image_ids_of(self, split: Split) -> list[int]:
        """Return the image id of each of `pictures_of(split)`."""
        return list(dict.fromkeys(question.image_id for question in self.questions_of(split)))

    def picture_items(self, split: Split) -> list[Any]:
        """Return what tells each of `pictures_of(split)` from any other: id, name, size and time of the file."""
        items = []
        for image_id, picture in zip(self.image_ids_of(split), self.pictures_of(split), strict=True):
            status = picture.path.stat()
            items.append([image_id, picture.path.name, status.st_size, status.st_mtime_ns])
        return items

    def picture_batches(self, split: Split, numbers: Sequence[int]) -> Iterable[Tensor]:
        """Return batches float (B, 3, H, W) of the pictures with these numbers in `pictures_of(split)`, in order."""
        pictures = self.pictures_of(split)
        data = PictureDataset([pictures[number].path for number in numbers], self.checked_preprocessing().image)
        return DataLoader(data, batch_size=self.batch_size, num_workers=self.num_workers)

    def use_answers(self, words: Sequence[str]) -> None:
        """Take the vocabulary of a trained head in place of the one that was counted."""
        if self.answers.words != tuple(words):
            self._answers = AnswerVocabulary(tuple(words), (0,) * len(words), 0)

    def use_collators(self, collators: Mapping[Split, Collator]) -> None:
        """Make the batches of these splits by functions of the task; none goes back to `QuestionBatch`."""
        self.collators = dict(collators)

    def train_dataloader(self) -> DataLoader:
        """Return shuffled batches of this process; see `QuestionBatch`. The last, smaller batch is left out.

        Raises:
            ConfigError: No training questions, or fewer than a batch.
        """
        return ResumableLoader(
            self.train_questions,
            self._train_batches(),
            num_workers=self.num_workers,
            collate_fn=self._collate("train"),
        )

    def _train_batches(self) -> ShuffledBatches:
        processes = shard()[1]
        if self.train_batch_size % processes:
            raise ConfigError(
                f"--data.train_batch_size {self.train_batch_size} cannot be divided among {processes} processes; "
                "give a multiple of them."
            )
        batches = ShuffledBatches(len(self.train_questions), self.train_batch_size // processes, self.seed)
        if not len(batches):
            raise ConfigError(
                f"Training needs a batch of {self.train_batch_size} questions, got {len(self.train_questions)} "
                "questions; call setup('fit'), or make --data.train_batch_size smaller."
            )
        return batches

    def val_dataloader(self) -> DataLoader:
        """Return this process's share of the evaluation; see `QuestionBatch`."""
        loader = self.loader(self.val_questions, collate_fn=self._collate("val"))
        loader.generator = torch.Generator()  # an evaluation between epochs leaves the global random state alone
        return loader

    def sample_counts(self) -> dict[str, int]:
        """Return the counts of pictures, questions and answers to choose from, of what is out of reach or cut."""
        return {**super().sample_counts(), **self._reach(self.val_questions), **self._cut}

    def training_counts(self) -> dict[str, int]:
        """Return the same of the training split, after `setup("fit")`."""
        counts = {"images": len(self._train_pictures), "skipped": self._train_skipped}
        return {**counts, **self._reach(self.train_questions)}

    def _reach(self, questions: Sequence[Question]) -> dict[str, int]:
        reached = self.answers.coverage(question.answers for question in questions)
        return {
            "questions": len(questions),
            "vocabulary": len(self.answers),
            "questions_outside_vocabulary": reached.questions_outside,
            "answers_outside_vocabulary": reached.answers_outside,
        }

    def fits(self) -> bool:
        """Tell whether a Trainer is training with this data module."""
        return self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING

    def _evaluates(self) -> bool:
        """Tell whether a Trainer is evaluating a task that has a vocabulary of its own."""
        evaluating = self.trainer is not None and self.trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING)
        return evaluating and isinstance(task_of(self), OffersWords)

    def questions_of(self, split: Split) -> list[Question]:
        """Return the questions of a split."""
        return self.train_questions if split == "train" else self.val_questions

    def _questions(self, split: str) -> list[Question]:
        if split not in self._read:
            self._read[split] = self.read_split(split)
        return self._read[split]

    def _by_picture(self, split: str) -> dict[Path, list[Question]]:
        """Questions by picture, in the order of the question file."""
        by_id: dict[int, list[Question]] = {}
        for question in self._questions(split):
            by_id.setdefault(question.image_id, []).append(question)
        return dict(zip(self.picture_paths(split, list(by_id)), by_id.values(), strict=True))

    def _listed(self, split: str) -> list[Picture]:
        rows = self._by_picture(split).items()
        return [Picture(path, tuple(question.text for question in asked)) for path, asked in rows]

    def _about(self, split: str, pictures: Sequence[Picture]) -> list[Question]:
        by_picture = self._by_picture(split)
        return [question for picture in pictures for question in by_picture[picture.path]]

    def _collate(self, split: Split) -> Collator:
        if split in self.collators:
            return self.collators[split]
        paths = {i: p.path for i, p in zip(self.image_ids_of(split), self.pictures_of(split), strict=True)}
        return QuestionBatch(paths, self.checked_preprocessing(), self.answers)

    def _log_coverage(self, split: str, questions: Sequence[Question]) -> None:
        reached = self.answers.coverage(question.answers for question in questions)
        logger.info(
            "%s: %d questions; %d answers to choose from, %d of %d given answers are not among them, "
            "%d questions have none",
            *(split, reached.questions, len(self.answers)),
            *(reached.answers_outside, reached.answers, reached.questions_outside),
        )


if TYPE_CHECKING:

    def _fulfils(data: VQADataModule) -> tuple[QuestionData, TrainingData]:
        """Let the type checker hold the class against its contracts."""
        return data, data


class QuestionBatch:
    """Collate questions; each distinct picture of a batch is decoded once.

    Yields `images` float (B, 3, H, W), `texts` int64 (B, L), `targets` float32 (B, V) soft, `question_ids` and
    `image_ids` int64 (B,), `answers` list[list[str]] and `answer_types` list[str].

    Args:
        paths: Picture by image id.
        preprocessing: Of the model.
        answers: Vocabulary of the targets.
    """

    def __init__(self, paths: dict[int, Path], preprocessing: Preprocessing, answers: AnswerVocabulary) -> None:
        self.paths = paths
        self.preprocessing = preprocessing
        self.answers = answers

    def __call__(self, questions: Sequence[AskedQuestion]) -> dict[str, Any]:
        """Return the batch.

        Raises:
            DataError: A picture that cannot be decoded.
        """
        image_ids = [question.image_id for question in questions]
        decoded = {i: self.preprocessing.image(load_rgb(self.paths[i])) for i in dict.fromkeys(image_ids)}
        return {
            "images": torch.stack([decoded[image_id] for image_id in image_ids]),
            "texts": self.preprocessing.tokenizer([question.text for question in questions]),
            "targets": self.answers.encode_batch([question.answers for question in questions]),
            "question_ids": torch.tensor([question.question_id for question in questions]),
            "image_ids": torch.tensor(image_ids),
            "answers": [list(question.answers) for question in questions],
            "answer_types": [question.answer_type for question in questions],
        }


FILES: dict[str, tuple[tuple[str, Archive], tuple[str, Archive]]] = {
    "train": (
        ("v2_OpenEnded_mscoco_train2014_questions.json", VQA_TRAIN_QUESTIONS),
        ("v2_mscoco_train2014_annotations.json", VQA_TRAIN_ANNOTATIONS),
    ),
    "val": (
        ("v2_OpenEnded_mscoco_val2014_questions.json", VQA_VAL_QUESTIONS),
        ("v2_mscoco_val2014_annotations.json", VQA_VAL_ANNOTATIONS),
    ),
}
PICTURES: dict[str, Archive] = {"train": COCO_TRAIN_2014, "val": COCO_VAL_2014}


class VQAv2(VQADataModule):
    """VQA v2 (arXiv:1612.00837): training on train2014, evaluation on the 214,354 questions about val2014.

    Calibration pictures are those of train2014, as far as they are on disk.

    Args:
        root: Folder with the official question and annotation files (`v2_OpenEnded_mscoco_val2014_questions.json`,
            `v2_mscoco_val2014_annotations.json`, the same for train2014), bare, as `.json.gz` or `.json.zip`, or in the
            official archives; in the folder itself or below it in `vqa` or `annotations`.
        images_root: Folder with `train2014/` and `val2014/`; by default `root`.
        **kwargs: See `VQADataModule` and `QuantDataModule`.
    """

    def __init__(self, root: str, images_root: str | None = None, **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)
        self.images_root = Path(images_root).expanduser() if images_root else self.root

    def archives(self) -> tuple[Archive, ...]:
        """Official archives of what is needed and not there; pictures only where they belong in `root`."""
        files = [archive for split in self._splits() for name, archive in FILES[split] if self._file(name) is None]
        pictures = [PICTURES[split] for split in ("train", "val") if split == "val" or self.fits()]
        return (*files, *(pictures if self.images_root == self.root else ()))

    def absent(self) -> str | None:
        """Say which files are absent and where they come from."""
        expected = {}
        for split in self._splits():
            for name, archive in FILES[split]:
                found = self._file(name)
                expected[name if found is None else str(found.absolute())] = archive.url
        for split in ("train", "val") if self.fits() else ("val",):
            expected[str(self.images_root.absolute() / f"{split}2014") + "/"] = PICTURES[split].url
        return describe_absent("VQA v2", self.root, expected, download=True)

    def read_split(self, split: str) -> list[Question]:
        """Read the questions of a split; empty where its files are absent."""
        questions, annotations = (self._file(name) for name, _ in FILES[split])
        if questions is None or annotations is None:
            return []
        return read_questions(questions, annotations, self.gaps if split == "val" else self.gaps_elsewhere())

    def picture_paths(self, split: str, image_ids: Sequence[int]) -> list[Path]:
        """Return COCO's file of each picture."""
        folder = self.images_root / f"{split}2014"
        return [folder / f"COCO_{split}2014_{image_id:012d}.jpg" for image_id in image_ids]

    def _splits(self) -> tuple[str, ...]:
        """Splits whose questions are needed: both, to train or to count the vocabulary (a trained head has its own)."""
        return ("val",) if (self.vocabulary is not None and not self.fits()) or self._evaluates() else ("train", "val")

    def _file(self, name: str) -> Path | None:
        archive = next(a.name for files in FILES.values() for n, a in files if n == name)
        return find_file(self.root, (name, f"{name}.gz", f"{name}.zip", archive))
