"""N is what was evaluated: limits on batches in every task, run as a user runs them on the mini world."""

import json
from dataclasses import replace

import pytest
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from datamodules import MiniRetrieval
from lit_clipq.analysis.counts import describe_counts, evaluated_counts
from lit_clipq.cli import SPAWNING, Parser, main, whole_numbers_first
from lit_clipq.errors import ConfigError
from lit_clipq.models import load_clip
from lit_clipq.trainer import QuantTrainer
from tests.tasks.vqa_runs import write_data

FLOAT = ["--quantize.recipe", "null", "--trainer.float_cache", "false", "--trainer.enable_progress_bar", "false"]
TASKS = {  # configuration: options, what counts the evaluation, N with a limit of one batch of 8, N without
    "mini/classification": (["--model.templates", "simple"], "images", 8, 40),
    "mini/retrieval": ([], "images", 8, 40),
    "mini/vqa": (["--model.head_weights", "mini"], "questions", 8, 120),
    "mini/captioning": (["--model.guided", "false", "--model.max_tokens", "3"], "images", 8, 40),
}
LIMITS = {
    "limit_val_batches": ["--trainer.limit_val_batches", "1"],
    "share": ["--trainer.limit_val_batches", "0.21"],  # of 5 batches, or 15
    "fast_dev_run": ["--trainer.fast_dev_run", "true"],
    "overfit_batches": ["--trainer.overfit_batches", "1"],
}


def samples(tmp_path, config, *options, verb="validate"):
    path = tmp_path / "results.json"
    arguments = [verb, "--config", config, *FLOAT, *TASKS[config][0], "--data.batch_size", "8", "--data.limit", "40"]
    assert main([*arguments, "--results", str(path), *options]) == 0
    return json.loads(path.read_text())["samples"]


@pytest.mark.parametrize(
    "limit",
    [limit if limit == "limit_val_batches" else pytest.param(limit, marks=pytest.mark.slow) for limit in LIMITS],
)
@pytest.mark.parametrize("config", TASKS)
def test_n_is_what_a_limit_lets_through(tmp_path, config, limit, capsys):
    _, name, limited, everything = TASKS[config]
    expected = 24 if (config, limit) == ("mini/vqa", "share") else limited
    found = samples(tmp_path, config, *LIMITS[limit])
    assert found[name] == expected
    assert found[f"{name}_not_evaluated"] == everything - expected
    assert f"N: {expected} {name}" in capsys.readouterr().out


def test_one_batch_is_one_batch_in_whatever_order_typing_gives_the_types():
    parser = Parser(exit_on_error=False)
    parser.add_argument("--limit", type=float | int | None)
    assert isinstance(parser.parse_args(["--limit", "1"]).limit, float)  # all of the batches
    whole_numbers_first(parser)
    assert [type(parser.parse_args(["--limit", given]).limit) for given in ("1", "0.5", "null")] == [
        int,
        float,
        type(None),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("config", TASKS)
def test_without_a_limit_n_is_the_data(tmp_path, config):
    _, name, _, everything = TASKS[config]
    found = samples(tmp_path, config)
    assert found[name] == everything
    assert not any(key.endswith("_not_evaluated") for key in found)


def test_a_limit_on_test_batches_counts_in_test_only(tmp_path):
    assert samples(tmp_path, "mini/classification", "--trainer.limit_test_batches", "2", verb="test")["images"] == 16
    assert samples(tmp_path, "mini/classification", "--trainer.limit_test_batches", "2")["images"] == 40


@pytest.mark.slow
def test_a_limit_on_batches_of_retrieval_is_a_limit_on_pictures(tmp_path):
    limited = tmp_path / "limited.json"
    fewer = tmp_path / "fewer.json"
    common = ["validate", "--config", "mini/retrieval", *FLOAT, "--data.batch_size", "8"]
    assert main([*common, "--trainer.limit_val_batches", "2", "--results", str(limited)]) == 0
    assert main([*common, "--data.limit", "16", "--results", str(fewer)]) == 0
    first, second = (json.loads(path.read_text()) for path in (limited, fewer))
    assert first["metrics"]["float"] == second["metrics"]["float"]
    assert [first["samples"][name] for name in ("images", "captions")] == [16, 80]


@pytest.mark.parametrize("verb", ["validate", "test"])
@pytest.mark.parametrize("limit", ["0", "0.0"])
def test_nothing_to_evaluate_is_one_sentence(tmp_path, capsys, verb, limit):
    flag = "--trainer.limit_val_batches" if verb == "validate" else "--trainer.limit_test_batches"
    path = tmp_path / "results.json"
    assert main([verb, "--config", "mini/classification", *FLOAT, flag, limit, "--results", str(path)]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith(f"error: {flag} 0 leaves nothing to evaluate")
    assert not path.exists()


def test_a_share_below_one_batch_is_one_sentence(tmp_path, capsys):
    arguments = ["validate", "--config", "mini/classification", *FLOAT, "--trainer.limit_val_batches", "0.001"]
    assert main([*arguments, "--results", str(tmp_path / "results.json")]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ")
    assert "0.001" in told


def test_cider_of_one_picture_says_why_it_is_zero(tmp_path, caplog):
    path = tmp_path / "results.json"
    options = [*TASKS["mini/captioning"][0], "--data.limit", "1", "--data.batch_size", "1"]
    assert main(["validate", "--config", "mini/captioning", *FLOAT, *options, "--results", str(path)]) == 0
    assert json.loads(path.read_text())["metrics"]["float"]["cider"] == 0
    assert "CIDEr-D of a single picture is 0" in caplog.text


# Counts and words


def test_what_the_data_set_counts_over_all_samples_is_left_out_under_a_limit():
    listed = {"images": 20, "skipped": 2, "distinct_captions": 90, "texts": 100, "texts_cut": 3, "classes": 5}
    assert evaluated_counts({"images": 20, "captions": 100}, listed) == {"images": 20, "captions": 100, **listed}
    limited = {"images": 8, "images_not_evaluated": 12, "skipped": 2, "classes": 5}
    assert evaluated_counts({"images": 8}, listed) == limited


def test_cut_texts_are_told_with_their_share_and_length():
    counts = {"images": 36, "texts": 180, "texts_cut": 180, "context_length": 32, "skipped": 0}
    assert describe_counts(counts) == "36 images, 0 skipped, 180 of 180 texts cut at 32 tokens"


def test_captions_that_are_cut_stand_in_the_counts():
    data = MiniRetrieval(limit=10, captions_per_image=2)
    data.preprocessing = load_clip("mini-vit").preprocessing
    data.prepare_data()
    data.setup("validate")
    assert "texts_cut" not in data.sample_counts()
    longer = MiniRetrieval(limit=10, captions_per_image=2)
    longer.preprocessing = data.preprocessing
    read = longer.read_evaluation
    longer.read_evaluation = lambda: [
        replace(picture, captions=(picture.captions[0], picture.captions[1] + " and" * 40)) for picture in read()
    ]
    longer.setup("validate")
    counts = longer.sample_counts()
    assert {name: counts[name] for name in ("texts", "texts_cut", "context_length")} == {
        "texts": 20,
        "texts_cut": 10,
        "context_length": 32,
    }


# Strategies


def test_every_strategy_that_spawns_is_refused_before_anything_is_made(tmp_path, capsys, monkeypatch):
    spawning = [name for name in StrategyRegistry.available_strategies() if SPAWNING.search(name)]
    assert {"ddp_spawn", "ddp_fork", "ddp_notebook"} <= set(spawning)
    monkeypatch.setattr("lit_clipq.tasks.task.load_clip", lambda *_, **__: pytest.fail("the model was made"))
    for name in spawning:
        options = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", name]
        assert main(["validate", "--config", "mini/classification", *options]) == 1
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert told.startswith(f"error: --trainer.strategy {name} spawns or forks its workers")


def test_a_strategy_object_that_spawns_is_refused():
    with pytest.raises(ConfigError, match="of type DDPStrategy spawns or forks"):
        QuantTrainer(accelerator="cpu", devices=2, strategy=DDPStrategy(start_method="spawn"))
    assert QuantTrainer(accelerator="cpu", devices=1).world_size == 1


def test_without_a_trainer_there_is_no_limit():
    assert MiniRetrieval().batch_limit() == 1.0


# Training


@pytest.mark.slow
def test_a_training_says_how_much_of_its_data_an_epoch_saw(tmp_path, capsys, monkeypatch):
    write_data(tmp_path / "data/vqa")
    monkeypatch.chdir(tmp_path)
    options = ["--model.name", "mini-vit", "--model.pretrained", "mini", "--model.head", "mini"]
    options += ["--data.min_answer_count", "1", "--data.train_batch_size", "6", "--data.num_workers", "0"]
    options += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", "vqa", *options, "--trainer.limit_train_batches", "2"]) == 0
    assert "of which an epoch saw 2 of 6 batches" in " ".join(capsys.readouterr().out.split())
    assert main(["fit", "--config", "vqa", *options]) == 0
    assert "an epoch saw" not in capsys.readouterr().out
