"""Recipes: one file a method. Importing this package registers them all."""

from lit_clipq.recipes.base import Recipe, make_recipe, name_of, recipe_names
from lit_clipq.recipes.ptq4clip import PTQ4CLIP, BasePTQ, PTQ4CLIPPaper
from lit_clipq.recipes.vanilla import Vanilla
from lit_clipq.recipes.widths import BitWidths

__all__ = [
    "PTQ4CLIP",
    "BasePTQ",
    "BitWidths",
    "PTQ4CLIPPaper",
    "Recipe",
    "Vanilla",
    "make_recipe",
    "name_of",
    "recipe_names",
]
