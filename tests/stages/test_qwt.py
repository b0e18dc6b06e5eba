"""A linear layer beside each block: against numpy, in its place and out of it, saved and loaded, and by its cost."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lit_clipq import load_quantized, quantize, quantize_many, save_quantized
from lit_clipq.checkpoint import identify
from lit_clipq.errors import ConfigError, ModelError
from lit_clipq.models import load_clip
from lit_clipq.nn.structure import replay
from lit_clipq.recipes import BitWidths, compose
from lit_clipq.stages.blocks import block_steps
from tests.ddp.processes import run_processes

TEXTS = ["a red star", "two blue cups on sand", "a big green tree to the left of a small black house", "a fish"]
BASE = ["grids", {"search": {"distance": "l2"}}]
WIDTH, RIDGE = 8, 0.05


class Block(nn.Module):
    """A residual block with a layer to quantize."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.fc(x).tanh()


def network(blocks=3):
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(blocks)))


def rows(samples=40):
    return torch.randn(samples, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def forms_of(net, *recipes, x=None):
    return quantize_many({"net": net}, [rows() if x is None else x], recipes, forward=net)


def recipe_of(*stages, bits=2):
    return compose([*BASE, *stages], bits=BitWidths.resolve({"bits": bits}))


def test_each_block_is_compensated_behind_those_in_front_of_it():
    net, x = network(), rows()
    plain, compensated = forms_of(net, recipe_of(), recipe_of({"qwt": {"ridge": RIDGE}}))
    floats = copy.deepcopy(net)
    with plain.installed(), torch.no_grad():
        blocks = copy.deepcopy(net)
    with compensated.installed() as report, torch.no_grad():
        seen = x
        for number, block in enumerate(net):
            wanted, found = floats[number](seen), blocks[number](seen)
            missing = (wanted - found).double().numpy()
            held = np.arange(len(x)) % 4 == 1
            ones = np.concatenate([seen.double().numpy(), np.ones((*seen.shape[:2], 1))], axis=2)
            a, r = ones[~held].reshape(-1, WIDTH + 1), missing[~held].reshape(-1, WIDTH)
            gram = a.T @ a
            gram += RIDGE * np.diag(gram).mean() * np.eye(WIDTH + 1)
            solution = np.linalg.solve(gram, a.T @ r)
            after = np.square(missing[held] - ones[held] @ solution).sum()
            told = report.stages["qwt"][f"net.{number}"]
            assert told["before"] == pytest.approx(np.square(missing[held]).sum(), rel=1e-4)
            assert told["after"] == pytest.approx(after, rel=1e-4)
            assert told["kept"] == (after <= told["before"])
            assert hasattr(block, "compensation") == told["kept"]
            if told["kept"]:
                assert block.compensation.weight.numpy() == pytest.approx(solution[:-1].T, rel=1e-3, abs=1e-5)
                assert block.compensation.bias.numpy() == pytest.approx(solution[-1], rel=1e-3, abs=1e-5)
            seen = block(seen)
        assert any(told["kept"] for told in report.stages["qwt"].values())


def test_it_comes_and_goes_with_its_form_and_the_map_lists_its_cost():
    net, x = network(), rows()
    names = list(net.state_dict())
    before = net(x)
    plain, compensated = forms_of(net, recipe_of(), recipe_of("qwt"))
    assert list(net.state_dict()) == names
    assert torch.equal(net(x), before)
    with compensated.installed() as report:
        quantized = net(x)
    kept = [name for name, told in report.stages["qwt"].items() if told["kept"]]
    assert kept
    extra = [entry for entry in report.map.entries if entry.name.endswith(".compensation")]
    assert [entry.name for entry in extra] == [f"{name}.compensation" for name in kept]
    assert all(entry.macs == 5 * WIDTH * WIDTH and not entry.quantized for entry in extra)
    assert report.quantized_bytes == plain.report.quantized_bytes + len(kept) * 4 * WIDTH * (WIDTH + 1)
    assert report.map.float_share > 0
    with plain.installed() as other:
        assert not torch.equal(net(x), quantized)
        assert other.map.float_share == 0
    assert list(net.state_dict()) == names
    assert torch.equal(net(x), before)


def test_a_single_sample_and_blocks_of_another_shape_are_left_alone():
    for net, x, reason in (
        (network(), rows(1), "no sample to be judged on"),
        (nn.Sequential(nn.Sequential(nn.Linear(WIDTH, 6))), rows(), "not rows of the same shape"),
        (nn.Sequential(Block()), rows()[:, 0], "not rows of the same shape"),
    ):
        (form,) = forms_of(net, recipe_of("qwt"), x=x)
        with form.installed() as report:
            assert not any(hasattr(block, "compensation") for block in net)
        assert all(reason in told["reason"] and not told["kept"] for told in report.stages["qwt"].values())
        assert not report.structure


def test_where_there_are_no_blocks_it_says_so():
    (form,) = forms_of(nn.Sequential(nn.Linear(WIDTH, WIDTH)), recipe_of("qwt"))
    assert form.report.stages["qwt"] == {"reason": "no quantized layer lies in a list of blocks"}


def test_stages_of_layers_do_not_stand_behind_it():
    with pytest.raises(ConfigError, match="bias_correction works on layers and must stand before qwt"):
        recipe_of("qwt", "bias_correction")
    with pytest.raises(ConfigError, match="ridge of stage qwt must be above 0"):
        recipe_of({"qwt": {"ridge": 0.0}})


def test_blocks_of_both_towers_share_a_step():
    towers = {"clip.visual.conv1": "v", "clip.visual.b.0.x": "v", "clip.visual.b.0.y": "v", "clip.visual.b.1.x": "v"}
    towers |= {"clip.b.0.x": "t", "clip.proj": "t"}
    assert block_steps(list(towers), towers) == [["clip.visual.b.0", "clip.b.0"], ["clip.visual.b.1"]]


def test_replaying_refuses_what_does_not_fit_and_takes_back_what_did():
    net = network()
    names = list(net.state_dict())
    fits = {"kind": "compensation", "block": "net.0", "width": WIDTH}
    for wrong in ({"block": "net.7"}, {"block": "net.1", "width": "8"}, {"block": "net.1", "width": 0}, {}):
        with pytest.raises(ModelError, match=r"which the network has not|damaged structure entry"):
            replay([fits, {**fits, **wrong}], {}, {"net": net})
        assert list(net.state_dict()) == names
        assert not net[0]._forward_hooks
    undo = replay([fits], {}, {"net": net})
    assert "0.compensation.weight" in net.state_dict()
    undo()
    assert list(net.state_dict()) == names


def clip_recipe(**options):
    include = ("clip.visual.transformer.resblocks.[01].mlp.*", "clip.transformer.resblocks.0.mlp.*")
    stages = [{"equalize": {}}, {"grids": {"gelu": "twin"}}, {"search": {"distance": "l2"}}, "qwt"]
    bits = BitWidths.resolve({"weight_bits": 2, "activation_bits": 4})
    return compose(stages, bits=bits, include=include, **options)


def test_a_saved_model_has_it(tmp_path):
    clip, recipe = load_clip("mini-vit", "mini"), clip_recipe()
    identity = identify(clip)
    images = torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    texts = clip.preprocessing.tokenizer(TEXTS * 4)
    report = quantize(clip.model, [(images, texts)], recipe)
    assert [entry["block"] for entry in report.structure] == [n for n, t in report.stages["qwt"].items() if t["kept"]]
    assert "clip.transformer.resblocks.0" in report.stages["qwt"]
    assert report.structure
    save_quantized(tmp_path / "saved", clip.model, report=report, recipe=recipe, identity=identity)
    loaded = load_quantized(tmp_path / "saved").model
    assert torch.equal(loaded.encode_image(images), clip.model.encode_image(images))
    assert torch.equal(loaded.encode_text(texts), clip.model.encode_text(texts))


def calibrate(rank, world_size):
    """Compensate on this rank's samples."""
    clip = load_clip("mini-vit", "mini")
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))[rank::world_size]
    texts = clip.preprocessing.tokenizer(TEXTS * 2)[rank::world_size]
    report = quantize(clip.model, list(zip(images.split(1), texts.split(1), strict=True)), clip_recipe())
    return clip.model.state_dict(), report.stages["qwt"]


@pytest.mark.slow
def test_two_processes_compensate_as_one_does():
    (first, told), (second, _) = run_processes(calibrate, 2, world_size=2, timeout=400)
    ((alone, expected),) = run_processes(calibrate, 1, world_size=1, timeout=400)
    assert first.keys() == second.keys() == alone.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [entry["kept"] for entry in told.values()] == [entry["kept"] for entry in expected.values()]
    for name in (name for name in alone if ".compensation." in name):
        torch.testing.assert_close(first[name], alone[name], rtol=1e-3, atol=1e-4)
