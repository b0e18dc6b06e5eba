"""The one verb: `quantize(model, batches, recipe)`; and `quantize_many`, several recipes from one collection."""

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized

import torch
from torch import Tensor, nn

from lit_clipq.calibration.batches import Batch
from lit_clipq.distributed import world_size
from lit_clipq.errors import ConfigError
from lit_clipq.inputs import check_batches, check_model
from lit_clipq.models import encode_image, encode_text, make_explicit
from lit_clipq.nn.swap import QuantizationMap, find_layers
from lit_clipq.quantized import QuantizationReport, Quantized
from lit_clipq.recipes import Recipe
from lit_clipq.text_lengths import Texts
from lit_clipq.work import Forward, Progress, Work

__all__ = [
    "Forward",
    "Progress",
    "QuantizationReport",
    "Quantized",
    "planner",
    "preview",
    "quantize",
    "quantize_many",
]


def quantize(
    model: nn.Module | Mapping[str, nn.Module],
    batches: Iterable[Batch],
    recipe: Recipe,
    *,
    forward: Forward | None = None,
    texts: Texts | None = None,
    dry_run: bool = False,
    memory_limit_bytes: int | None = None,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Quantize a network in place, after training, from a few unlabelled batches.

    Attention is made explicit and BatchNorm folded first (the function stays the same); then the recipe's stages run,
    and frozen layers take the places of the float ones. If calibration fails the network stays float.

    Args:
        model: A CLIP, called `clip` in layer names, or named networks.
        batches: Calibration batches. For a CLIP (images, texts): float (B, 3, H, W) and int64 (B, L), either may be
            `None`. They are read into memory once, however many passes follow.
        recipe: What to do.
        forward: Runs the networks on a batch and returns what matters, a tensor or tensors by name; by default both
            towers of the CLIP. Recipes without gradients and equalising take any result.
        texts: Returns the texts of a batch as the CLIP's text tower sees them, int64 (B, L), or `None`; by default the
            second of a pair. Positions behind a text's end must not count.
        dry_run: Only plan and measure; no layer is swapped.
        memory_limit_bytes: Bound on what calibration stores beside the model; `None` is no bound.
        progress: Told the name of each layer whose search is done, how many are, and of how many.

    Returns:
        The report. With all widths at 32 bits nothing is touched.

    Raises:
        ConfigError: For a pattern that matches nothing, or a network without layers that are to be quantized.
        ModelError: For weights that are not finite.
        CalibrationError: For an empty calibration set, layers it does not reach, NaN or Inf on the way, a memory limit
            below what is needed, ranks that hold different networks.

    Example:
        >>> from lit_clipq.models import load_clip
        >>> from lit_clipq.recipes import make_recipe
        >>> clip = load_clip("mini-vit").model
        >>> batch = torch.rand(2, 3, 64, 64), torch.ones(2, 32, dtype=torch.long)
        >>> report = quantize(clip, [batch], make_recipe("vanilla"))
        >>> len(report.map.quantized) > 0
        True
    """
    (only,) = quantize_many(
        model,
        batches,
        [recipe],
        forward=forward,
        texts=texts,
        dry_run=dry_run,
        memory_limit_bytes=memory_limit_bytes,
        progress=progress,
    )
    if not dry_run:
        only.install()
    return only.report


def quantize_many(
    model: nn.Module | Mapping[str, nn.Module],
    batches: Iterable[Batch],
    recipes: Sequence[Recipe],
    *,
    forward: Forward | None = None,
    texts: Texts | None = None,
    dry_run: bool = False,
    memory_limit_bytes: int | None = None,
    progress: Progress | None = None,
) -> list[Quantized]:
    """Quantize one network in several ways from one collection of observations.

    With float inputs a layer's grids depend on its own width alone, so recipes that differ in widths, patterns or
    stages share every pass over the calibration set, and layers of which they want the same are fitted once. Each
    result equals that of `quantize` to the bit. The network stays float, its attention explicit, until one of them is
    installed.

    Args:
        model: As for `quantize`.
        batches: As for `quantize`.
        recipes: What to do; those that collect differently (objective, seed, share of tokens) have passes of their own.
        forward: As for `quantize`.
        texts: As for `quantize`.
        dry_run: As for `quantize`.
        memory_limit_bytes: As for `quantize`.
        progress: As for `quantize`; the layers of all recipes count.

    Returns:
        One quantized form for each recipe; `seconds` of its report is the time of its share of the work.

    Raises:
        ConfigError: As for `quantize`; also for an empty list of recipes.
        ModelError: As for `quantize`.
        CalibrationError: As for `quantize`.

    Example:
        >>> from lit_clipq.models import load_clip
        >>> from lit_clipq.recipes import BitWidths, make_recipe
        >>> clip = load_clip("mini-vit").model
        >>> batch = torch.rand(2, 3, 64, 64), torch.ones(2, 32, dtype=torch.long)
        >>> widths = [BitWidths.resolve({"bits": bits}) for bits in (8, 4)]
        >>> eight, four = quantize_many(clip, [batch], [make_recipe("vanilla", bits=bits) for bits in widths])
        >>> with four.installed() as report:
        ...     report.map.quantized[0].weight_bits
        4
    """
    if not recipes:
        raise ConfigError("expected at least one recipe, got none; give one of `lit_clipq.recipes.recipe_names()`")
    roots = dict(model) if isinstance(model, Mapping) else {"clip": model}
    started = time.perf_counter()
    with torch.inference_mode(False), torch.enable_grad():
        check_model(roots)
        if world_size() == 1 or not isinstance(batches, Sized) or len(batches):  # another rank may hold all of them
            batches = check_batches(batches, pairs=forward is None)
        work = Work(roots, list(batches), forward or _clip_forward(roots), texts)
        work.memory_limit_bytes = memory_limit_bytes
        return work.run(recipes, started, dry_run=dry_run, progress=progress)


def preview(model: nn.Module | Mapping[str, nn.Module], recipe: Recipe) -> QuantizationMap:
    """Plan without touching the model or any data: which layers `quantize` would quantize, to which widths.

    Args:
        model: As for `quantize`.
        recipe: What to do.

    Raises:
        ConfigError: For a pattern that matches nothing, or a layer that a stage cannot serve.
    """
    return planner(model)(recipe)


def planner(model: nn.Module | Mapping[str, nn.Module]) -> Callable[[Recipe], QuantizationMap]:
    """Return what does the same as `preview` for any number of recipes, from one look at the model.

    Args:
        model: As for `quantize`.
    """
    roots = dict(model) if isinstance(model, Mapping) else {"clip": model}
    with torch.inference_mode(False):
        shells = {name: copy.deepcopy(root).to("meta").eval() for name, root in roots.items()}
        for shell in shells.values():
            make_explicit(shell)
        layers = find_layers(shells)

    def planned(recipe: Recipe) -> QuantizationMap:
        plan = recipe.plan(layers)
        for stage in recipe.stages:
            stage.check_networks(plan, shells)
        return plan

    return planned


def _clip_forward(roots: Mapping[str, nn.Module]) -> Forward:
    clip = roots.get("clip")
    if clip is None or len(roots) > 1:
        raise ConfigError(f"networks named {', '.join(roots)} need a `forward` that runs them on a batch")

    def forward(batch: Batch) -> dict[str, Tensor]:
        images, texts = batch
        device = next(clip.parameters()).device
        outputs = {}
        if images is not None:
            outputs["image"] = nn.functional.normalize(encode_image(clip, images.to(device)), dim=-1)
        if texts is not None:
            outputs["text"] = nn.functional.normalize(encode_text(clip, texts.to(device)), dim=-1)
        return outputs

    return forward
