"""What every metric must do: agree with its oracle, and survive reset, clone, pickle, forward and several processes."""

import pickle

import pytest
import torch

from tests.ddp.processes import run_processes
from tests.metrics.tester import CASES


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def filled(case, batches=None):
    metric = case.make()
    for batch in case.batches if batches is None else batches:
        metric.update(**batch)
    return metric


def same(a, b):
    assert a.counts == b.counts
    assert a.totals == b.totals
    assert a.scores.keys() == b.scores.keys()
    for name, scores in a.scores.items():
        assert torch.equal(scores.values, b.scores[name].values)
        assert torch.equal(scores.clusters, b.scores[name].clusters)


def test_agrees_with_the_oracle(case):
    assert filled(case).compute() == pytest.approx(case.oracle(case.batches), abs=1e-14)


def test_metric_is_the_mean_of_its_scores(case):
    metric = filled(case)
    for name, scores in metric.evaluation().scores.items():
        assert scores.values.dtype == torch.float64
        assert scores.clusters.dtype == torch.int64
        assert scores.values.shape == scores.clusters.shape
        assert metric.compute()[name] == pytest.approx(scores.values.mean().item(), abs=1e-14)


def test_reset_forgets(case):
    metric = filled(case)
    metric.compute()
    metric.reset()
    metric.update(**case.batches[1])
    same(metric.evaluation(), filled(case, case.batches[1:2]).evaluation())


def test_clone_is_independent(case):
    metric = filled(case, case.batches[:1])
    clone = metric.clone()
    clone.update(**case.batches[1])
    same(metric.evaluation(), filled(case, case.batches[:1]).evaluation())
    same(clone.evaluation(), filled(case, case.batches[:2]).evaluation())


@pytest.mark.parametrize("computed", [False, True])
def test_pickle_keeps_the_samples(case, computed):
    metric = filled(case, case.batches[:2])
    if computed:
        metric.compute()
    copy = pickle.loads(pickle.dumps(metric))  # noqa: S301 our own bytes
    copy.update(**case.batches[2])
    same(copy.evaluation(), filled(case).evaluation())


def test_forward_gives_the_batch_and_accumulates(case):
    metric = case.make()
    for batch in case.batches:
        assert metric(**batch) == pytest.approx(case.oracle([batch]), abs=1e-14)
    same(metric.evaluation(), filled(case).evaluation())


def test_order_of_batches_does_not_matter(case):
    same(filled(case).evaluation(), filled(case, case.batches[::-1]).evaluation())


def test_repeated_samples_count_once(case):
    same(filled(case).evaluation(), filled(case, case.batches + case.batches[:2]).evaluation())


def test_works_in_inference_mode_and_is_readable_outside(case):
    with torch.inference_mode():
        metric = filled(case)
    same(metric.evaluation(), filled(case).evaluation())


def evaluate_shards(rank, plans):
    """Evaluate every case with the batches that each plan gives to this rank, twice over."""
    results = []
    for plan in plans:
        for case in CASES.values():
            metric = filled(case, [case.batches[i] for i in plan[rank]])
            local = metric.evaluation()
            metric.update(**case.batches[plan[0][0]])  # accumulating goes on after computing
            results.append((local, metric.evaluation()))
    return results


@pytest.mark.slow
def test_two_processes_give_what_one_gives():
    plans = [
        ([0, 2], [1]),
        ([0, 1, 2], []),  # one process saw nothing
        ([0, 1], [2, 0]),  # one batch seen twice
    ]
    expected = [filled(case).evaluation() for _ in plans for case in CASES.values()]
    for results in run_processes(evaluate_shards, plans):
        for (first, again), one in zip(results, expected, strict=True):
            same(first, one)
            same(again, one)


def compute_nothing(rank):
    errors = []
    for case in CASES.values():
        with pytest.raises(Exception, match="got none") as caught:
            case.make().compute()
        errors.append(type(caught.value).__name__)
    return errors


@pytest.mark.slow
def test_no_sample_in_any_process_is_an_error_in_all():
    assert run_processes(compute_nothing) == [["DataError"] * len(CASES)] * 2
