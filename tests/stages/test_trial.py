"""A stage that may lose is judged on samples that it was not fitted to, and undone to the bit where it lost."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from lit_clipq import quantize
from lit_clipq.calibration.needs import Need, Write
from lit_clipq.nn.modules import QWeighted
from lit_clipq.nn.structure import add_bias
from lit_clipq.recipes import BitWidths, compose
from lit_clipq.stages import LayerStage
from lit_clipq.stages.trial import trial

UNIFORM = ["grids", {"search": {"distance": "l2"}}]


@dataclass(frozen=True)
class Shift(LayerStage):
    """Scale weight and grid of a layer, and add to its bias; remembers what it was given."""

    needs = frozenset({Need.OPERANDS})
    writes = frozenset({Write.WEIGHTS, Write.SCALES, Write.BIAS})
    seen: ClassVar[list] = []

    factor: float = 1.0
    bias: float = 0.0

    def fit(self, task):
        return trial(task, lambda data: self.shift(task, data))

    @torch.no_grad()
    def shift(self, task, data):
        self.seen.append(sorted({key // 2**24 for o in data.seen for key in o.keys.tolist()}))
        module = task.module
        if not isinstance(module, QWeighted):
            return None
        grid = module.weight_quantizer
        grid.load_parameters(grid.scale * self.factor, grid.zero_point)
        module.weight = nn.Parameter(module.weight * self.factor)
        if module.bias is None:
            task.structure.append(dict(add_bias(module, task.name)))
        module.bias = nn.Parameter(module.bias + self.bias)
        return {"factor": self.factor}


Shift.name = "shift"


def network(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6, bias=bias), nn.ReLU(), nn.Linear(6, 4))


def run(stages, net, x, **options):
    recipe = compose(stages, bits=BitWidths.resolve({"bits": 4}), **options)
    return quantize({"net": net}, [x], recipe, forward=net)


def rows(n=40):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_worse_leaves_no_trace(bias):
    plain, shifted = network(bias), network(bias)
    without = run(UNIFORM, plain, rows())
    report = run([*UNIFORM, Shift(1.5, 1.0)], shifted, rows())
    assert plain.state_dict().keys() == shifted.state_dict().keys()
    assert all(torch.equal(x, shifted.state_dict()[name]) for name, x in plain.state_dict().items())
    assert report.structure == without.structure == ()
    for told in report.stages["shift"].values():
        assert not told["kept"]
        assert told["after"] > told["before"]
        assert told["factor"] == 1.5


def test_what_is_no_worse_stays():
    report = run([*UNIFORM, Shift(1.0, 0.0)], network(bias=False), rows())
    assert [entry["layer"] for entry in report.structure] == ["net.0"]
    assert all(told["kept"] and told["after"] == told["before"] for told in report.stages["shift"].values())


def test_what_it_is_fitted_to_is_three_of_four_samples_whatever_the_batches():
    Shift.seen.clear()
    run([*UNIFORM, Shift()], network(), rows(12))
    assert Shift.seen == [[0, 2, 3, 4, 6, 7, 8, 10, 11]] * 2


@pytest.mark.parametrize("distance", ["l2", "hessian"])
def test_before_is_the_error_of_the_recipe_without_it_on_the_samples_held_out(distance):
    net, x = network(), rows(40)
    exact = copy.deepcopy(net)(x[1::4]).detach()
    first = copy.deepcopy(net)[0]
    report = run(["grids", {"search": {"distance": distance}}, Shift(1.5)], net, x)
    told = report.stages["shift"]
    with torch.no_grad():
        error = net[0](x[1::4]) - first(x[1::4])
        last = net[2](torch.relu(first(x[1::4]))) - exact
    if distance == "l2":
        assert told["net.0"]["before"] == pytest.approx(error.square().sum().item(), rel=1e-5)
        assert told["net.2"]["before"] == pytest.approx(last.square().sum().item(), rel=1e-5)
    else:  # a random direction of length 1 has squares of 1/4 each behind the last layer
        assert told["net.2"]["before"] == pytest.approx(last.square().sum().item() / 4, rel=1e-5)
        assert told["net.0"]["before"] != pytest.approx(error.square().sum().item(), rel=1e-2)


def test_a_single_sample_judges_nothing_and_keeps_nothing():
    plain, shifted = network(), network()
    run(UNIFORM, plain, rows(1))
    report = run([*UNIFORM, Shift(1.0, 0.0)], shifted, rows(1))
    assert all(torch.equal(x, shifted.state_dict()[name]) for name, x in plain.state_dict().items())
    assert report.stages["shift"]["net.0"] == {
        "before": 0.0, "after": 0.0, "kept": False, "reason": "no sample to be judged on"
    }  # fmt: skip
