"""The named lists of stages, and nothing else. Each is written out whole: presets by value."""

from collections.abc import Callable

from lit_clipq.recipes.recipe import Recipe
from lit_clipq.stages.allocate import Allocate
from lit_clipq.stages.equalize import Equalize
from lit_clipq.stages.gptq import Gptq
from lit_clipq.stages.grids import Grids
from lit_clipq.stages.llm_int8 import LLMInt8
from lit_clipq.stages.ranges import Ranges
from lit_clipq.stages.registers import Registers
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
    "adalog": lambda: Recipe(
        "adalog",
        (Equalize(), Grids(softmax="best", gelu="adalog"), StartTokens(), Search()),
    ),
    "dynamic": lambda: Recipe(
        "dynamic",
        (Grids(inputs="per_token"), StartTokens(), Ranges()),
    ),
    "llm_int8": lambda: Recipe(
        "llm_int8",
        (Grids(inputs="per_token", symmetric=True, restricted=True), LLMInt8(), StartTokens(), Ranges()),
    ),
    "zeroquant": lambda: Recipe(
        "zeroquant",
        (Grids(inputs="per_token", group_size=64), StartTokens(), Ranges()),
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
    "registers": lambda: Recipe(
        "registers",
        (Registers(), Equalize(), Grids(softmax="twin", gelu="twin"), StartTokens(), Search()),
    ),
    "repq": lambda: Recipe(
        "repq",
        (RepQ(), Grids(softmax="twin", gelu="twin"), StartTokens(), Search()),
    ),
    "rotate": lambda: Recipe(
        "rotate",
        (Rotate(), Grids(softmax="twin", gelu="twin"), StartTokens(), Search()),
    ),
    "strong": lambda: Recipe(
        "strong",
        (Smooth(), Grids(softmax="best", gelu="best"), StartTokens(), Search(), Gptq()),
    ),
    "strong_mixed": lambda: Recipe(
        "strong_mixed",
        (
            Smooth(),
            Grids(softmax="best", gelu="best"),
            StartTokens(),
            Search(),
            Gptq(),
            Allocate(budget="bops", widths=(3, 4, 6, 8)),
        ),
    ),
}
"""Every recipe by its name.

- `vanilla`: minimum and maximum over the calibration set; linear and convolution layers of both towers, attention
  products only when asked for.
- `base_ptq`: the baseline of PTQ4ViT, scales of highest cosine similarity of each product, uniform grids only.
- `ptq4clip`: twin grids and a Hessian-guided search for all products of both towers, channels equalised first.
- `deploy_int8`: `ptq4clip` with uniform grids everywhere, each product one product of integers; for export at 8 bits.
- `ptq4clip_paper`: as `ptq4clip`, on convolutions and MLPs only, channels as they are.
- `adalog`: as `ptq4clip`, with logarithmic grids of an adaptive base behind GELU, and after softmax where they serve.
- `dynamic`: minimum and maximum of each token at run time, weights by minimum and maximum.
- `llm_int8`: absolute maxima of rows and of output channels, outlier channels in float.
- `zeroquant`: weights in groups, inputs token by token.
- `mixed_size`: `ptq4clip`, and bits layer by layer, in all as many of weights as the widths given take.
- `mixed_bops`: the same with as many bit operations.
- `registers`: as `ptq4clip`, with registers for the vision tower where they help.
- `repq`: as `ptq4clip`, with RepQ's folding of a grid for each channel in the place of powers of two.
- `rotate`: as `ptq4clip`, with rotations of residual streams and heads in the place of powers of two.
- `smooth`: as `ptq4clip`, with SmoothQuant's factors in the place of powers of two.
- `strong`: what measured best together: `smooth`, twin or logarithmic grids, the search, `gptq`.
- `strong_mixed`: `strong`, and bits layer by layer, in all as many bit operations as the widths given take.
"""
