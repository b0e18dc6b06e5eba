"""Retrieval under a Trainer: results, repeated evaluation, and what it offers to a quantizer."""

import pytest
import torch

from lit_clipq.errors import ConfigError, ModelError
from lit_clipq.tasks import Retrieval
from tests.metrics import oracles
from tests.tasks.fakes import Shards, collate, make_task, retrieval_samples, trainer


def expected(task, ks):
    pictures, captions = (collate(samples) for samples in retrieval_samples())
    with torch.no_grad():
        images, texts = task.clip.encode_image(pictures["images"]), task.clip.encode_text(captions["texts"])
    results = oracles.recall(images, texts, captions["pairs"] - torch.tensor([0, 10]), ks)
    return {name: value for name, value in results.items() if not name.endswith("any_identical")}


@pytest.fixture
def task():
    return make_task(Retrieval, ks=(1, 3))


def test_validate_agrees_with_loops(task, tmp_path):
    run = trainer(tmp_path)
    (logged,) = run.validate(task, datamodule=Shards(retrieval_samples()), verbose=False)[:1]
    assert task.results() == pytest.approx(expected(task, (1, 3)), abs=1e-12)
    assert run.callback_metrics.keys() == task.results().keys()
    assert logged == pytest.approx(task.results(), abs=1e-6)
    assert task.sample_counts() == {"images": 5, "captions": 11}
    owners = [0, 1, 1, 1, 2, 3, 4, 0, 1, 2, 3]  # pictures of the captions of texts 0 (two), 1 (two), 2, 3, ...
    clusters = task.sample_scores()["recall@1_t2i"].clusters.tolist()
    assert clusters == sorted(10 + owner for owner in owners)


def test_evaluates_in_inference_mode_and_scores_are_readable_after(task, tmp_path):
    modes = []
    step = task.evaluation_step
    task.evaluation_step = lambda batch: (modes.append(torch.is_inference_mode_enabled()), step(batch))
    trainer(tmp_path).validate(task, datamodule=Shards(retrieval_samples()), verbose=False)
    assert modes
    assert all(modes)
    assert all(0 <= scores.values.mean() <= 1 for scores in task.sample_scores().values())


def test_second_evaluation_on_the_same_objects_measures_the_network_as_it_then_is(task, tmp_path):
    run, data = trainer(tmp_path), Shards(retrieval_samples())
    run.validate(task, datamodule=data, verbose=False)
    first = task.results()
    with torch.no_grad():
        task.clip.image.neg_()
    run.validate(task, datamodule=data, verbose=False)
    assert task.results() == pytest.approx(expected(task, (1, 3)), abs=1e-12)
    assert task.results() != first
    assert task.sample_counts() == {"images": 5, "captions": 11}


def test_test_loop_gives_what_validate_gives(task, tmp_path):
    run, data = trainer(tmp_path), Shards(retrieval_samples())
    run.validate(task, datamodule=data, verbose=False)
    validated = task.results()
    run.test(task, datamodule=data, verbose=False)
    assert task.results() == validated


def test_constant_network_scores_exactly_chance(task, tmp_path):
    with torch.no_grad():
        task.clip.token.fill_(0.3)
        task.clip.image.zero_()
    trainer(tmp_path).validate(task, datamodule=Shards(retrieval_samples()), verbose=False)
    assert task.results()["recall@1_t2i"] == 1 / 5
    assert task.results()["recall@3_t2i"] == 3 / 5


def test_broken_network_is_reported_with_a_count(task, tmp_path):
    with torch.no_grad():
        task.clip.image[0, 0] = torch.nan
    with pytest.raises(ModelError, match="finite image embeddings, but 5 of 5"):
        trainer(tmp_path).validate(task, datamodule=Shards(retrieval_samples()), verbose=False)


def test_results_before_an_evaluation_are_refused(task):
    for read in (task.results, task.sample_scores, task.sample_counts):
        with pytest.raises(RuntimeError, match="expected a finished evaluation"):
            read()


def test_calibration_forward_gives_unit_embeddings_with_gradients(task):
    images, texts = torch.randn(4, 3, 2, 2), torch.randint(1, 9, (4, 16))
    outputs = task.calibration_forward((images, texts))
    assert outputs.keys() == {"image", "text"}
    for rows in outputs.values():
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    (outputs["image"] * outputs["text"]).sum().backward()
    assert task.clip.image.grad.abs().sum() > 0
    assert task.clip.token.grad.abs().sum() > 0
    assert task.calibration_forward((images, None)).keys() == {"image"}
    assert task.calibration_forward((None, texts)).keys() == {"text"}


def test_roots_share_the_network_that_is_evaluated(task):
    assert task.roots()["clip"] is task.clip


def test_options_are_hyperparameters_and_metrics_are_no_weights(task):
    assert task.hparams["ks"] == (1, 3)
    assert all(name.startswith("clip.") for name in task.state_dict())


@pytest.mark.parametrize("ks", [(), (0, 1)])
def test_impossible_ks_are_refused(ks):
    with pytest.raises(ConfigError, match="`ks` of at least 1"):
        make_task(Retrieval, ks=ks)


def test_any_identical_is_reported_when_asked_for(tmp_path):
    task = make_task(Retrieval, ks=(1,), any_identical=True)
    trainer(tmp_path).validate(task, datamodule=Shards(retrieval_samples()), verbose=False)
    assert task.results()["recall@1_t2i_any_identical"] >= task.results()["recall@1_t2i"]
