"""Subclasses of torch's layers: plain ones with the same output, or not taken for what they are not."""

import pytest
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.layers.linear import Linear
from torch import nn

from lit_clipq.models import make_explicit
from lit_clipq.nn.swap import find_layers

CONVS = {
    "same": lambda: Conv2dSame(3, 4, 3, stride=2),
    "same_dilated": lambda: Conv2dSame(3, 4, (3, 5), dilation=2, groups=1),
    "standardised": lambda: StdConv2d(3, 4, 3, bias=True),
    "standardised_same": lambda: StdConv2dSame(3, 4, 3, stride=2),
    "scaled": lambda: ScaledStdConv2d(4, 4, 3, groups=2, gamma=1.7),
    "scaled_same": lambda: ScaledStdConv2dSame(3, 4, 3, stride=2),
}


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 9), (7, 6)])
@pytest.mark.parametrize("name", CONVS)
def test_convolutions_become_plain_with_the_same_output(name, size):
    net = nn.ModuleDict({"conv": CONVS[name]()})
    if hasattr(net["conv"], "gain"):
        net["conv"].gain.uniform_(0.5, 2)
    x = torch.randn(2, net["conv"].in_channels, *size)
    expected = net["conv"](x)
    assert not find_layers({"net": net})  # as it stands it is no convolution of torch's
    make_explicit(net)
    (layer,) = find_layers({"net": net})
    assert type(layer.module) is nn.Conv2d
    torch.testing.assert_close(net["conv"](x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_linear_of_timm_keeps_its_parameters():
    net = nn.ModuleDict({"fc": Linear(3, 2)})
    weight = net["fc"].weight
    make_explicit(net)
    assert type(net["fc"]) is nn.Linear
    assert net["fc"].weight is weight


@torch.no_grad()
def test_a_scaled_table_keeps_its_scale():
    transformers = pytest.importorskip("transformers", minversion="5", reason="the text towers of Hugging Face")
    embedding = transformers.models.m2m_100.modeling_m2m_100.M2M100ScaledWordEmbedding(9, 4, 1, embed_scale=3.0)
    net = nn.ModuleDict({"table": embedding})
    ids = torch.arange(9)
    expected = net["table"](ids)
    make_explicit(net)
    assert [layer.kind.name for layer in find_layers({"net": net})] == ["embedding"]
    torch.testing.assert_close(net["table"](ids), expected)


def test_an_unknown_subclass_is_no_quantizable_layer():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    net = nn.ModuleDict({"odd": Doubled(3, 3), "plain": nn.Linear(3, 3)})
    make_explicit(net)
    assert [layer.name for layer in find_layers({"net": net})] == ["net.plain"]
