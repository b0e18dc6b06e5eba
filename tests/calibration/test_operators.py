"""Multiply-accumulates of operators: against sums by hand, and against torch's counter where it knows the operator."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_clipq.calibration.operators import OperatorCount
from lit_clipq.calibration.profile import profile
from lit_clipq.models import make_explicit
from lit_clipq.nn.swap import find_layers

MODES = {"gradients": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def counted(run):
    with OperatorCount() as count:
        run()
    return count.macs


def by_torch(run):
    """Count products one by one: fused attention is computed from them, where torch's counter sees them."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() // 2


def products():
    x = torch.randn(2, 6, 8)
    maps = torch.randn(2, 4, 9, 7)
    linear, conv = nn.Linear(8, 5), nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    back, line = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.Conv1d(6, 4, 3)
    heads = torch.randn(2, 3, 6, 8)
    mask = torch.randn(6, 4)
    return {
        "linear": lambda: linear(x),
        "matmul": lambda: x @ x.transpose(1, 2),
        "einsum": lambda: torch.einsum("bld,kd->blk", x, x[0]),
        "conv2d": lambda: conv(maps),
        "transposed": lambda: back(maps),
        "conv1d": lambda: line(x),
        "attention": lambda: F.scaled_dot_product_attention(heads, heads[:, :, :4], heads[:, :, :4]),
        "masked_attention": lambda: F.scaled_dot_product_attention(heads, heads[:, :, :4], heads[:, :, :4], mask),
        "causal_attention": lambda: F.scaled_dot_product_attention(heads, heads, heads, is_causal=True),
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", products())
def test_products_are_counted_as_torch_counts_them(name, mode):
    run = products()[name]
    expected = by_torch(run)
    assert expected > 0
    with MODES[mode]():
        assert counted(run) == expected


def test_fused_attention_of_the_cpu_counts_both_its_products():
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    assert counted(lambda: fused(q, k, v)) == 2 * 3 * 5 * 7 * (8 + 8)


def test_matrix_vector_products_count():
    a, b = torch.randn(3, 4), torch.randn(4)
    assert counted(lambda: a @ b) == 12
    assert counted(lambda: b @ b) == 4


def test_attention_and_encoder_layer_in_one_operator_count_as_their_parts():
    width, heads, hidden, length = 32, 4, 48, 5
    x = torch.randn(2, length, width)
    attention = nn.MultiheadAttention(width, heads, batch_first=True).eval()
    layer = nn.TransformerEncoderLayer(width, heads, hidden, batch_first=True).eval()
    expected = 2 * (length * width * 3 * width + 2 * length * length * width + length * width * width)
    seen = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        assert counted(lambda: attention(x, x, x)) == expected
        assert counted(lambda: layer(x)) == expected + 2 * 2 * length * width * hidden
        with Names():
            attention(x, x, x)
            layer(x)
    assert any("_native_multi_head_attention" in name for name in seen)
    assert any("_transformer_encoder_layer_fwd" in name for name in seen)


class ReadsWeights(nn.Module):
    """Reads the weight of one layer without calling it, and never touches another."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.idle = nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(3, 3)

    def forward(self, x):
        return F.linear(self.called(x), self.read.weight)


def test_a_weight_that_is_read_counts_outside_of_layers_and_its_layer_not_at_all():
    net = ReadsWeights()
    found = profile({"net": net}, find_layers({"net": net}), net, torch.randn(5, 8), 5)
    assert found.macs == {"net.called": 48, "net (products outside of layers)": 24}
    assert set(found.input_elements) == {"net.called"}


def test_no_gradient_hook_is_left_on_a_view_taken_without_gradients():
    """timm's pooling expands a Parameter; hooks on such a view fail."""
    latent = nn.Parameter(torch.randn(1, 1, 8))
    layer = nn.Linear(8, 8)
    with torch.enable_grad(), torch.no_grad():
        assert counted(lambda: layer(latent.expand(3, -1, -1))) == 3 * 64


def test_layers_of_torch_transformers_are_called_once_explicit():
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    net = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2)}).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = net["encoder"](x)
        make_explicit(net)
        layers = find_layers({"net": net})
        found = profile({"net": net}, layers, net["encoder"], x, 2)
        torch.testing.assert_close(net["encoder"](x), expected, rtol=1e-5, atol=1e-5)
    assert {layer.name.rpartition(".")[2] for layer in layers} == {"linear1", "linear2"}
    assert all(found.macs[layer.name] == 5 * 16 * 24 for layer in layers)
    attention = 2 * (5 * 16 * 64 + 2 * 25 * 16)
    assert found.macs["net (products outside of layers)"] == attention
