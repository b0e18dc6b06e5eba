"""Contrastive training, and the data modules of the mini world."""

import math
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from datamodules.mini import EpochBatches, MiniClassification, MiniPretrain, MiniRetrieval
from lit_clipq.errors import ConfigError, DataError, ModelError
from lit_clipq.mini import CLASS_NAMES, PRESETS, WORLD_HASHES
from lit_clipq.mini.world import Preset, write_world
from lit_clipq.models import load_clip
from lit_clipq.tasks.contrastive import ContrastiveTask, export_weights, info_nce, recall_at_1


@pytest.fixture
def pretrain_root(monkeypatch, tmp_path):
    """A training world of a few pictures."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setitem(PRESETS, "train", Preset({"train": 48, "dev": 10}, {}, {}))
    monkeypatch.setitem(WORLD_HASHES, "train", write_world(tmp_path / "scratch", "train"))
    return str(tmp_path / "worlds")


def trainer(folder, **kwargs) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **quiet,
        **kwargs,
    )


def fit(root, folder, epochs, ckpt_path=None, stop_after=None, **model):
    lightning.seed_everything(3)
    task = ContrastiveTask("mini-vit", warmup_steps=2, **model)
    data = MiniPretrain(root, batch_size=12, seed=5, workers=1)
    saver = lightning.pytorch.callbacks.ModelCheckpoint(dirpath=folder, save_last=True)
    stopper = lightning.pytorch.callbacks.LambdaCallback(
        on_train_epoch_end=lambda t, _: setattr(t, "should_stop", t.current_epoch + 1 == stop_after)
    )
    run = trainer(folder, max_epochs=epochs, callbacks=[saver, stopper])
    run.fit(task, data, ckpt_path=ckpt_path)
    return task, run


def test_info_nce_agrees_with_a_loop():
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(5, 8, generator=generator), dim=-1) for _ in range(2))
    total = 0.0
    for i in range(5):
        by_text = [math.exp(7 * float(image[i] @ text[j])) for j in range(5)]
        by_image = [math.exp(7 * float(image[j] @ text[i])) for j in range(5)]
        total -= math.log(by_text[i] / sum(by_text)) + math.log(by_image[i] / sum(by_image))
    assert info_nce(image, text, torch.tensor(7.0)).item() == pytest.approx(total / 10, rel=1e-5)


def test_recall_counts_own_rows():
    gallery = torch.eye(4)
    assert recall_at_1(gallery[[0, 1, 3, 2]], gallery) == 0.5


@pytest.mark.slow
def test_training_learns_pairs_by_heart(tmp_path):
    lightning.seed_everything(0)
    task = ContrastiveTask("mini-vit", warmup_steps=2)
    images = torch.randn(8, 3, 1, 1).expand(8, 3, 64, 64)
    batch = (images, task.preprocessing.tokenizer([f"a {name}" for name in CLASS_NAMES[:8]]))
    run = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    run.fit(task, DataLoader([batch] * 40, batch_size=None))
    assert run.callback_metrics["train_loss_step"] < 0.5 * math.log(8)


def test_a_run_logs_and_exports(pretrain_root, tmp_path):
    target = tmp_path / "out" / "weights.safetensors"
    task, run = fit(pretrain_root, tmp_path, 1, export=str(target))
    assert {"val_recall@1_i2t", "val_recall@1_t2i", "logit_scale"} <= run.callback_metrics.keys()
    again = load_clip("mini-vit", str(target)).model.state_dict()
    for name, value in task.clip.state_dict().items():
        if name in again:
            assert torch.equal(again[name], value.half().float()), name
    assert all(t.dtype == torch.float16 for t in load_file(target).values() if t.is_floating_point())


@pytest.mark.slow
def test_a_run_resumed_from_its_checkpoint_ends_with_the_same_weights(pretrain_root, tmp_path):
    whole, _ = fit(pretrain_root, tmp_path / "a", 3)
    fit(pretrain_root, tmp_path / "b", 3, stop_after=1)
    resumed, _ = fit(pretrain_root, tmp_path / "c", 3, ckpt_path=str(tmp_path / "b" / "last.ckpt"))
    for name, value in whole.clip.state_dict().items():
        assert torch.equal(value, resumed.clip.state_dict()[name]), name


def test_training_mode_updates_batch_statistics(pretrain_root, tmp_path):
    lightning.seed_everything(0)
    task = ContrastiveTask("mini-resnet", warmup_steps=0)
    trainer(tmp_path, max_steps=2, enable_checkpointing=False).fit(
        task, MiniPretrain(pretrain_root, batch_size=8, workers=1)
    )
    assert int(task.clip.visual.bn1.num_batches_tracked) == 2


def test_logit_scale_stays_at_100(pretrain_root, tmp_path):
    task = ContrastiveTask("mini-vit", warmup_steps=0)
    with torch.no_grad():
        task.clip.logit_scale.fill_(10.0)
    task.on_train_batch_end(None, None, 0)
    assert task.clip.logit_scale.exp().item() == pytest.approx(100)


def test_schedule_warms_up_and_decays_to_zero():
    task = ContrastiveTask("mini-vit", learning_rate=0.5, warmup_steps=10)
    task._trainer = SimpleNamespace(estimated_stepping_batches=110)
    configured = task.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(111):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == rates[10] == pytest.approx(0.5)
    assert rates[60] == pytest.approx(0.25)
    assert rates[110] == pytest.approx(0.0, abs=1e-9)
    decayed = optimizer.param_groups[0]["params"]
    assert all(p.ndim >= 2 for p in decayed)
    assert optimizer.param_groups[1]["weight_decay"] == 0


def test_weights_that_fp16_cannot_hold_are_refused(tmp_path):
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = 1e6
    with pytest.raises(ModelError, match="weight"):
        export_weights(model, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


def test_options_outside_their_range_are_refused():
    with pytest.raises(ConfigError, match="learning_rate"):
        ContrastiveTask("mini-vit", learning_rate=0.0)
    with pytest.raises(ConfigError, match="batch"):
        MiniPretrain(batch_size=8, limit=4)
    with pytest.raises(ConfigError, match="small, full"):
        MiniRetrieval(preset="tiny")
    with pytest.raises(ConfigError, match="captions_per_image"):
        MiniRetrieval(captions_per_image=0)


def test_an_epoch_takes_every_picture_once_and_the_next_epoch_other_captions():
    batches = EpochBatches(20, 6, seed=1)
    first = torch.cat(list(batches))
    batches.set_epoch(1)
    second = torch.cat(list(batches))
    assert len(first) == 18
    assert len(first[:, 0].unique()) == 18
    assert not torch.equal(first[:, 0], second[:, 0])
    captions = {int(p): int(c) for p, c in first}
    assert all(int(c) == (captions[int(p)] + 1) % 5 for p, c in second if int(p) in captions)


def test_pixels_are_normalised_as_the_preprocessing_does(pretrain_root):
    data = MiniPretrain(pretrain_root, batch_size=4, workers=1)
    data.preprocessing = load_clip("mini-vit").preprocessing
    data.prepare_data()
    data.setup()
    images, tokens = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    folder = data.root / "train" / "images"
    expected = torch.stack([data.preprocessing.image(Image.open(folder / f"dev_{i:06d}.png")) for i in range(4)])
    torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)  # other order of float32 operations
    assert tokens.dtype == torch.int64


def test_retrieval_pairs_are_those_of_the_caption_file():
    data = MiniRetrieval(batch_size=100, limit=30)
    data.preprocessing = load_clip("mini-vit").preprocessing
    data.prepare_data()
    data.setup()
    assert data.sample_counts()["images"] == 30
    assert data.sample_counts()["captions"] == 150
    images, texts = data.val_dataloader()
    assert next(iter(images))["images"].shape == (30, 3, 64, 64)
    pairs = torch.cat([batch["pairs"] for batch in texts])
    assert np.bincount(pairs[:, 1].numpy()).tolist() == [5] * 30
    pictures, tokens = next(iter(data.calibration_dataloader(8, 8, seed=0)))
    assert pictures.shape == (8, 3, 64, 64)
    assert tokens is not None
    assert tokens.shape == (8, 32)


def test_classification_knows_its_classes_and_calibrates_on_another_split():
    data = MiniClassification(batch_size=50)
    data.preprocessing = load_clip("mini-vit").preprocessing
    data.prepare_data()
    data.setup()
    assert data.class_names == list(CLASS_NAMES)
    labels = torch.cat([batch["labels"] for batch in data.val_dataloader()])
    assert torch.bincount(labels).tolist() == [20] * 24
    assert data.sample_counts()["calibration_held_out"] == 0
    pictures, _ = next(iter(data.calibration_dataloader(8, 8, seed=0)))
    assert len(pictures) == 8


def test_a_world_that_is_not_written_is_named(tmp_path):
    data = MiniRetrieval(str(tmp_path))
    data.preprocessing = load_clip("mini-vit").preprocessing
    with pytest.raises(DataError, match="prepare_data"):
        data.setup()
