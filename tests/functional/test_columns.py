"""Rounding column by column against the procedures written out: inverses by elimination, least squares by numpy."""

import numpy as np
import pytest
import torch

from lit_clipq.functional.columns import asymmetric_push, damped, inverse_factor, round_columns, round_halves

ROWS, COLUMNS = 5, 150  # more columns than are updated at once


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(groups=1, columns=COLUMNS):
    mix = torch.randn(columns, columns, generator=generator(), dtype=torch.float64)
    x = torch.randn(groups, 400, columns, generator=generator(1), dtype=torch.float64) @ mix
    weight = torch.randn(groups, ROWS, columns, generator=generator(2), dtype=torch.float64)
    scale = torch.rand(groups, ROWS, 1, generator=generator(3), dtype=torch.float64).add(0.3).expand_as(weight)
    low, high = torch.full_like(weight, -4), torch.full_like(weight, 3)
    return x, weight, scale, low, high


def nearest(values, scale, low, high):
    return np.clip(np.round(values / scale), low, high)


def by_elimination(weight, hessian, scale, low, high):
    """Optimal brain quantization in fixed order: the inverse loses a row and a column with each that is rounded."""
    weight, inverse = weight.copy(), np.linalg.inv(hessian)
    steps = np.zeros_like(weight)
    for i in range(weight.shape[1]):
        steps[:, i] = nearest(weight[:, i], scale[:, i], low[:, i], high[:, i])
        error = (weight[:, i] - scale[:, i] * steps[:, i]) / inverse[i, i]
        weight -= np.outer(error, inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return steps


@pytest.mark.parametrize("groups", [1, 3])
def test_columns_are_rounded_as_by_elimination(groups):
    x, weight, scale, low, high = problem(groups)
    hessian, _ = damped(x.mT @ x, 0.01)
    factor, good = inverse_factor(hessian)
    steps = round_columns(weight, factor, scale, low, high)
    assert good.all()
    for g in range(groups):
        expected = by_elimination(*(t[g].numpy() for t in (weight, hessian, scale, low, high)))
        assert np.array_equal(steps[g].numpy(), expected)


def test_the_factor_is_that_of_the_inverse_and_its_absence_is_told():
    x, *_ = problem(2, 20)
    hessian = x.mT @ x
    hessian[1, 0, 0] = -1
    factor, good = inverse_factor(hessian)
    assert good.tolist() == [True, False]
    assert torch.equal(factor[0], factor[0].triu())
    torch.testing.assert_close(factor[0].mT @ factor[0], torch.linalg.inv(hessian[0]), rtol=1e-8, atol=1e-10)


def test_damping_is_a_share_of_the_mean_of_what_is_alive():
    hessian = torch.diag(torch.tensor([4.0, 0.0, 2.0], dtype=torch.float64))[None]
    regular, dead = damped(hessian, 0.1)
    assert dead.tolist() == [[False, True, False]]
    assert regular[0].diagonal().tolist() == pytest.approx([4.3, 1.0, 2.3])


def test_what_the_rounded_input_asks_for_is_passed_on_column_by_column():
    x, weight, scale, low, high = problem()
    rounded = x + torch.randn(x.shape, generator=generator(4), dtype=torch.float64)
    hessian, _ = damped(rounded.mT @ rounded, 0.01)
    factor, _ = inverse_factor(hessian)
    deviation = (x - rounded).mT @ rounded
    steps = round_columns(weight, factor, scale, low, high, asymmetric_push(factor, deviation, 0.25))
    u, d, w = factor[0].numpy(), deviation[0].numpy(), weight[0].numpy().copy()
    push = 0.25 * np.triu(d @ u.T, 1) @ u
    expected = np.zeros_like(w)
    for i in range(COLUMNS):
        expected[:, i] = nearest(w[:, i], scale[0, :, i].numpy(), -4, 3)
        error = (w[:, i] - scale[0, :, i].numpy() * expected[:, i]) / u[i, i]
        w[:, i:] += np.outer(w[:, i], push[i, i:]) - np.outer(error, u[i, i:])
    assert np.array_equal(steps[0].numpy(), expected)
    nothing = asymmetric_push(factor, torch.zeros_like(deviation), 0.25)
    plain = round_columns(weight, factor, scale, low, high)
    assert torch.equal(round_columns(weight, factor, scale, low, high, nothing), plain)
    assert not torch.equal(steps, plain)


def test_halves_are_rounded_and_the_rest_answers_by_least_squares():
    x, weight, scale, low, high = problem(columns=13)
    steps = round_halves(weight, x.mT @ x, scale, low, high)
    inputs, left, s = x[0].numpy(), weight[0].numpy().copy(), scale[0].numpy()
    expected, start = np.zeros_like(left), 0
    for size in (7, 3, 2, 1):
        now = slice(start, start + size)
        expected[:, now] = nearest(left[:, now], s[:, now], -4, 3)
        change = inputs[:, now] @ (s[:, now] * expected[:, now] - left[:, now]).T  # what the products gain
        start += size
        if start < left.shape[1]:
            left[:, start:] -= np.linalg.lstsq(inputs[:, start:], change, rcond=None)[0].T
    assert np.array_equal(steps[0].numpy(), expected)


def test_correlated_inputs_are_served_better_than_by_nearest_rounding():
    x, weight, scale, low, high = problem()
    hessian, _ = damped(x.mT @ x, 0.01)
    simple = (weight / scale).round().clamp(low, high)

    def cost(steps):
        change = weight - scale * steps
        return ((change @ (x.mT @ x)) * change).sum().item()

    assert cost(round_columns(weight, inverse_factor(hessian)[0], scale, low, high)) < 0.7 * cost(simple)
    assert cost(round_halves(weight, hessian, scale, low, high)) < 0.8 * cost(simple)
