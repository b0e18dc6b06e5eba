"""The registry of recipes, and the plans they make."""

import pytest
from torch import nn

from lit_clipq.errors import ConfigError
from lit_clipq.nn.matmul import MatMul
from lit_clipq.nn.swap import find_layers
from lit_clipq.recipes import BitWidths, make_recipe, recipe_names


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Linear(4, 4))
        self.visual.attn = nn.MultiheadAttention(4, 2)
        self.mlp = nn.Linear(4, 4)
        self.qk = MatMul()


@pytest.fixture
def layers():
    return find_layers({"clip": Tower(), "head": nn.Sequential(nn.Linear(4, 2))})


def test_layers_get_their_tower_and_fused_attention_is_left_out(layers):
    assert {layer.name: layer.tower for layer in layers} == {
        "clip.visual.0": "vision",
        "clip.visual.1": "vision",
        "clip.mlp": "text",
        "clip.qk": "text",
        "head.0": "head",
    }


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_found_by_the_name_they_were_registered_under(name):
    recipe = make_recipe(name)
    assert recipe.name == name
    assert recipe.bits == BitWidths()


def test_unknown_recipes_and_options_list_what_exists():
    with pytest.raises(ConfigError, match=r"expected one of .*vanilla.*did you mean 'vanilla'"):
        make_recipe("vanila")
    with pytest.raises(ConfigError, match="has no option twin"):
        make_recipe("vanilla", twin=True)


def test_widths_and_products_decide_what_stays_float(layers):
    recipe = make_recipe("vanilla", bits=BitWidths.resolve({"bits": 32, "text_bits": 4}))
    entries = {entry.name: entry for entry in recipe.plan(layers).entries}
    assert [name for name, entry in entries.items() if entry.quantized] == ["clip.mlp"]
    assert entries["clip.visual.0"].reason == "vision is set to 32 bits"
    assert "attention products" in entries["clip.qk"].reason
    assert (entries["clip.mlp"].weight_bits, entries["clip.mlp"].activation_bits) == (4, 4)
    products = make_recipe("vanilla", attention_products=True).plan(layers)
    assert all(entry.quantized for entry in products.entries)


def test_weight_only_widths_leave_products_without_weights_float(layers):
    recipe = make_recipe(
        "vanilla", bits=BitWidths.resolve({"weight_bits": 4, "activation_bits": 32}), attention_products=True
    )
    entries = {entry.name: entry for entry in recipe.plan(layers).entries}
    assert entries["clip.mlp"].quantized
    assert not entries["clip.qk"].quantized


def test_patterns_select_layers(layers):
    recipe = make_recipe("vanilla", include=("clip.visual.*", "head*"), exclude=("*.1",))
    assert [entry.name for entry in recipe.plan(layers).quantized] == ["clip.visual.0", "head.0"]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(layers, option):
    with pytest.raises(ConfigError, match=rf"quantize\.{option} pattern 'visual\.\*' matches none of the 5 layers"):
        make_recipe("vanilla", **{option: ("visual.*",)}).plan(layers)
