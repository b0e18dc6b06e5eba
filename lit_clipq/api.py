"""The one verb: `quantize(model, batches, recipe)`."""

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.calibration.engine import Calibration, count_samples, one_of_each_kind, searched_layers
from lit_clipq.calibration.profile import Profile, merged, profile
from lit_clipq.distributed import check_same_on_all_ranks, gather
from lit_clipq.errors import CalibrationError, ConfigError, ModelError
from lit_clipq.models import encode_image, encode_text, fold_batchnorm, make_explicit
from lit_clipq.nn.modules import QModule
from lit_clipq.nn.size import stored_bytes
from lit_clipq.nn.swap import FLOAT_BITS, QuantizationMap, find_layers, towers
from lit_clipq.recipes.base import Recipe, handler_of, name_of, plan
from lit_clipq.search.layer import LayerResult

log = logging.getLogger(__name__)

Batch = Any
Forward = Callable[[Batch], Any]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize` did, or with `dry_run` would do."""

    recipe: str
    """Registered name of the recipe."""
    map: QuantizationMap
    """Every matrix product and what became of it."""
    seconds: float
    """Wall time of calibration, reading the batches included; 0 for a dry run."""
    float_bytes: int
    """Size of the float parameters and buffers."""
    quantized_bytes: int
    """Size of codes (packed to their width), grids and whatever stayed float."""
    passes: int
    """Passes over the calibration set."""
    memory_bytes: int
    """Predicted size of what calibration stores beside the model."""
    samples: int
    """Calibration samples of a pass, over all ranks."""
    layers: dict[str, LayerResult]
    """How the search of each layer went; empty for recipes that do not search."""
    equalized: dict[str, float] = field(default_factory=dict)
    """Where channels were equalised, by the name of what makes them: the error that is expected of the layers that read
    them, over what it would be without."""


def quantize(
    model: nn.Module | Mapping[str, nn.Module],
    batches: Iterable[Batch],
    recipe: Recipe,
    *,
    forward: Forward | None = None,
    dry_run: bool = False,
    memory_limit_bytes: int | None = None,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Quantize a network in place, after training, from a few unlabelled batches.

    Attention is made explicit and BatchNorm folded first, and some recipes equalise channels (the function stays the
    same); then the layers are swapped, calibrated and frozen. If calibration fails the float layers are put back.

    Args:
        model: A CLIP, called `clip` in layer names, or named networks.
        batches: Calibration batches. For a CLIP (images, texts): float (B, 3, H, W) and int64 (B, L), either may be
            `None`. They are read into memory once, however many passes follow.
        recipe: What to do.
        forward: Runs the networks on a batch and returns what matters, a tensor or tensors by name; by default both
            towers of the CLIP. Recipes without gradients and equalising take any result.
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
        >>> from lit_clipq.recipes import Vanilla
        >>> clip = load_clip("mini-vit").model
        >>> batch = torch.rand(2, 3, 64, 64), torch.ones(2, 32, dtype=torch.long)
        >>> report = quantize(clip, [batch], Vanilla())
        >>> len(report.map.quantized) > 0
        True
    """
    roots = dict(model) if isinstance(model, Mapping) else {"clip": model}
    batches = list(batches)
    forward = forward or _clip_forward(roots)
    started = time.perf_counter()
    with torch.inference_mode(False), torch.enable_grad():
        float_bytes = sum(stored_bytes(root) for root in roots.values())
        if all(recipe.bits.of(tower) == (FLOAT_BITS, FLOAT_BITS) for tower in towers(roots)):
            return QuantizationReport(name_of(recipe), QuantizationMap(), 0.0, float_bytes, float_bytes, 0, 0, 0, {})
        _check_weights(roots)
        check_same_on_all_ranks(roots)
        for root in roots.values():
            root.eval()
            fold_batchnorm(root)
            make_explicit(root)
        layers = find_layers(roots)
        if not any(layer.kind.operands for layer in layers):
            quantized = any(isinstance(m, QModule) for root in roots.values() for m in root.modules())
            hint = "it is quantized already; load it anew" if quantized else "give a network that has some"
            raise ConfigError(f"expected linear, convolution or matrix product layers in {', '.join(roots)}: {hint}")
        planned = plan(recipe, layers)
        if not planned.quantized:
            raise ConfigError(f"no layer is left to quantize, {planned.entries[0].name}: {planned.entries[0].reason}")
        cost = _measure(roots, layers, batches, forward)
        planned = planned.with_macs(cost.macs)
        samples = sum(count_samples(batch) for batch in batches)
        most = max(gather(samples))
        calibration = Calibration(roots, layers, planned, batches, forward, cost, most, memory_limit_bytes)
        if progress is not None:
            tell, total = progress, len(searched_layers(calibration))
            calibration.progress = lambda name: tell(name, len(calibration.results), total)
        memory_bytes, passes = recipe.footprint(calibration)
        if not dry_run:
            _run(recipe, calibration)
        return QuantizationReport(
            recipe=name_of(recipe),
            map=planned,
            seconds=0.0 if dry_run else time.perf_counter() - started,
            float_bytes=float_bytes,
            quantized_bytes=sum(stored_bytes(root) for root in roots.values()),
            passes=passes,
            memory_bytes=memory_bytes,
            samples=sum(gather(samples)),
            layers=calibration.results,
            equalized=calibration.equalized,
        )


def preview(model: nn.Module | Mapping[str, nn.Module], recipe: Recipe) -> QuantizationMap:
    """Plan without touching the model or any data: which layers `quantize` would quantize, to which widths.

    Args:
        model: As for `quantize`.
        recipe: What to do.

    Raises:
        ConfigError: For a pattern that matches nothing.
    """
    roots = dict(model) if isinstance(model, Mapping) else {"clip": model}
    with torch.inference_mode(False):
        shells = {name: copy.deepcopy(root).to("meta").eval() for name, root in roots.items()}
        for shell in shells.values():
            make_explicit(shell)
        return plan(recipe, find_layers(shells))


def _run(recipe: Recipe, calibration: Calibration) -> None:
    try:
        handler_of(recipe)(recipe, calibration)
    except BaseException:
        calibration.undo()
        raise


def _measure(roots: Mapping[str, nn.Module], layers: list[Any], batches: Iterable[Batch], forward: Forward) -> Profile:
    """Profile one batch of each kind, over all ranks; every rank gets the same."""
    own = [profile(roots, layers, forward, batch, count_samples(batch)) for batch in one_of_each_kind(batches)]
    found = [measured for profiles in gather(own) for measured in profiles]
    if not found:
        raise CalibrationError("the calibration set is empty; give at least one batch (calibration_samples >= 1)")
    return merged(found)


def _check_weights(roots: Mapping[str, nn.Module]) -> None:
    for root, module in roots.items():
        for name, value in module.state_dict().items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ModelError(f"expected finite weights, got NaN or Inf in {root}.{name}; load an intact checkpoint")


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
