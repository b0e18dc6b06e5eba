"""Training a language model by `fit`."""

import shutil

import pytest
import torch

from datamodules import MiniCaptionText
from lit_clipq.errors import ConfigError
from lit_clipq.mini.assets import LANGUAGE_MODEL_DIR
from lit_clipq.tasks.language import LanguageModelling, next_token_loss
from lit_clipq.zerocap.language import load_language_model
from tests.tasks.fakes import trainer


def test_a_few_steps_lower_the_loss_and_the_export_loads(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "lm"
    shutil.copytree(LANGUAGE_MODEL_DIR, folder)
    task = LanguageModelling(export=str(folder / "model.safetensors"), warmup_steps=2)
    data = MiniCaptionText(batch_size=32, limit=320)
    run = trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0)
    run.fit(task, datamodule=data)
    assert run.callback_metrics["val_loss"] < 6.0  # log(702) = 6.55 at the start
    trained, loaded = task.lm.state_dict(), load_language_model(str(folder)).model.state_dict()
    for name, value in loaded.items():
        torch.testing.assert_close(value, trained[name].half().float(), msg=name)


def test_the_loss_is_that_of_a_loop_over_tokens_that_count():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 5, (2, 4), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    losses = [-logits[b, t].log_softmax(0)[ids[b, t + 1]].item() for b in range(2) for t in range(3) if mask[b, t + 1]]
    assert len(losses) == 4
    assert next_token_loss(logits, ids, mask).item() == pytest.approx(sum(losses) / 4, rel=1e-6)


def test_impossible_schedules_are_refused():
    with pytest.raises(ConfigError, match="learning_rate > 0"):
        LanguageModelling(learning_rate=0.0)
