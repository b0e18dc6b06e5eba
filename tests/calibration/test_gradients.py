"""What weighs an error, against Jacobians and probabilities written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_clipq.calibration.batches import Rows
from lit_clipq.calibration.objective import contrastive_cotangents, gauss_newton_cotangents, random_directions
from lit_clipq.calibration.passes import CalibrationSet, look
from lit_clipq.calibration.recorder import Recorder, Watched
from lit_clipq.nn.layout import ROWS
from lit_clipq.nn.modules import QLinear
from lit_clipq.nn.quantizer import UniformQuantizer

SAMPLES = 5


class Net(nn.Module):
    """Two layers with an activation between them, and outputs of length 1."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (
            QLinear(nn.Linear(*sizes), None, UniformQuantizer(4, symmetric=False)) for sizes in ((3, 4), (4, 3))
        )

    def forward(self, x):
        return self.after(self.first(x))

    def after(self, hidden):
        return F.normalize(self.second(F.gelu(hidden)), dim=-1)


def squared_gradients(net, x, directions):
    recorder = Recorder({"first": Watched(net.first, ROWS), "second": Watched(net.second, ROWS)})
    look(CalibrationSet([x], net), [recorder], cotangents=lambda *_: {"output": directions}, roots=[net])
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())
    return {name: seen[0].weight for name, seen in recorder.seen.items()}


def jacobians(net, x):
    """Jacobian of each sample's output by the output of the first layer, (N, 3, 4)."""
    hidden = net.first(x).detach()
    return torch.stack([torch.autograd.functional.jacobian(net.after, h) for h in hidden])


@pytest.mark.parametrize("draws", [1, 3])
def test_collected_weights_are_squares_of_the_jacobian_times_the_direction(draws):
    net, x = Net(), torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(1))
    directions = random_directions(torch.Size((SAMPLES, 3)), torch.arange(SAMPLES), 7, draws)
    found = squared_gradients(net, x, directions)["first"]
    expected = torch.einsum("kno,noh->knh", directions, jacobians(net, x)).square().sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)  # float32


def test_their_mean_is_the_gauss_newton_diagonal():
    net, x = Net(), torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(1))
    draws = 4000
    directions = random_directions(torch.Size((SAMPLES, 3)), torch.arange(SAMPLES), 7, draws)
    found = squared_gradients(net, x, directions)["first"] / draws
    diagonal = jacobians(net, x).square().sum(1) / 3
    torch.testing.assert_close(found, diagonal, rtol=0.15, atol=0.02 * diagonal.max().item())  # of 4,000 draws


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"seed": 1 << 31},
        {"output": 1},
        {"keys": torch.tensor([8])},
        {"keys": torch.tensor([7 + (1 << 32)])},
    ],
    ids=str,
)
def test_directions_depend_on_seed_output_and_sample(other):
    usual = {"shape": torch.Size((1, 64)), "keys": torch.tensor([7]), "seed": 0, "output": 0}
    directions = random_directions(**usual)
    assert torch.equal(directions, random_directions(**usual))
    assert (directions * random_directions(**usual | other)).sum().abs() < 0.6  # equal ones: 1; 5 deviations of chance


def test_the_outputs_of_a_sample_have_directions_of_their_own():
    outputs = {"image": torch.zeros(2, 64), "text": torch.zeros(2, 64)}
    rows = Rows(torch.arange(2))
    found = gauss_newton_cotangents(0, 1)(outputs, rows)
    assert not torch.equal(found["image"], found["text"])


def test_the_draws_of_a_seed_are_not_those_of_the_next():
    image, text = torch.eye(6), torch.eye(6).roll(1, 0)
    by_seed = [[contrastive_cotangents(image, text, 0.5, seed, draw)[0] for draw in range(2)] for seed in range(2)]
    assert not torch.equal(by_seed[0][1], by_seed[1][0])


def test_the_mean_square_of_the_contrastive_gradient_is_the_fisher_diagonal():
    generator = torch.Generator().manual_seed(2)
    image, text = (F.normalize(torch.randn(3, 4, generator=generator), dim=1) for _ in range(2))
    temperature, draws = 0.5, 3000
    found = torch.stack([contrastive_cotangents(image, text, temperature, seed)[0] for seed in range(draws)])
    by_image, by_text = ((image @ text.T / temperature).softmax(axis) for axis in (1, 0))
    expected = torch.zeros(3, 4)
    for n in range(3):
        for y in range(3):  # a text drawn for picture n
            score = by_image[n] - F.one_hot(torch.tensor(y), 3)
            expected[n] += by_image[n, y] * (score @ text / temperature).square()
        for m in range(3):  # a picture drawn for text m, which is n or not
            p = by_text[n, m]
            expected[n] += p * (1 - p) * (text[m] / temperature).square()
    torch.testing.assert_close(found.square().mean(0), expected, rtol=0.15, atol=0.02 * expected.max().item())
