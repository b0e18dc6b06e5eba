import copy

import pytest
import torch
from torch import nn

from lit_clipq.models import make_explicit
from lit_clipq.nn.attention import ExplicitAttention, Projection, QKVLinear, as_additive_mask
from lit_clipq.nn.matmul import MatMul

B, LQ, LK, D, H = 3, 5, 7, 12, 2
# float32 sums in another order: a few units in the last place of values around 1
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def explicit_of(mha):
    holder = nn.ModuleDict({"attn": copy.deepcopy(mha)})
    assert [record.explicit for record in make_explicit(holder)] == [True]
    return holder["attn"]


def random_mha(**options):
    mha = nn.MultiheadAttention(D, H, **options).eval()
    for parameter in mha.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mha


def test_matmul_multiplies():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    assert torch.equal(MatMul()(a, b), torch.matmul(a, b))


def test_qkv_linear_is_a_linear_with_segments():
    layer = QKVLinear(4, (6, 6, 2), bias=False)
    assert isinstance(layer, nn.Linear)
    assert layer.segments == (6, 6, 2)
    assert layer.weight.shape == (14, 4)


@pytest.mark.parametrize("leading", [(3,), (2, 3)])
def test_projection_equals_the_parameter_it_replaces(leading):
    weight = nn.Parameter(torch.randn(8, 4))
    layer = Projection.from_parameter(weight)
    x = torch.randn(*leading, 8)
    torch.testing.assert_close(x @ layer, x @ weight)
    torch.testing.assert_close(layer(x), x @ weight)


def test_any_module_with_rmatmul_can_take_the_place_of_a_projection():
    class Doubling(nn.Module):
        def __rmatmul__(self, x):
            return 2 * x

    x = torch.ones(2, 3)
    assert torch.equal(x @ Doubling(), 2 * x)


MASKS = {
    "none": lambda: None,
    "float": lambda: torch.randn(LQ, LK),
    "bool": lambda: torch.arange(LK) > torch.arange(LQ)[:, None] + 2,
    "per_head": lambda: torch.randn(B * H, LQ, LK),
}
PADDINGS = {
    "none": lambda: None,
    "bool": lambda: torch.arange(LK).expand(B, LK) >= torch.tensor([[7], [4], [2]]),
    "float": lambda: torch.randn(B, LK),
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_multihead_equals_torch_with_masks(batch_first, mask, padding):
    torch.manual_seed(0)
    mha = random_mha(batch_first=batch_first, kdim=10, vdim=8)
    q, k, v = torch.randn(B, LQ, D), torch.randn(B, LK, 10), torch.randn(B, LK, 8)
    if not batch_first:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    attn_mask, key_padding_mask = MASKS[mask](), PADDINGS[padding]()
    if attn_mask is not None and key_padding_mask is not None and attn_mask.dtype != key_padding_mask.dtype:
        key_padding_mask = as_additive_mask(key_padding_mask, torch.float32, true_means_masked=True)
        attn_mask = as_additive_mask(attn_mask, torch.float32, true_means_masked=True)
    options = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
    for weights_options in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        expected = mha(q, k, v, **options, **weights_options)
        found = explicit_of(mha)(q, k, v, **options, **weights_options)
        torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("bias", [True, False])
def test_multihead_equals_torch_on_one_input_and_on_three(bias):
    torch.manual_seed(0)
    mha = random_mha(batch_first=True, bias=bias)
    explicit = explicit_of(mha)
    x, y, z = torch.randn(B, LK, D), torch.randn(B, LK, D), torch.randn(B, LK, D)
    for inputs in ((x, x, x), (x, y, y), (x, y, z)):
        torch.testing.assert_close(explicit(*inputs), mha(*inputs), **TOLERANCE)


def test_gradients_equal_those_of_torch_and_reach_the_products():
    torch.manual_seed(0)
    mha = random_mha(batch_first=True)
    explicit = explicit_of(mha)
    seen = []
    explicit.qk.register_full_backward_hook(lambda *hook: seen.append(("qk", hook[2][0])))
    explicit.av.register_full_backward_hook(lambda *hook: seen.append(("av", hook[2][0])))
    causal = torch.full((LK, LK), float("-inf")).triu_(1)
    gradients = []
    for module in (mha, explicit):
        x = torch.linspace(-1, 1, B * LK * D).reshape(B, LK, D).requires_grad_()
        module(x, x, x, attn_mask=causal, need_weights=False)[0].square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    assert [name for name, _ in seen] == ["av", "qk"]
    assert all(torch.isfinite(gradient).all() and gradient.abs().max() > 0 for _, gradient in seen)


def test_scale_is_in_q_before_the_product_and_the_mask_is_added_after_it():
    torch.manual_seed(0)
    mha = random_mha(batch_first=True)
    explicit = explicit_of(mha)
    seen = {}

    def keep(module, args, output):
        seen["qk"] = (args[0], args[1], output)

    explicit.qk.register_forward_hook(keep)
    x = torch.randn(B, LK, D)
    explicit(x, x, x, attn_mask=torch.full((LK, LK), float("-inf")).triu_(1))
    q = (x @ mha.in_proj_weight[:D].T + mha.in_proj_bias[:D]).unflatten(-1, (H, -1)).transpose(1, 2)
    torch.testing.assert_close(seen["qk"][0], q * (D // H) ** -0.5, **TOLERANCE)
    assert torch.isfinite(seen["qk"][2]).all()


def test_dropout_acts_in_train_mode_only():
    torch.manual_seed(0)
    explicit = explicit_of(random_mha(batch_first=True, dropout=0.5))
    x = torch.randn(B, LK, D)
    assert torch.equal(explicit(x, x, x)[0], explicit(x, x, x)[0])
    explicit.train()
    assert not torch.equal(explicit(x, x, x)[0], explicit(x, x, x)[0])


def test_shared_projection_refuses_several_inputs():
    explicit = ExplicitAttention({"qkv_proj": QKVLinear(D, (D, D, D))}, nn.Linear(D, D), H)
    x, y = torch.randn(1, 2, D), torch.randn(1, 2, D)
    with pytest.raises(ValueError, match="from one input"):
        explicit.project(x, y, y)
    cross = ExplicitAttention({"q_proj": nn.Linear(D, D), "kv_proj": QKVLinear(D, (D, D))}, nn.Linear(D, D), H)
    with pytest.raises(ValueError, match="k and v from one input"):
        cross.project(x, x, y)


def test_segments_of_different_sizes_are_split_in_order():
    explicit = ExplicitAttention({"qkv_proj": QKVLinear(D, (4, 4, 8))}, nn.Linear(8, D), H)
    x = torch.randn(B, LK, D)
    q, k, v = explicit.project(x, x, x)
    flat = explicit.qkv_proj(x)
    for part, expected in zip((q, k, v), flat.split((4, 4, 8), dim=-1), strict=True):
        assert torch.equal(part.transpose(1, 2).flatten(2), expected)


def test_unknown_set_of_projections_is_refused():
    with pytest.raises(ValueError, match="qkv_proj"):
        ExplicitAttention({"q_proj": nn.Linear(D, D)}, nn.Linear(D, D), H)


def test_boolean_masks_follow_the_convention_asked_for():
    mask = torch.tensor([True, False])
    inf = float("inf")
    assert as_additive_mask(mask, torch.float32, true_means_masked=True).tolist() == [-inf, 0]
    assert as_additive_mask(mask, torch.float32, true_means_masked=False).tolist() == [0, -inf]
