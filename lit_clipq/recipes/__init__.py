"""Recipes: named lists of stages, their widths, and how options become one."""

from lit_clipq.recipes.options import compose, make_recipe, make_stage, recipe_from_json, recipe_names
from lit_clipq.recipes.recipe import Recipe
from lit_clipq.recipes.widths import BitWidths, LayerWidths

__all__ = [
    "BitWidths",
    "LayerWidths",
    "Recipe",
    "compose",
    "make_recipe",
    "make_stage",
    "recipe_from_json",
    "recipe_names",
]
