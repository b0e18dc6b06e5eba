"""Activations that write into their input are quantized as those that do not."""

import copy

import pytest
import torch
from torch import nn

import lit_clipq
from lit_clipq.recipes import make_recipe


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Hardswish, nn.Mish])
def test_the_grid_behind_an_activation_does_not_depend_on_where_it_writes(activation):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), activation(), nn.Linear(16, 8)).eval()
    inplace = copy.deepcopy(plain)
    inplace[1].inplace = True
    x = torch.randn(64, 8)
    with torch.no_grad():
        expected = plain(x)
    for net in (plain, inplace):
        recipe = make_recipe("ptq4clip", equalize=False)
        lit_clipq.quantize({"net": net}, [x], recipe, forward=net)
    with torch.no_grad():
        assert torch.equal(inplace(x), plain(x))
        assert (inplace(x) - expected).norm() < 0.02 * expected.norm()
