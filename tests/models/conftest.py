"""Small CLIPs of every kind, with weights that make a wrong bias, norm or mask show."""

import json

import pytest
import torch

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2}
COCA_TEXT = {**TEXT, "context_length": 15, "embed_cls": True, "output_tokens": True}
COCA_VISION = {
    **VISION,
    "attentional_pool": True,
    "attn_pooler_heads": 2,
    "attn_pooler_queries": 5,
    "output_tokens": True,
}
CONFIGS = {
    "vit": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT},
    "quickgelu": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "resnet": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "head_width": 64},
        "text_cfg": TEXT,
    },
    "custom_text_eos": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 7},
    },
    "custom_text_argmax": {"embed_dim": 24, "custom_text": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "bidirectional": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    },
    "causal_last": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": {**TEXT, "pool_type": "last"},
    },
    "coca": {
        "embed_dim": 32,
        "custom_text": True,
        "vision_cfg": COCA_VISION,
        "text_cfg": COCA_TEXT,
        "multimodal_cfg": {"context_length": 15, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2},
    },
    "qk_norm": {"embed_dim": 24, "vision_cfg": {**VISION, "qk_norm": True}, "text_cfg": {**TEXT, "qk_norm": True}},
    "head_scale": {
        "embed_dim": 24,
        "vision_cfg": {**VISION, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True},
        "text_cfg": {**TEXT, "scale_heads": True, "scale_attn_inner": True, "ls_init_value": 0.5},
    },
}


def randomize(model):
    """Give biases, norms and running statistics values that matter."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() <= 1 or "bias" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
        if name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()


def build(config):
    """Build an open_clip model from a dictionary."""
    from lit_clipq.models.configs import ModelConfig, build_model

    return randomize(build_model(ModelConfig("test", None, config, {}), "fp32"))


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def config_file(tmp_path):
    """Write one of the small configurations as JSON and return its path."""

    def write(kind="vit", **changes):
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps({**CONFIGS[kind], **changes}))
        return path

    return write
