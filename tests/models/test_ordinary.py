"""Networks made under `torch.inference_mode()`."""

import pytest
import torch
from torch import nn

import lit_clipq
from lit_clipq.models import load_clip, make_explicit
from lit_clipq.models.ordinary import leave_inference_mode
from lit_clipq.recipes import make_recipe


def test_parameters_and_buffers_become_ordinary_and_tied_ones_stay_tied():
    with torch.inference_mode():
        net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "norm": nn.BatchNorm2d(2)})
        net["b"].weight = net["a"].weight
        net["a"].bias.requires_grad_(False)
        before = {name: value.clone() for name, value in net.state_dict().items()}
    leave_inference_mode(net)
    state = net.state_dict(keep_vars=True)
    assert not any(value.is_inference() for value in state.values())
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert net["a"].weight is net["b"].weight
    assert net["a"].weight.requires_grad
    assert not net["a"].bias.requires_grad
    net["a"](torch.randn(2, 3)).sum().backward()
    assert net["a"].weight.grad is not None


def test_ordinary_tensors_stay_the_same_tensors():
    layer = nn.Linear(2, 2)
    weight = layer.weight
    leave_inference_mode(layer)
    assert layer.weight is weight


@pytest.mark.parametrize("recipe", ["vanilla", pytest.param("ptq4clip", marks=pytest.mark.slow)])
def test_a_clip_made_in_inference_mode_is_quantized_as_any_other(recipe):
    pictures, embeddings = torch.randn(4, 3, 64, 64), []
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            loaded = load_clip("mini-vit", "mini")
            images = pictures.clone()
        tokens = loaded.preprocessing.tokenizer(["a red square", "two blue circles", "a green cross", "a star"])
        lit_clipq.quantize(loaded.model, [(images, tokens)], make_recipe(recipe))
        with torch.no_grad():
            embeddings.append(loaded.model.encode_image(images))
    assert torch.equal(*embeddings)


def test_make_explicit_leaves_inference_mode_behind():
    with torch.inference_mode():
        loaded = load_clip("mini-vit")
    make_explicit(loaded.model)
    assert not any(parameter.is_inference() for parameter in loaded.model.parameters())
