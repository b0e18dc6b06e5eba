"""Token features: what the towers themselves compute in front of their pooling, and nothing else."""

import pytest
import timm
import torch
from torch import nn

from lit_clipq import quantize
from lit_clipq.errors import ModelError
from lit_clipq.models import (
    encode_image,
    encode_image_tokens,
    encode_text,
    encode_text_tokens,
    layers_behind_tokens,
    make_explicit,
    text_token_mask,
    token_sizes,
)
from lit_clipq.recipes import make_recipe
from tests.models.conftest import CONFIGS, build
from tests.models.test_encode import FULL, TRIMMED, positions_computed, texts

PATCHES = [kind for kind in CONFIGS if kind not in ("resnet", "coca")]


def end_of(kind):
    return 7 if kind == "custom_text_eos" else 59


def size_of(model):
    size = model.visual.image_size
    return (size, size) if isinstance(size, int) else size


@torch.no_grad()
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("kind", PATCHES)
def test_patch_tokens_are_those_that_open_clip_gives(kind, explicit):
    model, images = build(CONFIGS[kind]), torch.randn(2, 3, 32, 32)
    model.visual.output_tokens = True
    expected = model.visual(images)[1]
    if explicit:
        make_explicit(model)
    found = encode_image_tokens(model, images)
    assert found.shape == (2, 16, 32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_grid_of_a_resnet_pools_to_its_embedding():
    model, images = build(CONFIGS["resnet"]), torch.randn(2, 3, 64, 64)
    grid = encode_image_tokens(model, images)
    assert grid.shape == (2, 4, 256)
    pooled = model.visual.attnpool(grid.transpose(1, 2).unflatten(2, (2, 2)))
    torch.testing.assert_close(pooled, encode_image(model, images), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_attention_pooled_towers_give_the_tokens_in_front_of_the_pool():
    model, images = build(CONFIGS["coca"]), torch.randn(2, 3, 32, 32)
    seen = []
    model.visual.attn_pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.visual(images)
    torch.testing.assert_close(encode_image_tokens(model, images), seen[0][:, 1:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options", "tokens"),
    [
        ("vit_tiny_patch16_224", {"depth": 1, "img_size": 32}, 4),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 8, "img_size": 56}, 49),
        ("resnet18", {}, 4),
    ],
)
def test_timm_towers_give_tokens_row_by_row(name, options, tokens):
    class Tower(nn.Module):
        trunk = timm.create_model(name, num_classes=0, **options).eval()

    Tower.__module__, Tower.__qualname__ = "open_clip.timm_model", "TimmModel"
    model = nn.Module()
    model.visual = Tower()
    side = options.get("img_size", 64)
    images = torch.randn(2, 3, side, side)
    found = encode_image_tokens(model, images)
    assert found.shape[:2] == (2, tokens)
    grid = Tower.trunk.forward_features(images)
    places = {"vit": (slice(None), 2), "swi": (slice(None), 0, 1), "res": (slice(None), slice(None), 0, 1)}
    second = grid[places[name[:3]]]
    assert torch.equal(found[:, 1], second)


@torch.no_grad()
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("kind", TRIMMED)
def test_text_features_at_the_end_token_project_to_the_embedding(kind, explicit):
    model, tokens = build(CONFIGS[kind]), None
    tokens = texts(model, [5, 9, 3], end_of(kind))
    if explicit:
        make_explicit(model)
    features, mask = encode_text_tokens(model, tokens)
    assert features.shape[:2] == mask.shape == (3, 9)
    assert mask.int().tolist() == [[0] + [1] * 4 + [0] * 4, [0] + [1] * 8, [0, 1, 1] + [0] * 6]
    root = getattr(model, "text", model)
    projected = torch.stack([features[row, end] for row, end in enumerate([4, 8, 2])]) @ root.text_projection
    torch.testing.assert_close(projected, encode_text(model, tokens), rtol=1e-5, atol=1e-5)
    assert positions_computed(model, lambda: encode_text_tokens(model, tokens)) == {9}


@torch.no_grad()
@pytest.mark.parametrize("kind", TRIMMED)
def test_other_texts_in_the_batch_do_not_change_the_features_of_one(kind):
    model = build(CONFIGS[kind])
    tokens = texts(model, [5, 12], end_of(kind))
    together, mask = encode_text_tokens(model, tokens)
    alone, own_mask = encode_text_tokens(model, tokens[:1])
    torch.testing.assert_close(together[0][mask[0]], alone[0][own_mask[0]], rtol=1e-5, atol=1e-5)
    changed = tokens.clone()
    changed[0, 5:] = 30  # behind the end
    again, _ = encode_text_tokens(model, changed)
    torch.testing.assert_close(again[0][mask[0]], together[0][mask[0]], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_start_token_says_nothing_in_a_causal_tower():
    model = build(CONFIGS["vit"])
    tokens = texts(model, [5, 9], 59)
    tokens[:, 0] = 8
    features, _ = encode_text_tokens(model, tokens)
    torch.testing.assert_close(features[0, 0], features[1, 0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", FULL)
def test_towers_without_the_end_token_rule_give_all_that_is_no_padding(kind):
    model = build(CONFIGS[kind])
    tokens = texts(model, [5, 9], 59)
    features, mask = encode_text_tokens(model, tokens)
    assert features.shape[:2] == mask.shape == tokens.shape
    assert mask.sum(1).tolist() == ([5, 9] if kind == "coca" else [tokens.shape[1]] * 2)
    if kind != "coca":
        model.text.output_tokens = True
        torch.testing.assert_close(features, model.text(tokens)[1], rtol=1e-5, atol=1e-5)


def test_a_text_of_one_token_keeps_it():
    model = build(CONFIGS["vit"])
    assert text_token_mask(model, texts(model, [1], 59)).sum() == 1


@pytest.mark.parametrize("kind", CONFIGS)
def test_everything_but_the_layers_behind_the_tokens_can_be_quantized(kind):
    model = build(CONFIGS[kind])
    height, width = size_of(model)
    tokens = texts(model, [5, 9], end_of(kind))
    unused = tuple(f"clip.{pattern}" for pattern in layers_behind_tokens(model))
    assert unused

    def forward(batch):
        return {"image": encode_image_tokens(model, batch[0]), "text": encode_text_tokens(model, batch[1])[0]}

    before = token_sizes(model, tokens[:1])
    batch = (torch.randn(2, 3, height, width), tokens)
    report = quantize(
        {"clip": model}, [batch], make_recipe("vanilla", exclude=unused, attention_products=True), forward=forward
    )
    assert not [entry for entry in report.map.quantized if not entry.macs]  # nothing was quantized that is not reached
    float_entries = [entry for entry in report.map.entries if entry.macs and not entry.quantized]
    assert not float_entries  # nothing is reached that was left out
    assert token_sizes(model, tokens[:1]) == before
    assert layers_behind_tokens(model) == tuple(pattern.removeprefix("clip.") for pattern in unused)


def test_unknown_towers_are_named():
    model = nn.Module()
    model.visual = nn.Linear(2, 2)
    model.text = nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"torch\.nn\.modules\.linear\.Linear"):
        encode_image_tokens(model, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ModelError, match=r"text towers, not from torch\.nn"):
        encode_text_tokens(model, torch.zeros(1, 4, dtype=torch.int64))
