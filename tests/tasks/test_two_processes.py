"""Tasks under a Trainer of two processes give what one gives, also where a process has no batch at all."""

import pytest
import torch

from lit_clipq.tasks import Retrieval, ZeroShotClassification
from tests.ddp.processes import run_processes
from tests.tasks.fakes import Shards, classification_data, make_task, retrieval_samples, trainer

ALTERNATING = ([0, 1, 0, 1, 0], [0, 1] * 4 + [0])
RETRIEVAL_PLANS = {
    "alternating": ALTERNATING,
    "one process has no pictures": ([0] * 5, ALTERNATING[1]),
    "one process has nothing": ([1] * 5, [1] * 9),
}
CLASSIFICATION_PLANS = {"alternating": ([0, 1] * 4,), "one process has nothing": ([0] * 8,)}


def evaluate(folder, devices, retrieval_owners, classification_owners):
    """Both tasks, twice each, as a quantized run does."""
    outcomes = []
    for make, data in (
        (lambda: make_task(Retrieval, ks=(1, 3), any_identical=True), Shards(retrieval_samples(), retrieval_owners)),
        (lambda: make_task(ZeroShotClassification, templates="simple"), classification_data(classification_owners)),
    ):
        task, run = make(), trainer(folder, devices=devices)
        for _ in range(2):
            run.validate(task, datamodule=data, verbose=False)
            logged = {name: value.item() for name, value in run.callback_metrics.items()}
            outcomes.append((task.results(), task.sample_counts(), task.sample_scores(), logged))
    return outcomes


def evaluate_on_rank(rank, folder, plans):
    return [evaluate(folder, 2, *plan) for plan in plans]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    plans = [
        (RETRIEVAL_PLANS["alternating"], CLASSIFICATION_PLANS["alternating"]),
        (RETRIEVAL_PLANS["one process has no pictures"], CLASSIFICATION_PLANS["one process has nothing"]),
        (RETRIEVAL_PLANS["one process has nothing"], CLASSIFICATION_PLANS["one process has nothing"]),
    ]
    alone = evaluate(tmp_path, 1, None, None)
    for outcomes in run_processes(evaluate_on_rank, tmp_path, plans, timeout=150):
        for plan in outcomes:
            for (results, counts, scores, logged), one in zip(plan, alone, strict=True):
                assert results == one[0]
                assert counts == one[1]
                assert logged == pytest.approx(results, abs=1e-6)
                assert scores.keys() == one[2].keys()
                for name, score in scores.items():
                    assert torch.equal(score.values, one[2][name].values)
                    assert torch.equal(score.clusters, one[2][name].clusters)
