"""The objective of many pairs of grids at once, against one pair after the other."""

import pytest
import torch
from torch import nn

from lit_clipq.calibration.observations import Observations
from lit_clipq.nn.layout import ROWS
from lit_clipq.search import losses
from tests.search.test_layer import MAKERS, search_of

FIRST, SECOND = [20, 60, 82, 99], [[10], [50], [82]]


def searched(kind, distance="hessian", parts=1):
    layer, inputs, weight = MAKERS[kind](4)
    return search_of(layer, inputs, weight, parts, distance=distance, factored=False)


def one_pair(search, first, second, channel):
    """The objective of a pair, rounded by the quantizers of the layer itself."""
    module = search.module
    for name, index in zip(search.losses.names, (first, second), strict=True):
        search.candidates[name].commit(index)
    total = 0.0
    for o in search.data:
        left, right = search.losses.names
        if search.losses.weight is None:
            output = module.input_quantizers[left](o.inputs[0]) @ module.input_quantizers[right](o.inputs[1])
        else:
            weight = module.weight_quantizer(module.weight.detach())
            output = module.product_with(weight, module.input_quantizers[right](o.inputs[0]))
        error = (output - o.target).double() ** 2 * o.weight
        axis = 1 if o.target.dim() == 4 else -1
        total += error.sum() if channel is None else error.movedim(axis, 0)[channel].sum()
    return total.item()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("workspace", [2**20, 8])
def test_a_table_holds_the_objective_of_every_pair(kind, workspace, monkeypatch):
    monkeypatch.setitem(losses._WORKSPACE, "cpu", workspace)
    search = searched(kind, parts=2)
    channels = search.candidates[search.losses.names[0]].channels
    first = torch.tensor(FIRST)[:, None].expand(-1, channels)
    table = search.losses.losses(search.data, first, torch.tensor(SECOND))
    assert table.shape == (4, 3, channels)
    weighted = search.losses.weight is not None
    for i in range(4):
        for j in range(3):
            for channel in range(channels):
                want = one_pair(search, first[i], torch.tensor(SECOND[j]), channel if weighted else None)
                assert table[i, j, channel].item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_channels_add_up_and_every_nth_is_one_of_them(kind):
    search = searched(kind)
    channels = search.candidates["weight"].channels
    first, second = torch.tensor(FIRST)[:, None].expand(-1, channels), torch.tensor(SECOND)
    table = search.losses.losses(search.data, first, second)
    together = search.losses.losses(search.data, first, second, per_channel=False)
    torch.testing.assert_close(table.sum(-1, keepdim=True), together, rtol=1e-6, atol=0)
    if kind == "linear":
        some = search.losses.losses(search.data, first[:, ::2], second, step=2)
        torch.testing.assert_close(some, table[..., ::2], rtol=1e-6, atol=0)


def test_an_operand_without_candidates_stays_float():
    search = searched("linear")
    exact = search.losses.losses(search.data, None, None)
    assert exact.shape == (1, 1, 6)
    assert exact.abs().max() < 1e-8  # the target is recomputed by another kernel


def test_a_rank_without_units_adds_nothing():
    search = searched("linear")
    first, second = torch.tensor(FIRST)[:, None].expand(-1, 6), torch.tensor(SECOND)
    empty = Observations(
        ROWS, (torch.zeros(0, 5),), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 6), torch.zeros(0, 6)
    )
    assert search.losses.losses([empty], first, second).abs().sum() == 0
    assert search.losses.losses([], first, second).shape == (4, 3, 6)


def test_candidates_are_rounded_to_the_bits_of_the_frozen_layer():
    search = searched("linear")
    for name, x in (("weight", nn.Parameter(search.module.weight)), ("input", search.data[0].inputs[0])):
        family = search.candidates[name]
        index = torch.tensor(FIRST)[:, None].expand(-1, family.channels)
        many = family.apply(x.detach(), index)
        for i, one in enumerate(index):
            family.commit(one)
            quantizer = search.module.weight_quantizer if name == "weight" else search.module.input_quantizers[name]
            assert torch.equal(many[i], quantizer(x.detach()))


def test_a_cosine_is_that_of_products_with_their_bias():
    layer, inputs, weight = MAKERS["linear"](4)
    layer.bias.data += 5
    search = search_of(layer, inputs, weight, distance="cosine")
    first, second = search.problem.pick()
    found = search.losses.losses(search.data, first, second, per_channel=False).item()
    assert found == pytest.approx(search._assess()[0], rel=1e-4)
