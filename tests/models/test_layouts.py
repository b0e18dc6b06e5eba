"""Weights under other names: wrappers of training loops, and transformers' layout against transformers itself."""

import json
import logging
from functools import partial

import pytest
import timm
import torch
from torch import nn

from lit_clipq.errors import ModelError
from lit_clipq.models import encode_image, encode_text, load_clip
from lit_clipq.models.layouts import unwrapped
from tests.models.conftest import CONFIGS, build

transformers = pytest.importorskip("transformers")

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture
def state():
    return build(CONFIGS["vit"]).state_dict()


def assert_loaded(loaded, state):
    found = loaded.model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def randomised(model):
    """Random values everywhere, norms and biases too, so that any two that are swapped show."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.data = noise + (1.0 if parameter.ndim == 1 else 0.0)
    return model.eval()


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "clip.", "model.", "module._orig_mod.", "_orig_mod.module.model.", "clip._orig_mod.",
     "model.module.clip.", "student.net."],
)  # fmt: skip
@pytest.mark.parametrize("config", ["vit", "custom_text_eos", "coca", "resnet"])
def test_wrapped_names_load(tmp_path, config_file, prefix, config):
    state = build(CONFIGS[config]).state_dict()
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {prefix + name: tensor for name, tensor in state.items()}, "epoch": 3}, path)
    assert_loaded(load_clip(str(config_file(config)), str(path)), state)


def test_towers_compiled_one_by_one_load(tmp_path, config_file, state):
    path = tmp_path / "weights.pt"
    named = {name.replace("visual.", "visual._orig_mod.", 1): tensor for name, tensor in state.items()}
    torch.save(named, path)
    assert_loaded(load_clip(str(config_file()), str(path)), state)


@pytest.mark.slow
def test_checkpoints_of_torch_wrappers_load(tmp_path, config_file, state):
    model = build(CONFIGS["vit"])
    wrapper = nn.Module()
    wrapper.clip = torch.compile(nn.DataParallel(model))
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": wrapper.state_dict()}, path)
    assert next(iter(wrapper.state_dict())).startswith("clip._orig_mod.module.")
    assert_loaded(load_clip(str(config_file()), str(path)), model.state_dict())


def test_own_fit_checkpoints_load_as_weights(tmp_path):
    from lightning.pytorch import Trainer

    from lit_clipq.tasks.contrastive import ContrastiveTask

    task = ContrastiveTask("mini-vit", "mini")
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert_loaded(load_clip("mini-vit", str(tmp_path / "last.ckpt")), task.clip.state_dict())


def test_tensors_beside_the_clip_are_left_out_and_told(tmp_path, config_file, state, caplog):
    path = tmp_path / "weights.pt"
    named = {f"model.{name}": tensor for name, tensor in state.items()}
    torch.save({**named, "probe.weight": torch.ones(3, 2), "probe.bias": torch.full((3,), float("nan"))}, path)
    with caplog.at_level(logging.WARNING):
        assert_loaded(load_clip(str(config_file()), str(path)), state)
    assert "2 tensors beside the CLIP are left out: probe" in caplog.text


def test_two_clips_in_one_file_are_refused(tmp_path, config_file, state):
    path = tmp_path / "weights.pt"
    torch.save({p + name: tensor for name, tensor in state.items() for p in ("student.", "teacher.")}, path)
    with pytest.raises(ModelError, match=r"several CLIPs, named student\., teacher\."):
        load_clip(str(config_file()), str(path))


def test_a_name_with_and_without_wrapper_is_refused():
    with pytest.raises(ModelError, match=r"'visual\.a' twice"):
        unwrapped({"visual.a": torch.ones(1), "visual._orig_mod.a": torch.ones(1)}, "here")


def test_a_checkpoint_of_a_head_says_that_it_is_no_clip(tmp_path, config_file):
    path = tmp_path / "head.ckpt"
    torch.save({"state_dict": {"head.lstm.weight": torch.ones(2, 2)}}, path)
    with pytest.raises(ModelError, match=r"holds no CLIP.*head\.lstm\.weight.*--ckpt_path"):
        load_clip(str(config_file()), str(path))


@pytest.mark.parametrize("key", ["model", "model_state_dict", "state_dict"])
def test_a_state_dict_under_any_key_is_found(tmp_path, config_file, state, key):
    path = tmp_path / "weights.pt"
    torch.save({"epoch": 1, "optimizer": {"state": {}, "param_groups": []}, key: state}, path)
    assert_loaded(load_clip(str(config_file()), str(path)), state)


def test_two_state_dicts_are_refused_unless_one_is_called_so(tmp_path, config_file, state, caplog):
    path = tmp_path / "weights.pt"
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"model": state, "model_ema": other}, path)
    with pytest.raises(ModelError, match=r"under the keys 'model', 'model_ema', expected one"):
        load_clip(str(config_file()), str(path))
    torch.save({"ema": other, "state_dict": state}, path)
    with caplog.at_level(logging.WARNING):
        assert_loaded(load_clip(str(config_file()), str(path)), state)
    assert "under 'state_dict' is taken, not the one under 'ema'" in caplog.text


# transformers


def embeddings(loaded, images, tokens):
    with torch.no_grad():
        return encode_image(loaded.model, images), encode_text(loaded.model, tokens)


def their_embeddings(model, images, tokens):
    with torch.no_grad():
        found = model(input_ids=tokens, pixel_values=images)
    return found.image_embeds, found.text_embeds


def tokens_with_end(count, length):
    tokens = torch.randint(3, 59, (count, length), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 1
    for row, end in enumerate(range(4, 4 + count)):
        tokens[row, end] = 59
        tokens[row, end + 1 :] = 0
    return tokens


@pytest.mark.parametrize(("act", "quick_gelu"), [("quick_gelu", True), ("gelu", False)])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_folder_of_transformers_clip_gives_the_same_embeddings(tmp_path, config_file, act, quick_gelu, suffix):
    config = transformers.CLIPConfig(
        text_config={**TEXT, "hidden_act": act, "eos_token_id": 59},
        vision_config={**VISION, "hidden_act": act},
        projection_dim=24,
    )
    model = randomised(transformers.CLIPModel(config))
    folder = tmp_path / "clip"
    model.save_pretrained(folder)
    if suffix == ".bin":
        (folder / "model.safetensors").unlink()
        torch.save({**model.state_dict(), "text_model.embeddings.position_ids": torch.arange(16)[None]},
                   folder / "pytorch_model.bin")  # fmt: skip
    loaded = load_clip(str(config_file("quickgelu" if quick_gelu else "vit")), str(folder))
    images, tokens = torch.randn(3, 3, 32, 32), tokens_with_end(3, 16)
    ours, theirs = embeddings(loaded, images, tokens), their_embeddings(model, images, tokens)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(nn.functional.normalize(own, dim=-1), other, atol=1e-5, rtol=0)
        assert (other[0] - other[1]).abs().max() > 1e-3  # the inputs matter
    assert torch.equal(loaded.model.logit_scale, model.logit_scale)
    with pytest.raises(ModelError, match=f"trained with {'QuickGELU' if quick_gelu else 'GELU'}"):
        load_clip(str(config_file("vit" if quick_gelu else "quickgelu")), str(folder))


def test_transformers_siglip_gives_the_same_embeddings(tmp_path, monkeypatch):
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **small))
    # timm's image tower of this name has the exact GELU, open_clip's text tower the approximation
    vision = {**VISION, "hidden_act": "gelu"}
    model = randomised(transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=vision)))
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    text = {**CONFIGS["bidirectional"]["text_cfg"], "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}
    vision = {"image_size": 32, "timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map"}
    config = {"embed_dim": 32, "init_logit_bias": -10, "custom_text": True, "text_cfg": text}
    name = tmp_path / "siglip.json"
    name.write_text(json.dumps({**config, "vision_cfg": {**vision, "timm_proj": "none"}}))
    loaded = load_clip(str(name), str(path))
    images, tokens = torch.randn(3, 3, 32, 32), torch.randint(3, 59, (3, 16))
    ours, theirs = embeddings(loaded, images, tokens), their_embeddings(model, images, tokens)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(nn.functional.normalize(own, dim=-1), other, atol=1e-5, rtol=0)
        assert (other[0] - other[1]).abs().max() > 1e-3  # the inputs matter
    assert torch.equal(loaded.model.logit_bias.flatten(), model.logit_bias.flatten())
