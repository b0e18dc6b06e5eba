"""Distances as sums: against loops in float64, and over parts."""

import pytest
import torch

from lit_clipq.functional.distance import distance_from_sums, distance_sums, sums_of

SHAPES = {"rows": (6, 5), "products": (3, 4, 5), "maps": (2, 5, 3, 4)}


def data(shape):
    generator = torch.Generator().manual_seed(0)
    target, weight = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    return target + 0.1 * torch.randn(shape, generator=generator), target, weight


def expected(output, target, weight, distance, axis, per_channel):
    output, target, weight = (x.double().movedim(axis, -1).reshape(-1, x.shape[axis]) for x in (output, target, weight))
    error = output - target
    if distance == "cosine":
        dim = 0 if per_channel else 1
        cosine = torch.nn.functional.cosine_similarity(output, target, dim=dim, eps=0)
        return 1 - cosine if per_channel else (1 - cosine).sum()
    values = {"hessian": error**2 * weight, "l2": error**2, "l1": error.abs()}[distance]
    return values.sum(0) if per_channel else values.sum()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("distance", ["hessian", "l2", "l1", "cosine"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_distances_are_those_of_a_loop_in_float64(shape, distance, per_channel):
    output, target, weight = data(shape)
    axis = -3 if len(shape) == 4 else -1
    given = weight if distance == "hessian" else None
    sums = distance_sums(output.clone(), target, given, distance, axis=axis, per_channel=per_channel)
    assert sums.dtype == torch.float64
    assert sums.shape == (sums_of(distance, per_channel=per_channel), shape[axis] if per_channel else 1)
    found = distance_from_sums(sums, distance)
    want = expected(output, target, weight, distance, axis, per_channel)
    torch.testing.assert_close(found.squeeze(), want.squeeze(), rtol=1e-5, atol=1e-6)  # float32 terms


@pytest.mark.parametrize("distance", ["hessian", "l2", "l1", "cosine"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_parts_add_up_to_the_whole(distance, per_channel):
    output, target, weight = data((8, 5))
    options = {"distance": distance, "axis": -1, "per_channel": per_channel}
    weight = weight if distance == "hessian" else None
    whole = distance_sums(output.clone(), target, weight, **options)
    parts = [
        distance_sums(output[i::2].clone(), target[i::2], None if weight is None else weight[i::2], **options)
        for i in range(2)
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("distance", ["l2", "l1", "cosine"])
def test_a_row_of_weight_2_counts_twice_and_one_of_weight_0_not_at_all(distance):
    output, target, _ = data((3, 4, 5))
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0]).expand(3, 4)[..., None]
    options = {"axis": -1, "per_channel": False}
    found = distance_sums(output.clone(), target, weight, distance, **options)
    rows = [0, 1, 1, 3]
    want = distance_sums(output[:, rows].clone(), target[:, rows], None, distance, **options)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-9)
