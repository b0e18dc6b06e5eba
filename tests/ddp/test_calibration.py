"""Two processes calibrate like one."""

import pytest
import torch

from lit_clipq.api import quantize
from lit_clipq.models import load_clip
from lit_clipq.recipes import BitWidths, make_recipe
from tests.ddp.processes import run_processes

RECIPES = {
    "vanilla": make_recipe("vanilla", bits=BitWidths.resolve({"bits": 6}), attention_products=True),
    "gauss_newton": make_recipe("ptq4clip", bits=BitWidths.resolve({"bits": 4})),
    "adalog": make_recipe("adalog", bits=BitWidths.resolve({"bits": 4}), include=("clip.*.1.*",)),
    "mixed_size": make_recipe(
        "mixed_size", bits=BitWidths.resolve({"weight_bits": 4}), include=("clip.visual.transformer.resblocks.1.*",)
    ),
    "llm_int8": make_recipe("llm_int8", bits=BitWidths.resolve({"bits": 8}), include=("clip.visual.*.0.*",)),
    "fisher": make_recipe("ptq4clip", bits=BitWidths.resolve({"bits": 4}), objective="fisher"),
}
TEXTS = ["a red star", "two blue cups on sand", "a big green tree left of a small black house", "a fish", "three keys"]


def calibrate(rank: int, world_size: int) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, tuple[float, float]]]]:
    """Calibrate with every recipe on this rank's samples."""
    found = {}
    for name, recipe in RECIPES.items():
        clip = load_clip("mini-vit", "mini")
        images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))[rank::world_size]
        texts = clip.preprocessing.tokenizer(TEXTS)[rank::world_size]
        batches = list(zip(images.split(1), texts.split(1), strict=True))  # so that kernels are the same for any shard
        report = quantize(clip.model, batches, recipe)
        found[name] = clip.model.state_dict(), {layer: (r.before, r.after) for layer, r in report.layers.items()}
    return found


@pytest.fixture(scope="module")
def calibrated():
    """What each of two processes found, and one alone, which runs on one thread as they do."""
    return (
        *run_processes(calibrate, 2, world_size=2, timeout=400),
        *run_processes(calibrate, 1, world_size=1, timeout=400),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_take_the_scales_of_one(calibrated, name):
    (first, layers), (second, others), (alone, expected) = (found[name] for found in calibrated)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert layers == others
    assert layers.keys() == expected.keys()
    grids = [
        key for key in first if key.endswith(("scale", "zero_point", "split", "positive_step", "base", "outliers"))
    ]
    assert grids
    differing = {key.rpartition(".")[0] for key in grids if not torch.equal(first[key], alone[key])}
    for layer, (before, after) in layers.items():
        assert before == pytest.approx(expected[layer][0], rel=1e-6)
        if any(place.startswith(layer.removeprefix("clip.")) for place in differing):
            assert after == pytest.approx(expected[layer][1], rel=1e-6)
    if name in ("vanilla", "llm_int8"):
        assert not differing


def calibrate_one_sided(rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
    """Only the first process has pictures."""
    found = []
    for name in ("mini-vit", "mini-resnet"):
        clip = load_clip(name, "mini")
        images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) if rank == 0 else None
        quantize(clip.model, [(images, clip.preprocessing.tokenizer(TEXTS[:3]))], RECIPES["gauss_newton"])
        found.append(clip.model.state_dict())
    return found


@pytest.mark.slow
def test_a_process_that_reaches_no_picture_layer_takes_part():
    both = run_processes(calibrate_one_sided, 2, world_size=2, timeout=400)
    for first, second in zip(*both, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)
