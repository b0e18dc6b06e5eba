"""Tasks around a real, tiny open_clip model with random weights."""

import json

import open_clip
import pytest
import torch

from lit_clipq.models import load_clip
from lit_clipq.tasks import Retrieval, ZeroShotClassification

CLASSES = ["tench", "great white shark", "cock"]
CONFIG = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def test_classifier_agrees_with_open_clip(config):
    torch.manual_seed(0)
    task = ZeroShotClassification(config, text_batch_size=50)
    theirs = open_clip.build_zero_shot_classifier(
        task.clip, load_clip(config).preprocessing.tokenizer, CLASSES, open_clip.OPENAI_IMAGENET_TEMPLATES
    )
    torch.testing.assert_close(task.build_classifier(CLASSES), theirs.T, rtol=0, atol=1e-5)


def test_calibration_forward_agrees_with_open_clip(config):
    torch.manual_seed(0)
    task = Retrieval(config)
    images, tokens = torch.randn(2, 3, 32, 32), task.preprocessing.tokenizer(["a dog", "a longer text of a cat"])
    ours = task.calibration_forward((images, tokens))
    torch.testing.assert_close(ours["image"], task.clip.encode_image(images, normalize=True), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours["text"], task.clip.encode_text(tokens, normalize=True), rtol=0, atol=1e-5)
