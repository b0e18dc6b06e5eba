"""Two processes rewrite the float network as one does."""

import pytest
import torch

from lit_clipq.api import quantize
from lit_clipq.models import load_clip
from lit_clipq.recipes import BitWidths, compose
from tests.ddp.processes import run_processes

TEXTS = ["a red star", "two blue cups on sand", "a big green tree left of a small black house", "a fish", "three keys"]


def rewritten(rank: int, world_size: int) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, object]]]:
    """Rotate, fold and smooth with this rank's samples; returns the quantized state and what the stages say."""
    clip = load_clip("mini-vit-outlier", "mini")
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))[rank::world_size]
    texts = clip.preprocessing.tokenizer(TEXTS)[rank::world_size]
    batches = list(zip(images.split(1), texts.split(1), strict=True))  # so that kernels are the same for any shard
    stages = [{"rotate": {"residual": False}}, "repq", "smooth", "grids", "ranges"]
    report = quantize(clip.model, batches, compose(stages, bits=BitWidths.resolve({"bits": 6}), start_token=False))
    return clip.model.state_dict(), report.stages


@pytest.mark.slow
def test_two_processes_find_what_one_finds():
    first, second = run_processes(rewritten, 2, world_size=2, timeout=200)
    (alone,) = run_processes(rewritten, 1, world_size=1, timeout=200)
    assert all(torch.equal(first[0][key], second[0][key]) for key in first[0])
    assert first[1] == second[1]
    for name in ("repq", "smooth"):
        assert first[1][name].keys() == alone[1][name].keys()
        for place, found in first[1][name].items():
            assert found.get("alpha") == alone[1][name][place].get("alpha")
            assert found.get("reason") == alone[1][name][place].get("reason")
    assert all(torch.equal(first[0][key], alone[0][key]) for key in first[0])
