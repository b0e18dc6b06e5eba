"""Misuse of the library is told in one sentence, and nothing is changed."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lit_clipq.errors import CalibrationError, ConfigError
from lit_clipq.inputs import check_batches, check_model
from lit_clipq.models import load_clip

IMAGES, TOKENS = torch.randn(2, 3, 8, 8), torch.ones(2, 4, dtype=torch.int64)


class Reluctant(nn.Module):
    def forward(self, x: torch.Tensor):
        return x + 1


@pytest.fixture(scope="module")
def loaded():
    return load_clip("mini-vit")


def compiled_in_place():
    model = nn.Sequential(nn.Linear(2, 2))
    model.compile()
    return model


def inside(module):
    return nn.Sequential(nn.Identity(), module)


def quantized():
    from lit_clipq import quantize, recipes

    model = load_clip("mini-vit").model
    tokens = torch.ones(2, 32, dtype=torch.int64)
    quantize(model, [(torch.randn(2, 3, 64, 64), tokens)], recipes.make_recipe("vanilla"))
    return model


def spread():
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_buffer("elsewhere", torch.empty(1, device="meta"))
    return model


MISUSED = {
    "quantized": (quantized, r"^clip\.\S+ is quantized already; load the model anew"),
    "DataParallel": (lambda: nn.DataParallel(nn.Linear(2, 2)), r"^clip is wrapped in DataParallel; .*`\.module`"),
    "DataParallel inside": (lambda: inside(nn.DataParallel(nn.Linear(2, 2))), r"^clip\.1 is wrapped in DataParallel"),
    "compiled": (lambda: torch.compile(nn.Linear(2, 2)), r"^clip is compiled; .*`\._orig_mod`"),
    "compiled inside": (lambda: inside(torch.compile(nn.Linear(2, 2))), r"^clip\.1 is compiled;"),
    "compiled in place": (compiled_in_place, r"^clip is compiled in place"),
    "TorchScript": (lambda: torch.jit.script(Reluctant()), r"^clip is a TorchScript"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), "without values"),
    "partly meta": (spread, "without values"),
    "no module": (lambda: 3, r"expected a torch module as network 'clip', got int$"),
}


@pytest.mark.parametrize("case", MISUSED)
def test_networks_that_cannot_be_quantized_are_told(case):
    make, told = MISUSED[case]
    with pytest.raises(ConfigError, match=told) as caught:
        check_model({"clip": make()})
    assert "\n" not in str(caught.value)


def test_a_loaded_clip_in_place_of_its_model_is_told(loaded):
    with pytest.raises(ConfigError, match=r"got LoadedCLIP; give its `\.model`"):
        check_model({"clip": loaded})
    with pytest.raises(ConfigError, match="got none"):
        check_model({})


def test_ordinary_networks_pass_as_they_are(loaded):
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    check_model({"clip": loaded.model, "head": nn.Linear(2, 2)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())


class OnTwoDevices(nn.Module):
    """Says so; a second device is not needed."""

    def parameters(self, recurse: bool = True):  # noqa: ARG002 torch's signature
        return iter(SimpleNamespace(device=torch.device(name)) for name in ("cuda:0", "cpu"))


def test_a_network_on_two_devices_is_told():
    with pytest.raises(ConfigError, match=r"'clip' is spread over cpu, cuda:0; move it to one device"):
        check_model({"clip": OnTwoDevices()})


WRONG_BATCHES = {
    "empty list": ([], "the calibration set is empty"),
    "empty iterator": (iter(()), "the calibration set is empty"),
    "one batch": ((IMAGES, TOKENS), "got a single batch; put it into a list"),
    "one batch without texts": ((IMAGES, None), "got a single batch"),
    "one batch as a list": ([IMAGES, TOKENS], "got a single batch"),
    "pictures alone": (IMAGES, "got a single batch"),
    "dict of batches": ({"images": IMAGES}, r"got a dict \('images'\)"),
    "nothing": (None, "got NoneType"),
    "path": ("pictures/", "got str"),
    "dict as a batch": ([{"images": IMAGES, "texts": TOKENS}], r"batch 0 is a dict \('images', 'texts'\).*`forward`"),
    "pictures without a pair": ([IMAGES], r"batch 0 is a Tensor; expected .*; give \(images, None\)"),
    "three parts": ([(IMAGES, TOKENS, TOKENS)], "batch 0 is a tuple of length 3"),
    "neither": ([(IMAGES, TOKENS), (None, None)], "batch 1 has neither pictures nor texts"),
    "uint8": ([((IMAGES * 9).byte(), TOKENS)], r"batch 0 has pictures in torch\.uint8;.*preprocessing\.image"),
    "a list of pictures": ([([IMAGES[0]], TOKENS)], "pictures of type list"),
    "one picture": ([(IMAGES[0], TOKENS)], r"shape \(3, 8, 8\); expected \(B, 3, H, W\)"),
    "channels last": ([(IMAGES.permute(0, 2, 3, 1), None)], r"permute \(B, H, W, 3\)"),
    "grey": ([(IMAGES[:, :1], None)], r"shape \(2, 1, 8, 8\)"),
    "no picture": ([(IMAGES[:0], None)], r"shape \(0, 3, 8, 8\).*B of 1 or more"),
    "strings": ([(IMAGES, ["a cat", "a dog"])], r"texts of type list.*preprocessing\.tokenizer"),
    "float tokens": ([(IMAGES, TOKENS.float())], r"texts in torch\.float32"),
    "labels": ([(IMAGES, TOKENS[:, 0])], r"texts of shape \(2,\).*give \(images, None\)"),
    "changed places": ([(TOKENS, IMAGES)], r"pictures in torch\.int64"),
}


@pytest.mark.parametrize("case", WRONG_BATCHES)
def test_batches_that_cannot_calibrate_are_told(case):
    batches, told = WRONG_BATCHES[case]
    with pytest.raises(CalibrationError, match=told) as caught:
        check_batches(batches)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "batches",
    [
        [(IMAGES, TOKENS)],
        [[IMAGES, TOKENS], (IMAGES.half(), None)],
        ((None, TOKENS.int()),),
        [(IMAGES, TOKENS), (IMAGES, TOKENS)],
    ],
)
def test_pairs_pass_and_are_read_once(batches):
    assert check_batches(iter(batches)) == list(batches)
    assert check_batches(batches) == list(batches)


def test_a_loader_is_read():
    data = torch.utils.data.TensorDataset(IMAGES, TOKENS)
    (batch,) = check_batches(torch.utils.data.DataLoader(data, batch_size=2))
    assert torch.equal(batch[0], IMAGES)


def test_with_a_forward_of_ones_own_any_batch_passes():
    for odd in ([{"pixels": IMAGES}, IMAGES, "text"], [IMAGES, TOKENS]):
        assert check_batches(odd, pairs=False) == odd
    with pytest.raises(CalibrationError, match="single batch"):
        check_batches(IMAGES, pairs=False)
    with pytest.raises(CalibrationError, match="empty"):
        check_batches([], pairs=False)
