"""The named lists of stages, and nothing else. Each is written out whole: presets by value."""

from collections.abc import Callable

from lit_clipq.recipes.recipe import Recipe
from lit_clipq.stages.equalize import Equalize
from lit_clipq.stages.grids import Grids
from lit_clipq.stages.ranges import Ranges
from lit_clipq.stages.search import Search
from lit_clipq.stages.start_tokens import StartTokens

PRESETS: dict[str, Callable[[], Recipe]] = {
    "vanilla": lambda: Recipe(
        "vanilla",
        (Grids(), Ranges()),
        attention_products=False,
        embeddings=False,
    ),
    "base_ptq": lambda: Recipe(
        "base_ptq",
        (Grids(), Search(distance="cosine")),
        end_token=False,
    ),
    "ptq4clip": lambda: Recipe(
        "ptq4clip",
        (Equalize(), Grids(softmax="twin", gelu="twin"), StartTokens(), Search()),
    ),
    "deploy_int8": lambda: Recipe(
        "deploy_int8",
        (Equalize(), Grids(softmax="uniform", gelu="uniform"), StartTokens(), Search()),
    ),
    "ptq4clip_paper": lambda: Recipe(
        "ptq4clip_paper",
        (Grids(softmax="twin", gelu="twin"), Search()),
        embeddings=False,
        coverage="convolutions_and_mlps",
    ),
}
"""Every recipe by its name.

- `vanilla`: minimum and maximum over the calibration set; linear and convolution layers of both towers, attention
  products only when asked for.
- `base_ptq`: the baseline of PTQ4ViT, scales of highest cosine similarity of each product, uniform grids only.
- `ptq4clip`: twin grids and a Hessian-guided search for all products of both towers, channels equalised first.
- `deploy_int8`: `ptq4clip` with uniform grids everywhere, each product one product of integers; for export at 8 bits.
- `ptq4clip_paper`: as `ptq4clip`, on convolutions and MLPs only, channels as they are.
"""
