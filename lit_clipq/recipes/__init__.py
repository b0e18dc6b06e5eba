"""Recipes: named lists of stages, their widths, and how options become one.

`Vanilla`, `BasePTQ`, `PTQ4CLIP` and `PTQ4CLIPPaper` are `make_recipe` with the name given.
"""

from functools import partial

from lit_clipq.recipes.options import compose, make_recipe, make_stage, recipe_from_json, recipe_names
from lit_clipq.recipes.recipe import Recipe
from lit_clipq.recipes.widths import BitWidths, LayerWidths

Vanilla = partial(make_recipe, "vanilla")
BasePTQ = partial(make_recipe, "base_ptq")
PTQ4CLIP = partial(make_recipe, "ptq4clip")
PTQ4CLIPPaper = partial(make_recipe, "ptq4clip_paper")

__all__ = [
    "PTQ4CLIP",
    "BasePTQ",
    "BitWidths",
    "LayerWidths",
    "PTQ4CLIPPaper",
    "Recipe",
    "Vanilla",
    "compose",
    "make_recipe",
    "make_stage",
    "recipe_from_json",
    "recipe_names",
]
