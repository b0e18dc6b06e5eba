"""Units drawn for a comparison: their sums are those of all units, on average and within the error asked for."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_clipq.calibration.batches import hashed
from lit_clipq.calibration.observations import Observations, joined
from lit_clipq.nn.layout import PAIRS, PATCHES, ROWS
from lit_clipq.search.sampling import Sampler

CPU = torch.device("cpu")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def rows(count=4000, channels=32, heavy=20, seed=0):
    """Rows of which a few cost a thousand times as much as the others."""
    weight = torch.rand(count, channels, generator=generator(seed))
    weight[:: count // heavy] *= 1000
    inputs = torch.randn(count, 8, generator=generator(seed + 1))
    keys = torch.arange(count) + seed * count
    return Observations(ROWS, (inputs,), keys, weight, torch.zeros(count, channels))


def drawn_from(o, cost, error):
    sampler = Sampler([o], [cost], CPU)
    return sampler.sample(error)[0]


@pytest.mark.parametrize("error", [0.05, 0.02])
def test_the_weighted_sum_has_the_error_asked_for(error):
    found = []
    for seed in range(40):
        o = rows(channels=700, seed=seed)  # wide rows, so that few are enough
        drawn = drawn_from(o, o.weight.sum(1), error)
        assert len(drawn.keys) < len(o.keys)
        found.append((drawn.weight.sum() / o.weight.sum() - 1).item())
    spread = torch.tensor(found).square().mean().sqrt().item()
    assert error / 4 < spread < 1.3 * error  # 40 draws tell a standard error to about a tenth
    assert abs(sum(found) / len(found)) < error / 2


def test_rows_that_cost_most_are_always_drawn():
    o = rows()
    drawn = drawn_from(o, o.weight.sum(1), 0.02)
    heavy = o.keys[:: 4000 // 20]
    assert bool(torch.isin(heavy, drawn.keys).all())


def test_fewer_are_drawn_for_a_larger_error_and_all_for_none():
    o = rows()
    counts = [len(drawn_from(o, o.weight.sum(1), error).keys) for error in (0.2, 0.05, 0.02, 0.0)]
    assert counts == sorted(counts)
    assert counts[-1] == 4000


def test_small_layers_are_taken_whole():
    o = rows(count=20, channels=4, heavy=2)
    assert len(drawn_from(o, o.weight.sum(1), 0.5).keys) == 20


def test_what_is_drawn_does_not_depend_on_how_it_is_cut():
    o = rows()
    cost = o.weight.sum(1)
    parts = [o.select(slice(0, 1500)), o.select(slice(1500, None))]
    cut = Sampler(parts, [cost[:1500], cost[1500:]], CPU).sample(0.05)
    assert torch.equal(torch.cat([p.keys for p in cut]), drawn_from(o, cost, 0.05).keys)


def products(units=50, m=20, k=6, n=30):
    a, b = torch.randn(units, m, k, generator=generator(0)), torch.randn(units, k, n, generator=generator(1))
    weight = torch.rand(units, m, n, generator=generator(2))
    weight[:, 0] *= 500  # the first query of each
    return Observations(PAIRS, (a, b), torch.arange(units), weight, a @ b)


def test_rows_of_matrix_products_are_drawn_with_their_right_operand():
    o = products()
    drawn = drawn_from(o, o.weight.sum(2), 0.1)
    left, right = drawn.inputs
    assert left.shape[1] < 20
    assert len(left) == len(right) == len(drawn.keys)
    torch.testing.assert_close(left @ right, drawn.target)
    assert (drawn.weight.sum() / o.weight.sum()).item() == pytest.approx(1, abs=0.3)


def test_unequal_numbers_of_rows_are_filled_up_with_weight_0():
    o = products()
    drawn = drawn_from(o, o.weight.sum(2), 0.1)
    counts = (drawn.weight.sum(2) > 0).sum(1)
    assert counts.min() < counts.max() == drawn.weight.shape[1]


def test_positions_of_a_convolution_are_drawn_as_rows():
    conv = nn.Conv2d(2, 8, 3, padding=1, bias=False)
    x = torch.randn(30, 2, 12, 12, generator=generator(0))
    target = conv(x).detach()
    weight = torch.rand(target.shape, generator=generator(1)) ** 4
    o = Observations(PATCHES, (x,), torch.arange(30) * 2**24, weight, target)
    (drawn,) = Sampler([o], [weight.sum(1).flatten(1)], CPU, conv).sample(0.02)
    assert drawn.inputs[0].shape[1:] == (18,)
    assert len(drawn.keys) < 30 * 144
    torch.testing.assert_close(drawn.inputs[0] @ conv.weight.detach().flatten(1).T, drawn.target, rtol=1e-4, atol=1e-5)
    assert (drawn.weight.sum() / weight.sum()).item() == pytest.approx(1, abs=0.08)


def test_ranges_of_left_out_rows_survive_joining():
    seen = [Observations(ROWS, (torch.zeros(2, 3),), torch.arange(2), extremes=(e,)) for e in EXTREMES]
    assert [o.range_of(0).tolist() for o in seen] == [[-5.0, 1.0], [-2.0, 7.0]]
    (whole,) = joined(seen)
    (extremes,) = whole.extremes
    assert extremes.tolist() == [[-5.0, -2.0, 0.0], [1.0, 7.0, 0.5]]
    assert whole.range_of(0).tolist() == [-5.0, 7.0]


EXTREMES = (
    torch.tensor([[-5.0, -1.0, 0.0], [0.5, 1.0, 0.0]]),  # minimum and maximum of each channel
    torch.tensor([[-1.0, -2.0, 0.0], [1.0, 7.0, 0.5]]),
)


def test_a_share_of_the_tokens_and_a_draw_of_them_are_independent():
    o = rows(count=8000, channels=700, heavy=80)
    kept = o.select(hashed(o.keys).double() / 2**31 < 0.25)
    drawn = drawn_from(kept, kept.weight.sum(1), 0.05)
    assert len(drawn.keys) < len(kept.keys)
    light, all_light = (x.weight[x.keys % 100 != 0].sum() for x in (drawn, kept))  # every 100th row is dear
    assert (light / all_light).item() == pytest.approx(1, abs=0.5)


def test_samples_far_apart_draw_rows_of_their_own():
    o = replace(products(units=300), keys=torch.arange(300) * 2**24)
    chosen = [set(), set()]
    drawn = drawn_from(o, o.weight.sum(2), 0.1)
    for offset in (0, 128):
        for place, key in enumerate((drawn.keys // 2**24).tolist()):
            if offset <= key < offset + 128:
                rows_of = drawn.inputs[0][place][drawn.weight[place].sum(1) > 0]
                found = (o.inputs[0][key][:, None] == rows_of[None]).all(-1).any(1)
                chosen[offset // 128].update((key - offset, int(row)) for row in found.nonzero() if row > 0)
    assert chosen[0]
    assert len(chosen[0] & chosen[1]) < 0.5 * len(chosen[0])


def test_pictures_without_influence_draw_nothing():
    conv = nn.Conv2d(2, 8, 3, padding=1, bias=False)
    nothing = torch.zeros(0, 8, 4, 4)
    empty = Observations(PATCHES, (torch.zeros(0, 2, 4, 4),), torch.zeros(0, dtype=torch.int64), nothing, nothing)
    x = torch.randn(60, 2, 12, 12, generator=generator(0))
    target = conv(x).detach()
    o = Observations(PATCHES, (x,), torch.arange(60), torch.rand(target.shape, generator=generator(1)), target)
    sampler = Sampler([o, empty], [o.weight.sum(1).flatten(1), torch.zeros(0, 16)], CPU, conv)
    drawn = sampler.sample(0.1)
    assert 0 < len(drawn[0].keys) < 60 * 144
    assert len(drawn[1].keys) == 0


def test_a_convolution_with_few_patches_becomes_rows_though_all_are_taken(monkeypatch):
    conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    x = torch.randn(2, 2, 4, 4, generator=generator(0))
    target = conv(x).detach()
    o = Observations(PATCHES, (x,), torch.arange(2), torch.rand(target.shape, generator=generator(1)), target)
    sampler = Sampler([o], [o.weight.sum(1).flatten(1)], CPU, conv)
    assert sampler.by_rows(0.0)
    (drawn,) = sampler.sample(0.0)
    assert drawn.inputs[0].shape == (2 * 16, 2 * 9)
    torch.testing.assert_close(drawn.inputs[0] @ conv.weight.detach().flatten(1).T, drawn.target)
    torch.testing.assert_close(drawn.target, target.movedim(1, -1).flatten(0, 2))
    torch.testing.assert_close(drawn.weight, o.weight.movedim(1, -1).flatten(0, 2))
    monkeypatch.setattr("lit_clipq.search.sampling._FEW_PATCHES", 0)
    sampler = Sampler([o], [o.weight.sum(1).flatten(1)], CPU, conv)
    assert not sampler.by_rows(0.0)
    assert sampler.sample(0.0)[0] is o


def test_how_far_texts_are_padded_does_not_change_what_is_drawn():
    """Rows and columns behind a text's end are zero, and how many there are depends on its batch."""
    shape, found = (400, 12, 12), []
    target, weight = torch.randn(shape, generator=generator(0)), torch.rand(shape, generator=generator(1)) ** 8
    left, right = torch.randn(400, 12, 5, generator=generator(2)), torch.randn(400, 5, 12, generator=generator(3))
    for padded in (0, 7):
        wide = (0, padded, 0, padded)
        operands = F.pad(left, (0, 0, 0, padded)), F.pad(right, (0, padded))
        o = Observations(PAIRS, operands, torch.arange(400), F.pad(weight, wide), F.pad(target, wide))
        drawn = drawn_from(o, o.weight.sum(2), 0.2)
        assert len(drawn.keys) < 400
        found.append((drawn.keys, drawn.weight[..., :12], drawn.inputs[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_of_products_without_a_gradient_do_not_count_as_seen():
    """In the last block of a tower that is pooled at one token only that token's row of a product matters."""
    target, weight = torch.randn(4000, 10, 16, generator=generator(0)), torch.zeros(4000, 10, 16)
    weight[:, 0] = torch.rand(4000, 16, generator=generator(1))
    left, right = torch.randn(4000, 10, 5, generator=generator(2)), torch.randn(4000, 5, 16, generator=generator(3))
    drawn = drawn_from(Observations(PAIRS, (left, right), torch.arange(4000), weight, target), weight.sum(2), 0.5)
    assert 2**14 / 16 <= len(drawn.keys) < 4000
    assert drawn.inputs[0].shape[1] == 1
