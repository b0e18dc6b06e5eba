"""Training of a question-answering head on two processes takes the steps of one."""

import pytest
import torch

from tests.ddp.processes import run_processes
from tests.tasks.vqa_runs import fit, make_task, weights, write_data


def train(root, folder, devices, **options):
    task = make_task(folder / "cache", dropout=0.0, **options)
    task, losses, _ = fit(root, folder, task=task, devices=devices, limit_val_batches=1.0, max_epochs=2, save=True)
    return (
        losses,
        weights(task),
        dict(task.results()),
        task.sample_counts(),
        sorted(task._ddp_params_and_buffers_to_ignore),
    )


def train_on_rank(rank, root, folder):
    return train(root, folder, 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    root = write_data(folder / "data")
    return folder, root, train(root, folder / "one", 1), run_processes(train_on_rank, root, folder / "two", timeout=240)


@pytest.mark.slow
def test_the_loss_curve_of_two_processes_is_that_of_one(runs):
    _, _, one, two = runs
    assert len(one[0]) == 12
    for rank in two:
        assert rank[0] == pytest.approx(one[0], abs=1e-5, rel=1e-5)


def test_the_weights_of_two_processes_are_those_of_one(runs):
    _, _, one, two = runs
    assert all(torch.equal(value, two[1][1][name]) for name, value in two[0][1].items())
    # A bias of keys, or of scores, moves all scores of a softmax alike: its gradient is rounding noise, which Adam
    # scales to whole steps. So single numbers may differ by some steps, but not the weights as a whole.
    gap = sum((two[0][1][name] - value).square().sum() for name, value in one[1].items())
    assert gap.sqrt() < 2e-3 * sum(value.square().sum() for value in one[1].values()).sqrt()


def test_both_evaluate_alike_and_count_each_question_once(runs):
    _, _, one, two = runs
    for rank in two:
        assert rank[2:4] == one[2:4]
    assert one[3] == {"questions": 18, "images": 6}


def test_processes_fill_one_cache(runs):
    folder = runs[0]
    for kind in ("train-images", "train-texts", "val-images", "val-texts"):
        first, second = (
            {p.name: p.read_bytes() for p in (folder / n / "cache" / kind).iterdir()} for n in ("one", "two")
        )
        assert first.keys() == second.keys()
        assert first["manifest.json"] == second["manifest.json"]


def test_nothing_of_clip_is_sent_between_processes(runs):
    ignored = runs[3][0][4]
    assert "clip.visual.conv1.weight" in ignored
    assert all(name.startswith("clip.") for name in ignored)


def test_a_training_on_two_processes_continues_on_one(runs, tmp_path):
    folder, root, one, _ = runs
    checkpoint = folder / "two" / "step=8.ckpt"
    random = torch.load(checkpoint, weights_only=True)["vqa"]["random"]
    assert len(random) == 2
    task = make_task(folder / "two" / "cache", dropout=0.0)
    _, rest, _ = fit(root, tmp_path, task=task, max_epochs=2, ckpt_path=str(checkpoint))
    assert rest == pytest.approx(one[0][8:], abs=1e-4)
