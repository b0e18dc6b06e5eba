"""Biases by relative position as tables: equal to what timm computes in every forward pass."""

import pytest
import torch
from timm.layers import RelPosBiasTf, RelPosMlp
from torch import nn

from lit_clipq.models import make_explicit
from lit_clipq.models.attention.positions import PositionBias
from lit_clipq.models.attention.t5 import relative_buckets
from lit_clipq.nn.swap import find_layers

BIASES = {
    "cr": lambda: RelPosMlp((3, 4), num_heads=2, mode="cr"),
    "swin": lambda: RelPosMlp((4, 3), num_heads=2, mode="swin"),
    "prefix": lambda: RelPosMlp((3, 3), num_heads=2, mode="cr", prefix_tokens=1),
    "tensorflow": lambda: RelPosBiasTf((3, 5), num_heads=2),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", BIASES)
def test_tables_give_the_bias_of_the_original_and_leave_no_product(kind):
    net = nn.ModuleDict({"rel_pos": BIASES[kind]().eval()})
    for parameter in net.parameters():
        parameter.normal_()
    expected = net["rel_pos"].get_bias()
    make_explicit(net)
    assert isinstance(net["rel_pos"], PositionBias)
    assert not find_layers({"net": net})
    found = net["rel_pos"].get_bias()
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-5, atol=1e-5)
    scores = torch.randn(2, 2, *found.shape[-2:])
    assert torch.equal(net["rel_pos"](scores), scores + found)


def test_buckets_are_those_of_transformers():
    attention = pytest.importorskip("transformers.models.mt5.modeling_mt5", reason="the T5 text towers").MT5Attention
    distance = torch.arange(-300, 301)
    for count, farthest in ((32, 128), (16, 20), (8, 64)):
        expected = attention._relative_position_bucket(distance, True, count, farthest)
        assert torch.equal(relative_buckets(distance, count, farthest), expected)
