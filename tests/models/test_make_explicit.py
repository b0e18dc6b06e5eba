import copy

import open_clip
import pytest
import timm
import torch
from open_clip.transformer import Attention
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lit_clipq.models import make_explicit
from lit_clipq.nn.attention import ExplicitAttention, Projection, QKVLinear
from lit_clipq.nn.matmul import MatMul
from tests.models.conftest import CONFIGS, build, randomize

TOLERANCE = 1e-5  # float32, sums in another order; embeddings are of order one


def quantizable(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d | MatMul)]


def assert_rewritten(records):
    assert records
    assert all(record.explicit and not record.reason for record in records)


def assert_same(found, expected):
    assert torch.isfinite(expected).all()
    assert expected.abs().max() > 0.05
    assert (found - expected).abs().max() <= TOLERANCE


def inputs(model, vocabulary=60):
    size = model.visual.image_size
    images = torch.randn(2, 3, *(size if isinstance(size, tuple) else (size, size)))
    tokens = torch.zeros(2, getattr(model, "text", model).context_length, dtype=torch.int64)
    for row, length in enumerate((9, 4)):
        tokens[row, :length] = torch.randint(1, vocabulary - 1, (length,))
        tokens[row, length] = vocabulary - 1
    return images, tokens


@torch.no_grad()
def check_towers(model, vocabulary=60):
    images, tokens = inputs(model, vocabulary)
    expected = model.encode_image(images, normalize=False), model.encode_text(tokens, normalize=False)
    records = make_explicit(model)
    assert_rewritten(records)
    assert_same(model.encode_image(images, normalize=False), expected[0])
    assert_same(model.encode_text(tokens, normalize=False), expected[1])
    return records


@pytest.mark.parametrize("kind", CONFIGS)
def test_small_towers_equal_the_original(kind):
    check_towers(build(CONFIGS[kind]))


@torch.no_grad()
def test_coca_decoder_with_cross_attention_equals_the_original():
    model = build(CONFIGS["coca"])
    images, tokens = inputs(model)
    expected = model(images, tokens)["logits"]
    records = make_explicit(model)
    assert_rewritten(records)
    cross = model.text_decoder.cross_attn[0].attn
    assert set(dict(cross.named_children())) >= {"q_proj", "k_proj", "v_proj", "qk", "av", "out_proj"}
    pooler = model.visual.attn_pool.attn
    assert set(dict(pooler.named_children())) >= {"q_proj", "kv_proj", "qk", "av", "out_proj"}
    assert_same(model(images, tokens)["logits"], expected)


FULL_WIDTH = ["RN50", "ViT-B-32", "ViT-B-32-quickgelu", "coca_ViT-B-32", "ViT-B-16-SigLIP", "EVA02-B-16"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_WIDTH)
def test_published_architectures_at_full_width_equal_the_original(name):
    """Few layers (timm: the first two blocks) to be fast; widths, heads and masks as published."""
    config = open_clip.get_model_config(name)
    config["text_cfg"].update(layers=1, vocab_size=600)
    if "layers" in config["vision_cfg"]:
        config["vision_cfg"]["layers"] = [1, 1, 1, 1] if name == "RN50" else 2
    if "multimodal_cfg" in config:
        config["multimodal_cfg"].update(layers=1, vocab_size=600)
    model = build(config)
    if "timm_model_name" in config["vision_cfg"]:
        model.visual.trunk.blocks = model.visual.trunk.blocks[:2]
    check_towers(model, vocabulary=600)


def test_vit_b_32_has_147_quantizable_modules():
    with torch.device("meta"):
        model = open_clip.CLIP(
            **{k: v for k, v in open_clip.get_model_config("ViT-B-32").items() if k != "custom_text"}
        )
        records = make_explicit(model)
    assert len(records) == 24
    modules = quantizable(model)
    assert len(modules) == 24 * 6 + 3 == 147
    assert sum(isinstance(module, QKVLinear) for module in modules) == 24
    assert sum(isinstance(module, MatMul) for module in modules) == 48
    assert sum(isinstance(module, Projection) for module in modules) == 2
    assert isinstance(model.visual.proj, Projection)
    assert isinstance(model.text_projection, Projection)


def test_second_call_changes_nothing():
    model = build(CONFIGS["coca"])
    records = make_explicit(model)
    modules = list(model.modules())
    assert make_explicit(model) == records
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True, "scale_attn_norm": True}, {"class_token": False, "global_pool": "map"}]
)
def test_timm_vit_equals_the_original(options):
    pool = options.get("global_pool", "token")
    options = {**options, "global_pool": pool}
    model = randomize(
        VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=8, **options)
    )
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    records = make_explicit(model)
    assert_rewritten(records)
    assert len(records) == (3 if pool == "map" else 2)
    assert_same(model(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("qkv_fused", [True, False])
@pytest.mark.parametrize("attn_type", ["eva", "rope"])
@pytest.mark.parametrize("rotate_half", [True, False])
def test_timm_eva_with_rotary_embedding_equals_the_original(qkv_fused, attn_type, rotate_half):
    options = {
        "scale_attn_inner": True,
        "rope_rotate_half": rotate_half,
        "qkv_fused": qkv_fused,
        "attn_type": attn_type,
    }
    model = Eva(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=8, use_rot_pos_emb=True, **options
    )
    randomize(model)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    assert_rewritten(make_explicit(model))
    assert_same(model(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("mask", ["bool", "float", "causal"])
def test_timm_masks_keep_where_true(mask):
    holder = nn.ModuleDict({"attn": randomize(timm.layers.Attention(16, 2, qkv_bias=True))})
    options = {
        "bool": {"attn_mask": torch.rand(6, 6) > 0.3},
        "float": {"attn_mask": torch.randn(6, 6)},
        "causal": {"is_causal": True},
    }[mask]
    if mask == "bool":
        options["attn_mask"].fill_diagonal_(True)
    x = torch.randn(2, 6, 16)
    expected = holder["attn"](x, **options)
    make_explicit(holder)
    assert_same(holder["attn"](x, **options), expected)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(6, 6), (4, 6, 6), (2, 2, 6, 6)])
@pytest.mark.parametrize("boolean", [True, False])
def test_open_clip_masks_hide_where_true(shape, boolean):
    holder = nn.ModuleDict({"attn": randomize(Attention(16, 2, qk_norm=True, scale_heads=True, inner_norm=True))})
    mask = (torch.rand(shape) > 0.7) & ~torch.eye(6, dtype=torch.bool) if boolean else torch.randn(shape)
    x = torch.randn(2, 6, 16)
    expected = holder["attn"](x, attn_mask=mask)
    make_explicit(holder)
    assert_same(holder["attn"](x, attn_mask=mask), expected)


@torch.no_grad()
def test_scaled_cosine_attention_follows_its_definition():
    """The original multiplies 4-D tensors with bmm, which torch refuses, so the oracle is the formula, head by head."""
    attention = randomize(Attention(16, 2, scaled_cosine=True))
    attention.logit_scale.add_(torch.tensor([0.3, 5.0]).view(2, 1, 1))  # the second is above the clamp
    x, mask = torch.randn(3, 6, 16), torch.full((6, 6), float("-inf")).triu_(1)
    heads = []
    for head in range(2):
        rows = [slice(part * 16 + head * 8, part * 16 + head * 8 + 8) for part in range(3)]
        q, k, v = (x @ attention.in_proj_weight[row].T + attention.in_proj_bias[row] for row in rows)
        cosine = torch.einsum("bid,bjd->bij", q, k) / (q.norm(dim=-1)[:, :, None] * k.norm(dim=-1)[:, None, :])
        scale = min(float(attention.logit_scale[head].exp()), 100.0)
        heads.append((scale * cosine + mask).softmax(-1) @ v)
    expected = attention.out_proj(torch.cat(heads, dim=-1))
    holder = nn.ModuleDict({"attn": attention})
    assert_rewritten(make_explicit(holder))
    torch.testing.assert_close(holder["attn"](x, mask), expected, rtol=1e-4, atol=1e-4)  # scale 100 enlarges rounding


def test_resnet_pool_computes_the_pooled_query_only():
    model = build(CONFIGS["resnet"])
    make_explicit(model)
    shapes = {}
    model.visual.attnpool.qk.register_forward_hook(lambda *hook: shapes.update(qk=hook[2].shape))
    model.encode_image(torch.randn(2, 3, 64, 64))
    assert shapes["qk"] == (2, 4, 1, 2 * 2 + 1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "roberta", "xlm_roberta"])
def test_hugging_face_encoders_equal_the_original(family):
    transformers = pytest.importorskip("transformers", minversion="5", reason="the text tower of Hugging Face models")
    name = {"bert": "Bert", "roberta": "Roberta", "xlm_roberta": "XLMRoberta"}[family]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = getattr(transformers, f"{name}Config")(vocab_size=50, max_position_embeddings=40, **sizes)
    model = randomize(getattr(transformers, f"{name}Model")(config))
    tokens = torch.randint(3, 50, (2, 9))
    attention_mask = (torch.arange(9) < torch.tensor([[9], [5]])).long()
    expected = model(input_ids=tokens, attention_mask=attention_mask).last_hidden_state
    records = make_explicit(model)
    assert_rewritten(records)
    assert len(records) == 2
    found = model(input_ids=tokens, attention_mask=attention_mask).last_hidden_state
    valid = attention_mask.bool()
    assert_same(found[valid], expected[valid])


def test_unknown_attention_is_listed_as_left_fused(caplog):
    class StrangeAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

    model = nn.ModuleDict({"block": nn.ModuleDict({"attn": StrangeAttention()}), "known": nn.MultiheadAttention(4, 2)})
    records = {record.name: record for record in make_explicit(model)}
    assert set(records) == {"block.attn", "known"}
    assert not records["block.attn"].explicit
    assert "no explicit counterpart" in records["block.attn"].reason
    assert records["known"].explicit
    assert "block.attn" in caplog.text


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_unsupported_variants_are_left_fused_with_their_reason(options):
    holder = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, **options)})
    (record,) = make_explicit(holder)
    assert not record.explicit
    assert "not supported" in record.reason
    assert isinstance(holder["attn"], nn.MultiheadAttention)


def test_weights_are_copies_or_moved_never_shared_with_the_fused_original():
    model = build(CONFIGS["vit"])
    before = copy.deepcopy(model.state_dict())
    make_explicit(model)
    qkv = model.transformer.resblocks[0].attn.qkv_proj
    assert torch.equal(qkv.weight, before["transformer.resblocks.0.attn.in_proj_weight"])
    assert torch.equal(qkv.bias, before["transformer.resblocks.0.attn.in_proj_bias"])
    assert torch.equal(model.visual.proj.weight, before["visual.proj"].T)
    assert all(isinstance(block.attn, ExplicitAttention) for block in model.visual.transformer.resblocks)
