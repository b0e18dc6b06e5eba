"""Visual question answering: training on cached features, checkpoints, quantization before and after."""

import json
import signal
import subprocess
import sys

import lightning
import pytest
import torch
import torch.nn.functional as F

from callbacks import Quantize
from lit_clipq.errors import CalibrationError, ConfigError, ModelError
from lit_clipq.features import CacheOptions
from lit_clipq.nn.modules import QModule
from lit_clipq.tasks import VQA
from lit_clipq.tasks.vqa import answer_loss
from lit_clipq.tasks.vqa_head import save_head
from tests.tasks.vqa_runs import equal, fit, make_data, make_task, make_trainer, weights, write_data

STEPS = 6  # of an epoch
ALL_STEPS = 18


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("vqa") / "data")


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """An uninterrupted training with a checkpoint of every step: (folder, task, losses)."""
    folder = tmp_path_factory.mktemp("whole")
    task, losses, _ = fit(root, folder, save=True)
    return folder, task, losses


def checkpoint(folder, step):
    return str(folder / f"step={step}.ckpt")


def validate(task, root, folder, *callbacks, data=None, **options):
    run = make_trainer(folder, *callbacks, limit_val_batches=1.0)
    run.validate(task, datamodule=data or make_data(root), verbose=False, **options)
    return run


def poisoned(task):
    """Let every use of CLIP fail."""

    def fail(*_):
        raise AssertionError("CLIP was called")

    for module in (task.clip, task.clip.visual, task.clip.visual.conv1, task.clip.transformer, task.clip.ln_final):
        module.register_forward_pre_hook(fail)
    return task


def test_loss_is_summed_over_answers_and_averaged_over_questions():
    logits, targets = torch.randn(4, 7), torch.rand(4, 7)
    p = logits.double().sigmoid()
    by_hand = -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(1).mean()
    assert answer_loss(logits, targets).item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_a_training_learns_what_the_pictures_show(root, tmp_path):
    task, losses, _ = fit(root, tmp_path, max_epochs=25, task=make_task(tmp_path / "cache", dropout=0.0))
    assert losses[-1] < 0.5 * losses[0]
    validate(task, root, tmp_path)
    assert task.results()["vqa_accuracy"] == 1.0
    assert set(task.results()) == {f"vqa_accuracy{name}" for name in ("", "_other", "_yes_no", "_number")}
    assert task.sample_counts() == {"questions": 18, "images": 6}


@pytest.mark.slow
def test_a_head_without_pictures_answers_from_the_question_alone(root, tmp_path):
    blind = make_task(tmp_path / "cache", dropout=0.0, question_only=True)
    fit(root, tmp_path, max_epochs=25, task=blind)
    validate(blind, root, tmp_path)
    assert blind.results()["vqa_accuracy_number"] == 1.0
    assert blind.results()["vqa_accuracy_other"] < 0.5
    batch = next(iter(blind.trainer.datamodule.val_dataloader()))
    with torch.no_grad():
        expected = blind(batch)
        assert torch.equal(blind({**batch, "images": torch.randn_like(batch["images"])}), expected)


def test_training_never_calls_clip_once_its_features_are_there(root, whole, tmp_path):
    folder, _, losses = whole
    with pytest.raises(AssertionError, match="CLIP was called"):
        fit(root, tmp_path, task=poisoned(make_task(tmp_path / "cache")))
    task, again, _ = fit(root, tmp_path, task=spared(folder), limit_val_batches=1.0)
    assert again == losses  # evaluating after each epoch changes nothing
    assert "vqa_accuracy" in task.trainer.callback_metrics


def spared(folder):
    """A task on the cache of `folder` whose CLIP fails as soon as the features are found."""
    task = make_task(folder / "cache")
    setup = task.setup

    def then_poison(stage):
        setup(stage)
        poisoned(task)

    task.setup = then_poison
    return task


def test_cached_features_train_like_those_of_every_step(root, whole, tmp_path):
    _, cached, _ = fit(root, tmp_path, task=make_task(whole[0] / "cache", dropout=0.0), max_epochs=2)
    _, direct, _ = fit(root, tmp_path, task=make_task(tmp_path, dropout=0.0, cache=None), max_epochs=2)
    assert direct == pytest.approx(cached, rel=2e-3)  # features in half precision
    assert direct != cached
    _, eight_bits, _ = fit(
        root,
        tmp_path,
        task=make_task(tmp_path, dropout=0.0, cache=CacheOptions(str(tmp_path / "int8"), "int8")),
        max_epochs=2,
    )
    assert direct == pytest.approx(eight_bits, rel=2e-2)


@pytest.mark.parametrize("step", [1, 4, STEPS, STEPS + 1, 2 * STEPS, ALL_STEPS - 1])
def test_a_training_that_continues_ends_with_the_same_weights(root, whole, tmp_path, step):
    folder, task, losses = whole
    again, rest, _ = fit(root, tmp_path, task=make_task(folder / "cache"), ckpt_path=checkpoint(folder, step))
    assert rest == losses[step:]
    assert equal(weights(again), weights(task))


@pytest.mark.slow
def test_a_killed_training_continues_to_the_same_weights(root, whole, tmp_path):
    command = [
        sys.executable,
        "-m",
        "tests.tasks.vqa_runs",
        str(root),
        str(tmp_path),
        "9",
        str(torch.get_num_threads()),
    ]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    last = max(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    assert last.stem == "step=8"  # it died in the ninth, before its checkpoint
    task, rest, _ = fit(root, tmp_path, ckpt_path=str(last))
    assert len(rest) == ALL_STEPS - 8
    assert equal(weights(task), weights(whole[1]))


def test_workers_do_not_change_the_order_or_where_it_continues(root, whole, tmp_path):
    folder, task, losses = whole
    again, rest, _ = fit(
        root,
        tmp_path,
        data=make_data(root, num_workers=2),
        task=make_task(folder / "cache"),
        ckpt_path=checkpoint(folder, 14),
    )
    assert rest == losses[14:]
    assert equal(weights(again), weights(task))


def test_epochs_have_orders_of_their_own(root):
    data = make_data(root)
    data.preprocessing = make_task("unused").preprocessing
    data.setup("fit")
    loader = data.train_dataloader()
    orders = []
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        orders.append([i for batch in loader for i in batch["question_ids"].tolist()])
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_a_checkpoint_holds_the_head_alone(root, whole):
    content = torch.load(checkpoint(whole[0], 3), weights_only=True)
    assert all(name.startswith("head.") for name in content["state_dict"])
    assert content["vqa"]["clip"] == "mini-vit (mini)"
    loaded = VQA.load_from_checkpoint(checkpoint(whole[0], ALL_STEPS))
    assert loaded.words == whole[1].words
    assert equal(weights(loaded), weights(whole[1]))


def test_a_checkpoint_is_evaluated_without_train_files(root, whole, tmp_path):
    folder, trained, _ = whole
    validate(trained, root, tmp_path)
    half = tmp_path / "half"
    half.mkdir()
    for path in root.glob("*val2014*"):
        (half / path.name).symlink_to(path)
    task = make_task("unused")
    data = make_data(half, calibration_root=str(root / "train2014"))
    validate(task, half, tmp_path, data=data, ckpt_path=checkpoint(folder, ALL_STEPS))
    assert task.words == trained.words
    assert task.results() == trained.results()
    assert data.sample_counts()["vocabulary"] == len(trained.words)


def test_a_checkpoint_is_evaluated_whatever_head_weights_the_configuration_names(root, whole, tmp_path):
    folder, trained, _ = whole
    last = checkpoint(folder, ALL_STEPS)
    validate(trained, root, tmp_path)
    task = make_task("unused", head_weights="mini")  # the shipped head has other sizes
    validate(task, root, tmp_path, ckpt_path=last)
    assert task.results() == trained.results()
    with pytest.raises(ModelError, match="holds another head: layers 2"):
        validate(make_task("unused", head_weights="mini"), root, tmp_path)


@pytest.mark.slow
def test_lightnings_own_trainer_evaluates_head_weights(root, whole, tmp_path):
    _, trained, _ = whole
    validate(trained, root, tmp_path)
    save_head(tmp_path / "head.safetensors", trained.head.state_dict(), trained.record())
    task = make_task("unused", head_weights=str(tmp_path / "head.safetensors"), dropout=0.9)
    quiet = {"logger": False, "enable_progress_bar": False, "use_distributed_sampler": False}
    options = {"accelerator": "cpu", "devices": 1, "default_root_dir": tmp_path, **quiet}
    lightning.pytorch.Trainer(**options).validate(task, datamodule=make_data(root), verbose=False)
    assert task.results() == trained.results()
    callback = quantizing(recipe="ptq4clip", bits=6, include=["clip.*block*.0.mlp*", "head.*"])
    task = make_task("unused", head_weights=str(tmp_path / "head.safetensors"))
    lightning.pytorch.Trainer(**options, callbacks=[callback]).validate(task, datamodule=make_data(root), verbose=False)
    assert isinstance(task.head.answer, QModule)


REFUSED = {
    "another head": ({"head_options": {"layers": 2}}, {}, r"another head: layers 1 \(here 2\)"),
    "another CLIP": ({"pretrained": None}, {}, r"trained on mini-vit \(mini\), but this run has mini-vit \(random w"),
    "no pictures": ({"question_only": True}, {}, "saw pictures; set --model.question_only false"),
    "another vocabulary": ({}, {"min_answer_count": 7}, "answers with 6 words, .* another vocabulary of 2"),
    "another batch": ({}, {"train_batch_size": 4}, "batch 6 of the training samples, this one has 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_of_another_run_is_refused(root, whole, tmp_path, case):
    model, data, told = REFUSED[case]
    with pytest.raises((ModelError, ConfigError), match=told):
        fit(
            root,
            tmp_path,
            task=make_task(tmp_path / "cache", **model),
            data=make_data(root, **data),
            ckpt_path=checkpoint(whole[0], 3),
        )


def test_the_checkpoint_of_another_task_is_refused(root, tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0", "epoch": 0, "global_step": 0}, path)
    with pytest.raises(ModelError, match="does not hold a question-answering head"):
        validate(make_task("unused"), root, tmp_path, ckpt_path=str(path))


def test_an_evaluation_without_a_trained_head_says_so(root, tmp_path):
    with pytest.raises(ConfigError, match=r"--ckpt_path of a training, or --model\.head_weights"):
        validate(make_task("unused"), root, tmp_path)


def damaged(path, how):
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-2000])
    elif how == "text":
        path.write_text("hello\n")
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["cut", "text", "empty", "gone"])
def test_a_checkpoint_that_cannot_be_read_is_told_before_any_work(root, whole, tmp_path, how):
    path = tmp_path / "last.ckpt"
    path.write_bytes((whole[0] / "step=3.ckpt").read_bytes())
    damaged(path, how)
    error, told = (ConfigError, "does not exist") if how == "gone" else (ModelError, "cannot be read")
    for run in (fit, lambda *args, **options: validate(make_task("unused"), *args, **options)):
        with pytest.raises(error, match=rf"{path} {told}.*--ckpt_path"):
            run(root, tmp_path, ckpt_path=str(path))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("place", ["a file/head.safetensors", "folder"])
def test_an_export_that_cannot_be_written_is_told_before_training(root, tmp_path, place):
    (tmp_path / "a file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"the head cannot be written to .*give another --model\.export"):
        fit(root, tmp_path, task=make_task(tmp_path / "cache", export=str(tmp_path / place)))
    assert not (tmp_path / "cache").exists()


def test_a_batch_that_cannot_be_made_is_told_before_features_are_computed(root, tmp_path):
    with pytest.raises(ConfigError, match="needs a batch of 37 questions, got 36"):
        fit(root, tmp_path, data=make_data(root, train_batch_size=37))
    assert not (tmp_path / "cache").exists()


def test_an_exported_head_is_evaluated(root, whole, tmp_path):
    exported = tmp_path / "head.safetensors"
    task, _, _ = fit(root, tmp_path, task=make_task(whole[0] / "cache", export=str(exported)), max_epochs=1)
    again = make_task("unused", head_weights=str(exported))
    validate(again, root, tmp_path)
    assert again.words == task.words
    for name, value in weights(again).items():
        assert torch.equal(value, weights(task)[name].half().float())
    with pytest.raises(ModelError, match="another head"):
        make_task("unused", head_weights=str(exported), head_options={"hidden": 64}).prepare_weights()
    exported.write_bytes(exported.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be read"):
        make_task("unused", head_weights=str(exported)).prepare_weights()


def quantizing(**options):
    return Quantize(
        **{"recipe": "vanilla", "bits": 4, "calibration_samples": 6, "calibration_batch_size": 3, **options}
    )


def test_a_head_is_trained_on_quantized_features(root, whole, tmp_path):
    saved = tmp_path / "quantized"
    callback = quantizing(save=str(saved), include="clip.*")
    task, losses, _ = fit(root, tmp_path, callback, save=True)
    assert any(isinstance(module, QModule) for module in task.clip.modules())
    assert not any(isinstance(module, QModule) for module in task.head.modules())
    assert losses != whole[2]
    manifest = json.loads((tmp_path / "cache" / "train-images" / "manifest.json").read_text())
    assert manifest["key"]["variant"] == "vanilla, W4A4"

    # the float cache is not taken for it, the quantized model is found again by what was saved
    with pytest.raises(ConfigError, match="as 'float', but this run has it as 'vanilla"):
        fit(root, tmp_path / "x", quantizing(), task=make_task(whole[0] / "cache"))
    again, rest, _ = fit(
        root,
        tmp_path / "y",
        Quantize(load=str(saved)),
        task=make_task(tmp_path / "cache"),
        ckpt_path=checkpoint(tmp_path, 8),
    )
    assert rest == losses[8:]
    assert equal(weights(again), weights(task))

    # a training on float features does not continue it
    with pytest.raises(ModelError, match=r"on features of mini-vit .* as 'vanilla.* but this run has it as 'float'"):
        fit(root, tmp_path / "z", task=make_task(whole[0] / "cache"), ckpt_path=checkpoint(tmp_path, 8))

    run = validate(
        make_task("unused"), root, tmp_path, Quantize(load=str(saved)), ckpt_path=checkpoint(tmp_path, ALL_STEPS)
    )
    assert run.comparison.quantized_bytes < run.comparison.float_bytes


def test_a_trained_head_is_evaluated_quantized(root, whole, tmp_path):
    for include, names in (("clip.*", ("clip",)), ("*", ("clip", "head"))):
        task = make_task("unused")
        run = validate(task, root, tmp_path, quantizing(include=include), ckpt_path=checkpoint(whole[0], ALL_STEPS))
        quantized = {entry.name.partition(".")[0] for entry in run.comparison.map.quantized}
        assert quantized == set(names)
        assert not [
            e
            for e in run.comparison.map.entries
            if e.reason and not e.reason.startswith(("excl", "not in", "att", "emb"))
        ]
        assert {"clip.visual.proj", "clip.text_projection"} <= {
            e.name for e in run.comparison.map.entries if e.reason.startswith("excluded")
        }
        assert run.comparison.float_metrics.keys() == run.comparison.quantized_metrics.keys()
        assert run.comparison.differences.keys() == run.comparison.float_metrics.keys()


@pytest.mark.slow
def test_a_saved_model_is_clip_alone_and_the_head_is_that_of_the_run(root, whole, tmp_path):
    folder, trained, _ = whole
    saved, exported = tmp_path / "saved", tmp_path / "head.safetensors"
    last = checkpoint(folder, ALL_STEPS)
    validate(make_task("unused"), root, tmp_path, quantizing(include="clip.*", save=str(saved)), ckpt_path=last)
    tensors = json.loads((saved / "quantization.json").read_text())["tensors"]
    assert {name.partition(".")[0] for name in tensors} == {"clip"}

    # the same model under the head of another step, under one from a file, and to train on
    other = make_task("unused")
    validate(other, root, tmp_path, Quantize(load=str(saved)), ckpt_path=checkpoint(folder, 1))
    assert equal(weights(other), weights(VQA.load_from_checkpoint(checkpoint(folder, 1))))
    save_head(exported, trained.head.state_dict(), trained.record())
    for callback in (quantizing(include="clip.*", save=str(tmp_path / "again")), Quantize(load=str(saved))):
        task = make_task("unused", head_weights=str(exported))
        validate(task, root, tmp_path, callback)
        assert any(isinstance(module, QModule) for module in task.clip.modules())
    fit(root, tmp_path, Quantize(load=str(saved)), max_epochs=1)


@pytest.mark.parametrize("source", ["checkpoint", "file"])
def test_a_quantized_head_is_not_saved_and_that_is_told_first(root, whole, tmp_path, monkeypatch, source):
    folder, trained, _ = whole
    monkeypatch.setattr("callbacks.quantize.quantize_many", None)  # nothing is calibrated
    options = {"ckpt_path": checkpoint(folder, ALL_STEPS)} if source == "checkpoint" else {}
    save_head(tmp_path / "head.safetensors", trained.head.state_dict(), trained.record())
    task = make_task("unused", head_weights=None if options else str(tmp_path / "head.safetensors"))
    with pytest.raises(ConfigError, match=r"a CLIP alone, but head would be quantized.*--quantize\.include 'clip"):
        validate(task, root, tmp_path, quantizing(include="*", save=str(tmp_path / "saved")), **options)
    assert not (tmp_path / "saved").exists()


@pytest.mark.slow
def test_the_search_of_ptq4clip_reaches_clip_and_head(root, whole, tmp_path):
    callback = quantizing(recipe="ptq4clip", bits=6, include=["clip.*block*.0.*", "head.*"])
    run = validate(make_task("unused"), root, tmp_path, callback, ckpt_path=checkpoint(whole[0], ALL_STEPS))
    assert {"head.answer", "head.image_flat.av", "clip.visual.transformer.resblocks.0.mlp.c_fc"} <= set(
        run.comparison.layers
    )


def test_the_fisher_objective_is_refused_with_a_reason(root, whole, tmp_path):
    callback = quantizing(recipe="ptq4clip", options={"objective": "fisher"})
    with pytest.raises(
        CalibrationError, match="embeddings of pictures and texts, got answers, image_tokens, text_tokens"
    ):
        validate(make_task("unused"), root, tmp_path, callback, ckpt_path=checkpoint(whole[0], ALL_STEPS))


def test_remembered_float_measurements_are_those_of_the_checkpoint(root, whole, tmp_path):
    scores = []
    for step in (1, ALL_STEPS, 1):
        task = make_task("unused")
        run = validate(task, root, tmp_path, quantizing(recipe=None), ckpt_path=checkpoint(whole[0], step))
        scores.append(run.comparison.float_metrics)
    assert scores[0] == scores[2] != scores[1]


def test_calibration_weighs_patches_and_valid_tokens_alone(whole):
    task = make_task("unused")
    tokens = task.preprocessing.tokenizer(["What color is it?", "Is it red in this picture here?"])
    images = torch.randn(2, 3, 64, 64)
    outputs = task.calibration_forward((images, tokens))
    assert outputs["image_tokens"].shape == (2, 64, 128)
    assert outputs["text_tokens"].shape == (2, 32, 128)
    valid = (tokens != 0).sum(1)
    for row, length in enumerate(valid.tolist()):
        assert (outputs["text_tokens"][row, length:] == 0).all()
        assert (outputs["text_tokens"][row, 1:length].abs().sum(-1) > 0).all()
    embedded = []
    hook = task.clip.token_embedding.register_forward_hook(lambda *args: embedded.append(args[2]))
    outputs = task.calibration_forward((images, tokens))
    hook.remove()
    (gradient,) = torch.autograd.grad(outputs["text_tokens"].sum(), embedded)
    assert (gradient[0, int(valid[0]) :] == 0).all()

    # one text alone gives what it gives beside a longer one
    alone = task.calibration_forward((images[:1], tokens[:1]))["text_tokens"]
    torch.testing.assert_close(alone, outputs["text_tokens"][:1], rtol=1e-4, atol=1e-5)


def test_no_gradient_of_the_answers_reaches_clip(whole):
    task = VQA.load_from_checkpoint(checkpoint(whole[0], 3))
    batch = (torch.randn(2, 3, 64, 64), task.preprocessing.tokenizer(["what?", "is it?"]))
    task.calibration_forward(batch)["answers"].sum().backward()
    assert all(parameter.grad is None for parameter in task.clip.parameters())
    assert all(parameter.grad is not None for parameter in task.head.parameters())


def test_repeated_pictures_of_a_batch_are_encoded_once(whole):
    task = VQA.load_from_checkpoint(checkpoint(whole[0], 3)).eval()
    images = torch.randn(3, 3, 64, 64)[[0, 1, 0, 2, 1]]
    seen = []
    task.clip.visual.conv1.register_forward_hook(lambda *args: seen.append(len(args[2])))
    with torch.no_grad():
        logits = task(
            {
                "images": images,
                "image_ids": torch.tensor([7, 5, 7, 9, 5]),
                "texts": task.preprocessing.tokenizer(["what?"] * 5),
            }
        )
    assert seen == [3]
    torch.testing.assert_close(logits[2], logits[0])
    assert not torch.allclose(logits[0], logits[1])


def test_the_rate_is_that_of_the_paper():
    task = make_task("unused", warmup=(0.25, 0.5, 0.75))
    rates = [task.rate_factor(epoch) for epoch in range(13)]
    assert rates == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 7 + [0.2, 0.2, 0.04])
    task._build_head(["yes"])
    optimizer = task.configure_optimizers()["optimizer"]
    assert optimizer.defaults["betas"] == (0.9, 0.98)
    assert optimizer.defaults["eps"] == 1e-9


def test_impossible_options_are_refused():
    for options in ({"learning_rate": 0.0}, {"decay": 0.0}, {"warmup": (0.0,)}, {"decay_epochs": (-1,)}):
        with pytest.raises(ConfigError, match="learning_rate"):
            make_task("unused", **options)
    for options in ({"betas": (1.5, 0.9)}, {"betas": (0.9, 1.0)}, {"eps": -1.0}):
        with pytest.raises(ConfigError, match="betas in"):
            make_task("unused", **options)


def test_a_batch_that_processes_cannot_divide_is_refused(root, monkeypatch):
    data = make_data(root, train_batch_size=5)
    data.preprocessing = make_task("unused").preprocessing
    data.setup("fit")
    monkeypatch.setattr("datamodules.vqa.shard", lambda: (0, 2))
    with pytest.raises(ConfigError, match=r"train_batch_size 5 cannot be divided among 2"):
        data.train_dataloader()


def test_plain_cross_entropy_of_a_batch_is_what_is_logged(root, whole):
    task = VQA.load_from_checkpoint(checkpoint(whole[0], 3)).eval()
    data = make_data(root)
    data.preprocessing = task.preprocessing
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        logits = task(batch)
    expected = F.binary_cross_entropy_with_logits(logits, batch["targets"], reduction="none").sum() / 6
    assert answer_loss(logits, batch["targets"]).item() == pytest.approx(expected.item(), rel=1e-6)
