"""What the rooms ask of each other: typed, fulfilled by this project's classes, and refused in a sentence otherwise."""

import ast
from pathlib import Path

import pytest
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

from callbacks import Quantize
from datamodules import ImageNetV2, MiniCaptioning, MiniRetrieval, MiniVQA
from lit_clipq import contracts
from lit_clipq.contracts import (
    AnswerData,
    CalibrationData,
    CaptioningTask,
    ClassData,
    CountedData,
    IdentifiedData,
    MeasuredTask,
    OffersPreprocessing,
    OffersTemplates,
    OffersTokenizer,
    OffersWords,
    QuantizableTask,
    Quantizing,
    QuestionData,
    TrainingData,
    members,
    require,
)
from lit_clipq.errors import CalibrationError, ConfigError, DataError, LitClipqError
from lit_clipq.tasks import VQA, Captioning, ContrastiveTask, LanguageModelling, Retrieval, ZeroShotClassification
from lit_clipq.trainer import QuantTrainer
from tests.tasks.fakes import make_task

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ("trainer", "cli.py", "tasks", "analysis")
ROOMS = (*(f"lit_clipq/{name}" for name in LIBRARY), "datamodules", "callbacks")
FOREIGN = {
    "cluster_environment": "Lightning's strategies for one device have none",
    "decode": "of open_clip's tokenizers",
    "all_special_ids": "of open_clip's tokenizers",
    "_typehint": "of jsonargparse's actions, which not all have",
}
"""Members of other packages' objects that may be looked for by name, and why."""


def sources():
    rooms = [ROOT / room for room in ROOMS]
    found = [path for room in rooms for path in ([room] if room.is_file() else room.rglob("*.py"))]
    assert len(found) > len(rooms)
    return {path.relative_to(ROOT).as_posix(): path for path in found}


def is_class_name(node):
    """`type(x).__name__` or `x.__class__.__name__`."""
    if not (isinstance(node, ast.Attribute) and node.attr in ("__name__", "__qualname__")):
        return False
    of = node.value
    called = isinstance(of, ast.Call) and isinstance(of.func, ast.Name) and of.func.id == "type"
    return called or (isinstance(of, ast.Attribute) and of.attr == "__class__")


def probes(source):
    """Lines that look for a member by its name, or for a class by its name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
        if called == "hasattr":
            found.append((node.lineno, "hasattr"))
        elif called == "getattr" and len(node.args) == 3:
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else "?"
            found += [] if name in FOREIGN else [(node.lineno, f"getattr {name}")]
        compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        compared += [node.subject] if isinstance(node, ast.Match) else []
        if any(is_class_name(part) for side in compared for part in ast.walk(side)):
            found.append((node.lineno, "class name"))
    return found


def test_no_room_guesses_what_another_has():
    found = {name: probes(path.read_text(encoding="utf-8")) for name, path in sources().items()}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "hasattr(model, 'roots')",
        "getattr(data, 'answers', None)",
        "getattr(data, name, None)",
        "if type(model).__name__ == 'VQA': pass",
        "x = 'VQA' != model.__class__.__name__",
        "type(a).__name__.lower() in ('vqa', 'retrieval')",
        "match type(a).__name__:\n    case 'VQA': pass",
    ],
)
def test_the_search_for_guesses_finds_them(source):
    assert len(probes(source)) == 1


@pytest.mark.parametrize("source", ["getattr(a, name)", "f'got {type(a).__name__}'", "getattr(s, 'decode', None)"])
def test_the_search_for_guesses_leaves_the_rest(source):
    assert probes(source) == []


TASKS = {"retrieval": Retrieval, "classification": ZeroShotClassification}


@pytest.mark.parametrize("kind", TASKS.values(), ids=TASKS)
def test_tasks_can_be_quantized_and_measured(kind):
    task = make_task(kind)
    assert require(task, MeasuredTask) is task
    assert isinstance(task, QuantizableTask)
    assert not isinstance(task, CaptioningTask | OffersWords | OffersTokenizer)
    assert isinstance(task, OffersTemplates) == (kind is ZeroShotClassification)


def test_tasks_of_the_mini_world_offer_what_is_their_own():
    captioning, vqa = Captioning("mini-vit", preset="mini"), VQA("mini-vit", head="mini")
    assert isinstance(captioning, MeasuredTask)
    assert isinstance(captioning, CaptioningTask)
    assert isinstance(vqa, MeasuredTask)
    assert isinstance(vqa, OffersWords)
    assert not isinstance(vqa, CaptioningTask)
    assert isinstance(LanguageModelling(), OffersTokenizer)
    assert isinstance(ContrastiveTask("mini-vit"), OffersPreprocessing)
    assert not isinstance(ContrastiveTask("mini-vit"), QuantizableTask)


@pytest.mark.parametrize(
    ("data", "more"),
    [
        (lambda: MiniRetrieval(), ()),
        (lambda: MiniCaptioning(), ()),
        (lambda: ImageNetV2("data"), (ClassData,)),
        (lambda: MiniVQA(), (AnswerData, TrainingData)),
    ],
    ids=["retrieval", "captioning", "classification", "vqa"],
)
def test_data_modules_offer_what_is_their_own(data, more):
    data = data()
    assert all(isinstance(data, contract) for contract in (CalibrationData, CountedData, IdentifiedData, *more))
    others = {ClassData, AnswerData, TrainingData} - set(more)
    assert not any(isinstance(data, contract) for contract in others)


def test_questions_have_all_that_training_asks_for():
    assert [name for name in members(QuestionData) if name not in dir(MiniVQA)] == []


def test_the_callback_is_the_one_that_the_trainer_looks_for():
    assert isinstance(Quantize(), Quantizing)


class Bare(LightningModule):
    def validation_step(self, *_):
        """Lightning's own loop has something to run."""


@pytest.mark.parametrize(
    ("contract", "error", "told"),
    [
        (QuantizableTask, ConfigError, "a task with `roots`, .*, got Bare; derive it from `lit_clipq.tasks.ClipTask`"),
        (MeasuredTask, ConfigError, "a task with `roots`, .*, got Bare; derive it from `lit_clipq.tasks.ClipTask`"),
        (CalibrationData, CalibrationError, "a datamodule with `calibration_dataloader` .*, got Bare; use one of"),
        (ClassData, DataError, "a datamodule with `class_names` .*, got Bare; use a classification datamodule"),
        (QuestionData, ConfigError, "a datamodule with `answers`, .*, got Bare; use a VQA datamodule"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_lacks_a_member_is_refused_in_one_sentence(contract, error, told):
    with pytest.raises(error, match=f"^expected {told}") as caught:
        require(Bare(), contract)
    assert "\n" not in str(caught.value)
    with pytest.raises(error, match="got none; "):
        require(None, contract)


def test_a_single_missing_member_is_named():
    there = {name: lambda *_: None for name in members(QuantizableTask) if name != "offer_roots"}
    told = r"^expected a task with `offer_roots` \(`lit_clipq.contracts.QuantizableTask`\), got Almost;"
    with pytest.raises(ConfigError, match=told):
        require(type("Almost", (), there)(), QuantizableTask)


def test_every_contract_can_be_asked_for():
    """One without a sentence of its own is for `isinstance` alone."""
    assert all(issubclass(error, LitClipqError) for error, _, _ in contracts._REFUSALS.values())
    assert all(members(contract) for contract in contracts._REFUSALS)


def run(tmp_path, **quantize):
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "enable_model_summary": False}
    trainer = QuantTrainer(**options, callbacks=[Quantize(**quantize)], results=str(tmp_path / "results.json"))
    trainer.validate(Bare(), dataloaders=DataLoader([1, 2]), verbose=False)
    return trainer


def test_a_task_of_another_make_is_not_quantized(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a task with `roots`, .*, got Bare"):
        run(tmp_path, recipe="vanilla")
    assert list(tmp_path.iterdir()) == []


def test_a_task_of_another_make_is_evaluated_as_lightning_does(tmp_path):
    assert run(tmp_path).comparison is None


def test_data_without_calibration_pictures_is_refused():
    class Own(LightningDataModule):
        pass

    with pytest.raises(CalibrationError, match="got Own; use one of `datamodules`"):
        require(Own(), CalibrationData)
