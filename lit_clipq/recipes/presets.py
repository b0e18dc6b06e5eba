"""The named lists of stages, and nothing else. Each is written out whole: presets by value."""

from collections.abc import Callable

from lit_clipq.recipes.recipe import Recipe
from lit_clipq.stages.allocate import Allocate
from lit_clipq.stages.equalize import Equalize
from lit_clipq.stages.grids import Grids
from lit_clipq.stages.ranges import Ranges
from lit_clipq.stages.repq import RepQ
from lit_clipq.stages.rotate import Rotate
from lit_clipq.stages.search import Search
from lit_clipq.stages.smooth import Smooth
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
    "ptq4clip_paper": lambda: Recipe(
        "ptq4clip_paper",
        (Grids(softmax="twin", gelu="twin"), Search()),
        embeddings=False,
        coverage="convolutions_and_mlps",
    ),
    "mixed_size": lambda: Recipe(
        "mixed_size",
        (Equalize(), Grids(softmax="twin", gelu="twin"), StartTokens(), Search(), Allocate()),
    ),
    "mixed_bops": lambda: Recipe(
        "mixed_bops",
        (
            Equalize(),
            Grids(softmax="twin", gelu="twin"),
            StartTokens(),
            Search(),
            Allocate(budget="bops", widths=(3, 4, 6, 8)),
        ),
    ),
    "smooth": lambda: Recipe(
        "smooth",
        (Smooth(), Grids(softmax="twin", gelu="twin"), StartTokens(), Search()),
    ),
    "repq": lambda: Recipe(
        "repq",
        (RepQ(), Grids(softmax="twin", gelu="twin"), StartTokens(), Search()),
    ),
    "rotate": lambda: Recipe(
        "rotate",
        (Rotate(), Grids(softmax="twin", gelu="twin"), StartTokens(), Search()),
    ),
}
"""Every recipe by its name.

- `vanilla`: minimum and maximum over the calibration set; linear and convolution layers of both towers, attention
  products only when asked for.
- `base_ptq`: the baseline of PTQ4ViT, scales of highest cosine similarity of each product, uniform grids only.
- `ptq4clip`: twin grids and a Hessian-guided search for all products of both towers, channels equalised first.
- `ptq4clip_paper`: the same on convolutions and MLPs only, channels as they are.
- `mixed_size`: `ptq4clip`, and bits layer by layer, in all as many of weights as the widths given take.
- `mixed_bops`: the same with as many bit operations.
- `repq`: as `ptq4clip`, with RepQ's folding of a grid for each channel in the place of powers of two.
- `rotate`: as `ptq4clip`, with rotations of residual streams and heads in the place of powers of two.
- `smooth`: as `ptq4clip`, with SmoothQuant's factors in the place of powers of two.
"""
