"""What task, data module, quantizing callback and Trainer may ask of each other.

These four meet here and nowhere else. A contract is a `Protocol`: a class fulfils it by having its members and need not
derive from it. What every party has is called without looking; what only some have is a contract of its own, asked for
with `isinstance`. `require` takes an object of unknown make, such as a user's own LightningModule, and says in one
sentence what it lacks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from lit_clipq.errors import CalibrationError, ConfigError, DataError, LitClipqError

if TYPE_CHECKING:
    from PIL import Image

TowerOutputs = Mapping[str, Tensor]
"""What a tower made of one batch, and what scoring needs of the batch beside it (ids, labels), by name."""
CalibrationBatch = tuple[Tensor | None, Tensor | None]
"""Pictures float (B, 3, H, W) and tokens int64 (B, L); either may be absent."""
Split = Literal["train", "val"]
"""A part of a data set that is trained on or evaluated."""

RecipeT_co = TypeVar("RecipeT_co", covariant=True)
ReportT_co = TypeVar("ReportT_co", covariant=True)
RecipeT = TypeVar("RecipeT")
ContractT = TypeVar("ContractT")


# Values that pass from one to another


class Preprocessing(Protocol):
    """What makes a model's input."""

    @property
    def image(self) -> Callable[[Image.Image], Tensor]:
        """Turns a picture into float32 (3, H, W)."""

    @property
    def tokenizer(self) -> Callable[..., Tensor]:
        """Turns n texts into int64 (n, context length); a second argument `context_length` gives another length."""

    @property
    def context_length(self) -> int:
        """Tokens of a text, padding included."""

    @property
    def fingerprint(self) -> str:
        """Hash; equal fingerprints prepare equal inputs."""


class ModelDescription(Protocol):
    """The configuration that a model was built from."""

    @property
    def model(self) -> dict[str, Any]:
        """open_clip's configuration, as its JSON files have it."""

    @property
    def preprocess(self) -> dict[str, Any]:
        """Overrides of open_clip's default preprocessing."""


class LoadedModel(Protocol):
    """A float CLIP, and how it was loaded."""

    @property
    def model(self) -> nn.Module:
        """The network."""

    @property
    def preprocessing(self) -> Preprocessing:
        """What makes its input."""

    @property
    def name(self) -> str:
        """Name or path it was loaded by."""

    @property
    def pretrained(self) -> str | None:
        """Tag or file of its weights; None for random ones."""

    @property
    def config(self) -> ModelDescription | None:
        """What rebuilds it; None where that is not known."""

    @property
    def precision(self) -> str:
        """As in `lit_clipq.models.load_clip`."""


class ScoresBySample(Protocol):
    """One metric's score of every sample, in an order that is the same in every evaluation of the same data."""

    @property
    def values(self) -> Tensor:
        """float64 (n,), on the CPU."""

    @property
    def clusters(self) -> Tensor:
        """int64 (n,), on the CPU: the picture each sample belongs to."""


class Captioned(Protocol):
    """A picture with the caption that it was given."""

    @property
    def caption(self) -> str:
        """What was generated."""

    @property
    def references(self) -> Sequence[str]:
        """What people wrote."""

    @property
    def file_name(self) -> str:
        """Where the picture lies."""


class AskedQuestion(Protocol):
    """A question as a data module has it."""

    @property
    def question_id(self) -> int:
        """Its number."""

    @property
    def image_id(self) -> int:
        """The number of its picture."""

    @property
    def text(self) -> str:
        """What is asked."""

    @property
    def answers(self) -> Sequence[str]:
        """What the annotators answered."""

    @property
    def answer_type(self) -> str:
        """Kind of the answer."""


class Vocabulary(Protocol):
    """The answers to choose from."""

    @property
    def words(self) -> tuple[str, ...]:
        """Answers by index."""

    def encode_batch(self, answers: Sequence[Sequence[str]]) -> Tensor:
        """Return the soft targets float32 (B, V) of the annotators' answers to B questions."""


Collator = Callable[[Sequence[AskedQuestion]], Mapping[str, object]]
"""Makes a batch of questions."""


class EmbeddedSamples(Protocol):
    """The embeddings of an evaluation: pictures, texts, and which belong together."""

    @property
    def images(self) -> Tensor:
        """float32 (n, d)."""

    @property
    def image_ids(self) -> Tensor:
        """int64 (n,), ascending."""

    @property
    def texts(self) -> Tensor:
        """float32 (m, d)."""

    @property
    def text_ids(self) -> Tensor:
        """int64 (m,), ascending."""

    @property
    def pairs(self) -> Tensor:
        """int64 (p, 2), rows (position in `texts`, position in `images`)."""


class Stateful(Protocol):
    """A network, as far as its state goes."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return parameters and buffers by name."""


# Tasks


@runtime_checkable
class OffersPreprocessing(Protocol):
    """A task that knows how its data is to be prepared."""

    @property
    def preprocessing(self) -> Preprocessing:
        """What makes the input of its network."""


@runtime_checkable
class OffersTokenizer(Protocol):
    """A task whose language model has a tokenizer for the data module to use."""

    @property
    def tokenizer(self) -> Any:
        """A transformers tokenizer."""


@runtime_checkable
class OffersTemplates(Protocol):
    """A task that puts class names into prompts."""

    @property
    def templates(self) -> Sequence[str] | None:
        """Prompts with {} for the class name; None leaves them to the data module."""


@runtime_checkable
class OffersWords(Protocol):
    """A task whose head brings the answers it chooses from."""

    @property
    def words(self) -> tuple[str, ...]:
        """Answers by index; empty where there is no head yet."""


@runtime_checkable
class QuantizableTask(Protocol):
    """A task whose networks can be calibrated and quantized; `lit_clipq.tasks.ClipTask` is one.

    The task does not know whether they are: the callback asks for `roots`, changes them in place and says so in
    `variant`.
    """

    variant: str
    """What was done to the networks, in words; `float` at first, set by whoever does it."""

    def roots(self) -> dict[str, nn.Module]:
        """Return the networks that may be quantized, by name."""

    def calibration_forward(self, batch: CalibrationBatch) -> Mapping[str, Tensor]:
        """Run the networks on a calibration batch and return the outputs that matter, by name, with gradients."""

    def offer_roots(self, include: Sequence[str]) -> None:
        """Learn which patterns of layer names the run has, before `roots` is asked for."""

    def unused_layers(self) -> tuple[str, ...]:
        """Return shell patterns of the layers in `roots` that no output of `calibration_forward` depends on."""

    def prepare_weights(self) -> None:
        """Load what an evaluation needs and the constructor has not loaded."""

    @property
    def loaded(self) -> LoadedModel:
        """The CLIP as it was loaded, for a saved model to name its origin."""

    @property
    def device(self) -> torch.device:
        """Where calibration batches go."""

    @property
    def preprocessing(self) -> Preprocessing:
        """What makes the input of the networks."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return parameters and buffers by name; Lightning's."""


@runtime_checkable
class MeasuredTask(QuantizableTask, Protocol):
    """A task whose float and quantized evaluations can be compared."""

    @property
    def model_name(self) -> str:
        """Model name or path, as the user gave it."""

    @property
    def pretrained(self) -> str | None:
        """Tag or file of the weights; None for random ones."""

    @property
    def hparams(self) -> Mapping[str, object]:
        """The options that the task was made with, by name."""

    def results(self) -> dict[str, float]:
        """Return the metrics of the last evaluation, as fractions, by name; the same on every rank."""

    def sample_scores(self) -> Mapping[str, ScoresBySample]:
        """Return the scores of every sample in the last evaluation, by metric name; the same on every rank."""

    def sample_counts(self) -> Mapping[str, int]:
        """Return the number of samples by kind in the last evaluation, over all ranks."""


@runtime_checkable
class EncodingTask(Protocol):
    """A task that asks its CLIP for embeddings and nothing else, so that any encoder can take its place."""

    def encoded_by(self, encoder: Any, /) -> AbstractContextManager[None]:
        """Let an encoder with `encode_image` and `encode_text` take the place of the CLIP while the context is open."""


@runtime_checkable
class EmbeddingTask(Protocol):
    """A task that compares pictures with texts by their embeddings."""

    keep_embeddings: bool
    """Whether the coming evaluations keep what `embeddings` returns; set by whoever asks for them."""

    def embeddings(self) -> EmbeddedSamples:
        """Return those of the evaluation at hand, of all ranks, before its metric is computed; a collective call."""


@runtime_checkable
class TwoTowerTask(Protocol):
    """A task whose towers, `vision` and `text`, do not meet before what each has made is scored."""

    @property
    def uses_reference(self) -> bool:
        """Whether scores compare with what the float towers made."""

    def run_towers(self, towers: Collection[str]) -> None:
        """Let the next evaluation run these towers only, keep what they make, and score nothing."""

    def kept_outputs(self) -> Mapping[str, list[TowerOutputs]]:
        """Return what the towers made in the last evaluation, by tower and batch; of this process."""

    def score_towers(self, outputs: Mapping[str, Sequence[TowerOutputs]]) -> None:
        """Score as an evaluation whose towers made this would."""

    def keep_reference(self) -> None:
        """Compare what is scored from now on with what the towers made in the last evaluation."""

    def forget_reference(self) -> None:
        """Compare no more; an evaluation of the float network comes next."""


@runtime_checkable
class CaptioningTask(Protocol):
    """A task that writes captions while it evaluates."""

    def begin_pass(self, path: Path, run: str, *, resume: bool) -> None:
        """Keep the captions of the next evaluation in `path`; `run` is a hash of everything they depend on."""

    def captioned(self) -> Mapping[int, Captioned]:
        """Return the pictures of the last evaluation by id, the same on every rank."""


# Data modules


@runtime_checkable
class CalibrationData(Protocol):
    """Data to calibrate with; `datamodules.QuantDataModule` is that and the two that follow."""

    def calibration_dataloader(self, samples: int, batch_size: int, seed: int) -> Iterable[CalibrationBatch]:
        """Return this process's batches of `samples` pictures (over all processes) that are never evaluated."""


@runtime_checkable
class CountedData(Protocol):
    """Data that says how much of it there is."""

    def sample_counts(self) -> Mapping[str, int]:
        """Return what is evaluated, and what was left out, by kind."""


@runtime_checkable
class NamedSamples(Protocol):
    """Data whose pictures and texts can be shown."""

    def picture_file(self, image_id: int) -> Path:
        """Return the file of an evaluated picture."""

    def text_of(self, text_id: int) -> str:
        """Return an evaluated text, a caption or the name of a class."""


@runtime_checkable
class IdentifiedData(Protocol):
    """Data that can be told apart from other data, so that measurements on it may be remembered."""

    preprocessing: Preprocessing | None
    """What makes the model's input; set before `setup` where no Trainer offers it."""

    def prepare_data(self) -> None:
        """Fetch or write what is absent; Lightning's."""

    def setup(self, stage: str) -> None:
        """List and check the data; Lightning's."""

    def fingerprint(self) -> str:
        """Return a hash of everything that decides the float result, after `setup`."""


@runtime_checkable
class ClassData(Protocol):
    """Pictures of named classes."""

    @property
    def class_names(self) -> Sequence[str]:
        """Names in the order of the labels."""


@runtime_checkable
class TextData(Protocol):
    """Pictures that may come with texts."""

    @property
    def has_texts(self) -> bool:
        """Whether there are any."""


@runtime_checkable
class FeatureData(Protocol):
    """Questions about pictures, whose features can be computed once and kept."""

    @property
    def answers(self) -> Vocabulary:
        """The answers to choose from, after `setup`."""

    def questions_of(self, split: Split) -> Sequence[AskedQuestion]:
        """Return the questions of a split."""

    def image_ids_of(self, split: Split) -> Sequence[int]:
        """Return the ids of its distinct pictures."""

    def picture_items(self, split: Split) -> Sequence[object]:
        """Return what tells each of these pictures from any other, as plain values."""

    def picture_batches(self, split: Split, numbers: Sequence[int]) -> Iterable[Tensor]:
        """Yield the preprocessed pictures of these positions, float (B, 3, H, W), in order."""


@runtime_checkable
class AnswerData(Protocol):
    """Data that reports by the answers of a trained head."""

    def use_answers(self, words: Sequence[str]) -> None:
        """Take the vocabulary of a trained head in place of its own."""


@runtime_checkable
class QuestionData(AnswerData, FeatureData, Protocol):
    """Questions that a head can be trained on."""

    def use_collators(self, collators: Mapping[Split, Collator]) -> None:
        """Make the batches of these splits by functions of the task: of cached features, say."""


@runtime_checkable
class TrainingData(Protocol):
    """Data that says how much of it was trained on."""

    def training_counts(self) -> Mapping[str, int]:
        """Return what is trained on, and what was left out, by kind, after `setup("fit")`."""


# Callback and Trainer


class RunningTrainer(Protocol):
    """What the callback asks of a Trainer before anything is evaluated."""

    @property
    def precision(self) -> str:
        """Of weights and activations, as `--trainer.precision` names it."""

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that writes files."""


@runtime_checkable
class Observing(Protocol):
    """A callback that looks at the float and the quantized evaluation, and adds to the results.

    The float evaluation then runs, also where its measurement is remembered.
    """

    section: ClassVar[str]
    """Under which name the results hold what it saw."""

    def seen(self) -> Mapping[str, Any] | None:
        """Return what it saw of the last float and quantized evaluation, as plain values; None if nothing."""


@runtime_checkable
class Quantizing(Protocol[RecipeT_co, ReportT_co]):
    """The callback that quantizes, as far as a Trainer needs to know it; `callbacks.Quantize` is one."""

    seed: int
    """Of the choice of calibration samples."""
    paused: bool
    """Whether the coming pass is the float one; set by the Trainer."""
    dry_run: bool
    """Whether the run ends once the plan is made."""
    swept: bool
    """Whether a sweep quantizes, and this callback leaves the network alone."""

    @property
    def recipe(self) -> RecipeT_co | None:
        """The method with its widths; None leaves the network float."""

    @property
    def report(self) -> ReportT_co | None:
        """What was quantized, once it was."""

    @property
    def active(self) -> bool:
        """Whether the run quantizes anything."""

    def reset(self) -> None:
        """Give the network back in float, if it was quantized by an earlier run.

        Raises:
            ConfigError: If the float weights are gone.
        """

    def fingerprint(self) -> str:
        """Return everything that decides the quantized network beside model and data, as text."""

    def preflight(self, trainer: RunningTrainer, task: QuantizableTask, /, *, weights_are_final: bool) -> None:
        """Refuse what cannot be saved or loaded in the end, before anything is evaluated."""

    def quantize_now(self, trainer: Any, task: Any, /) -> None:
        """Quantize, or load the quantized model, outside of any loop."""


@runtime_checkable
class Calibrating(Protocol[RecipeT]):
    """The callback that quantizes, as far as a sweep needs to know it; `callbacks.Quantize` is one."""

    seed: int
    """Of the choice of calibration samples."""

    @property
    def recipe(self) -> RecipeT | None:
        """The method with its widths; None leaves the network float."""

    def at(self, **changes: Any) -> Calibrating[RecipeT]:
        """Return a callback with other options, by name."""

    def fingerprint(self) -> str:
        """Return everything that decides the quantized network beside model and data, as text."""

    def recipe_for(self, task: QuantizableTask, /) -> RecipeT:
        """Return the recipe without what the task has and does not use."""

    def calibrate(
        self, trainer: Any, task: QuantizableTask, recipes: Sequence[RecipeT], progress: Callable[[str, int, int], None]
    ) -> list[Any]:
        """Calibrate the networks of a task for several recipes at once; returns one quantized form for each."""

    def check_sweepable(self) -> None:
        """Refuse options that mean nothing for a sweep.

        Raises:
            ConfigError: Names the option.
        """


# Objects of unknown make

_TASK = "derive it from `lit_clipq.tasks.ClipTask`"
_REFUSALS: dict[type, tuple[type[LitClipqError], str, str]] = {
    QuantizableTask: (ConfigError, "a task", _TASK),
    MeasuredTask: (ConfigError, "a task", _TASK),
    EncodingTask: (ConfigError, "a task", "derive it from `lit_clipq.tasks.task.EncodingClipTask`"),
    CalibrationData: (CalibrationError, "a datamodule", "use one of `datamodules`"),
    ClassData: (DataError, "a datamodule", "use a classification datamodule"),
    QuestionData: (ConfigError, "a datamodule", "use a VQA datamodule"),
}


def require(given: object, contract: type[ContractT]) -> ContractT:
    """Take an object for what a contract asks; for objects that a user may have written.

    Args:
        given: A task or a data module, or None.
        contract: `QuantizableTask`, `MeasuredTask`, `CalibrationData`, `ClassData` or `QuestionData`.

    Returns:
        The object itself.

    Raises:
        ConfigError: A task that lacks members, or data without questions; names what is lacking.
        CalibrationError: Data that lacks `calibration_dataloader`.
        DataError: Data that lacks `class_names`.
    """
    if isinstance(given, contract):
        return given
    error, wanted, remedy = _REFUSALS[contract]
    there = set(dir(given))
    absent = [f"`{name}`" for name in members(contract) if name not in there]
    told = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more members" if len(absent) > 3 else "")
    kind = "none" if given is None else type(given).__name__
    raise error(f"expected {wanted} with {told} (`lit_clipq.contracts.{contract.__name__}`), got {kind}; {remedy}")


def members(contract: type) -> list[str]:
    """List the names that a contract asks for, inherited ones first."""
    bases = [base for base in reversed(contract.__mro__) if getattr(base, "_is_protocol", False)]
    named = [name for base in bases for name in (*vars(base), *inspect.get_annotations(base))]
    return [name for name in dict.fromkeys(named) if not name.startswith("_")]
