"""PTQ4CLIP: twin uniform grids and a Hessian-guided search of every scale (after PTQ4ViT, arXiv 2111.12293)."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_clipq.calibration.collect import Observations, Rows, recording
from lit_clipq.calibration.distributed import gather, rank, world_size
from lit_clipq.calibration.engine import Calibration, count_samples, searched_layers
from lit_clipq.calibration.layer_search import LayerSearch, SearchOptions
from lit_clipq.calibration.objective import contrastive_cotangents, random_directions
from lit_clipq.calibration.probe import Probe, probe
from lit_clipq.errors import CalibrationError
from lit_clipq.functional.granularity import PerChannel, PerTensor, extrema
from lit_clipq.functional.search import Round, coarse_to_fine
from lit_clipq.nn.embedding import QEmbedding
from lit_clipq.nn.modules import Phase, QModule, QWeighted
from lit_clipq.nn.quantizer import LogQuantizer, Quantizer, TwinGeluQuantizer, TwinSoftmaxQuantizer, UniformQuantizer
from lit_clipq.nn.start_token import StartTokenAverage, StartTokenScores
from lit_clipq.nn.swap import FLOAT_BITS, Layer, MapEntry
from lit_clipq.recipes.base import Recipe, register
from lit_clipq.recipes.text import batch_text_lengths, has_text_rule

log = logging.getLogger(__name__)

Cotangents = Callable[[Mapping[str, Tensor], Rows], dict[str, Tensor]]


@dataclass(frozen=True)
class PTQ4CLIP(Recipe):
    """Scales of weights and operands that minimise `sum g^2 (O^ - O)^2` of each product over the calibration set."""

    embeddings: bool = True
    """Whether token embedding tables are stored as codes, a scale for each row."""
    softmax_grid: Literal["twin", "uniform", "log2", "log_sqrt2"] = "twin"
    """Grid of attention weights."""
    gelu_grid: Literal["twin", "uniform"] = "twin"
    """Grid behind GELU-like activations."""
    objective: Literal["fisher", "gauss_newton"] = "gauss_newton"
    """Whose gradients g weigh the errors; `search.distance` may also leave them unweighted."""
    temperature: float = 0.1
    """Of the image-text softmax, for the Fisher objective."""
    per_channel: bool = True
    """Whether each output channel of a weight has its own scale; else one scale a projection (q, k and v apart)."""
    start_token: bool = True
    """Whether causal text towers keep the start token's keys and values as float constants."""
    end_token: bool = True
    """Whether positions behind a text's end token are left out of every statistic."""
    sequential: bool = False
    """Whether each layer is searched with its predecessors quantized, one after the other."""
    bias_correction: bool = False
    """Whether the mean error of each output channel, with float inputs in front, is taken off the bias."""
    store_bfloat16: bool = False
    """Whether operands and gradients are stored in bfloat16."""
    seed: int = 0
    """Of the draws in the objective."""
    search: SearchOptions = field(default_factory=SearchOptions)
    """How grids are searched."""

    def footprint(self, calibration: Calibration) -> tuple[int, int]:
        """Predict (bytes of operands, gradients and search workspace, passes over the calibration set).

        Raises:
            CalibrationError: If the memory limit is below what one layer needs.
        """
        groups = calibration.groups(_one_by_one(calibration) if self.sequential else None)
        embed = self.search.distance == "hessian" and self.objective == "fisher"
        needed = max((calibration.group_bytes(group) for group in groups), default=0)
        return needed, len(groups) * (2 if self.sequential else 1) + embed


@dataclass(frozen=True)
class PTQ4CLIPPaper(PTQ4CLIP):
    """PTQ4CLIP on what its report quantized: the convolutions and the linear layers of the MLPs, in both towers.

    Attention and the projections into the embedding stay float.
    """

    embeddings: bool = False
    """Whether token embedding tables are stored as codes."""
    start_token: bool = False
    """Whether causal text towers keep the start token's keys and values as float constants."""

    def why_float(self, layer: Layer) -> str:
        """Leave everything float but convolutions and MLPs."""
        if layer.kind.name == "conv2d" or ".mlp." in layer.name:
            return ""
        return super().why_float(layer) or "the report quantized convolutions and MLPs only"


@dataclass(frozen=True)
class BasePTQ(PTQ4CLIP):
    """The baseline of PTQ4ViT: scales that maximise the cosine similarity of each product, uniform grids only."""

    softmax_grid: Literal["twin", "uniform", "log2", "log_sqrt2"] = "uniform"
    """Grid of attention weights."""
    gelu_grid: Literal["twin", "uniform"] = "uniform"
    """Grid behind GELU-like activations."""
    start_token: bool = False
    """Whether causal text towers keep the start token's keys and values as float constants."""
    end_token: bool = False
    """Whether positions behind a text's end token are left out of every statistic."""
    search: SearchOptions = field(default_factory=lambda: SearchOptions(distance="cosine"))
    """How grids are searched."""


@register("base_ptq", BasePTQ)
@register("ptq4clip_paper", PTQ4CLIPPaper)
@register("ptq4clip", PTQ4CLIP)
def apply(recipe: PTQ4CLIP, calibration: Calibration) -> None:
    """Probe, swap, collect, search and freeze."""
    found = _probe(calibration)
    text_rule = has_text_rule(calibration)
    modules = calibration.swap(lambda layer, entry: _build(recipe, layer, entry, found, text_rule))
    _keep_start_tokens(calibration)
    run = _Run(recipe, calibration, frozenset(found.averages), text_rule)
    cotangents = run.cotangents() if recipe.search.distance == "hessian" else None
    for group in calibration.groups(_one_by_one(calibration) if recipe.sequential else None):
        if recipe.sequential:
            run.search_after_predecessors(group, cotangents)
        else:
            seen = run.collect(group, cotangents)
            for name in group:
                run.search(name, seen.pop(name, []))
    for module in modules.values():
        if isinstance(module, QEmbedding):
            _search_table(module, recipe.search)
        if module.phase is Phase.FLOAT:
            module.freeze()


def _search_table(table: QEmbedding, options: SearchOptions) -> None:
    """Search the scale of each row of a table by the squared error of the row itself."""
    weight, quantizer = table.weight.detach(), table.weight_quantizer
    if quantizer is None:
        return
    family = options.grid.of(quantizer, *extrema(weight, quantizer.granularity))

    def error(index: Tensor) -> Tensor:
        return (family.apply(weight, index) - weight).square_().sum(dim=1)

    with torch.no_grad():
        family.commit(coarse_to_fine(error, family.count, family.start, Round((10, 3, 1))))


def _one_by_one(calibration: Calibration) -> list[list[str]]:
    return [[name] for name in searched_layers(calibration)]


def _probe(calibration: Calibration) -> Probe:
    """Probe with the first batch of the first rank that has one."""
    first = next(iter(calibration.batches), None)
    own = probe(calibration.roots, calibration.layers, calibration.forward, first) if first is not None else None
    return next(found for found in gather(own) if found is not None)


def _keep_start_tokens(calibration: Calibration) -> None:
    """Let the attention products of the text tower take the start token's key and value from one float text."""
    products = {
        name: module
        for name, module in calibration.modules.items()
        if isinstance(module, StartTokenScores | StartTokenAverage)
    }
    first = next(iter(calibration.batches), None)
    with ExitStack() as stack, torch.no_grad():
        for module in products.values():
            hook = module.register_forward_pre_hook(lambda m, inputs: m.keep_constant(*inputs))
            stack.callback(hook.remove)
        if products and first is not None:
            calibration.forward(first)
    own = {name: module.constant.cpu() for name, module in products.items() if module.constant is not None}
    shared = next((constants for constants in gather(own) if constants), {})  # of the first rank that has a text
    for name, module in products.items():
        if name in shared:
            device = module.constant.device if module.constant is not None else None
            module.constant = shared[name].to(device or next(calibration.roots["clip"].parameters()).device)


def _build(recipe: PTQ4CLIP, layer: Layer, entry: MapEntry, found: Probe, text_rule: bool) -> QModule:
    bits = entry.activation_bits

    def operand(twin: Quantizer | None = None) -> Quantizer | None:
        if bits == FLOAT_BITS:
            return None
        return twin if twin is not None else UniformQuantizer(bits, symmetric=False)

    if layer.kind.name == "embedding":
        table = UniformQuantizer(entry.weight_bits or FLOAT_BITS, symmetric=True, granularity=PerChannel(0))
        return layer.kind.quantized_type(layer.module, table)
    if entry.weight_bits is None:
        left = operand(_softmax_grid(recipe, bits) if layer.name in found.averages and bits != FLOAT_BITS else None)
        if recipe.start_token and text_rule and layer.tower == "text":
            kind = StartTokenAverage if layer.name in found.averages else StartTokenScores
            return kind(layer.module, left, operand())
        return layer.kind.quantized_type(layer.module, left, operand())
    weight = None
    if entry.weight_bits != FLOAT_BITS:
        granularity = PerChannel(0) if recipe.per_channel else PerTensor()
        weight = UniformQuantizer(entry.weight_bits, symmetric=True, granularity=granularity)
    twin = None
    if recipe.gelu_grid == "twin" and layer.name in found.minima and bits != FLOAT_BITS:
        twin = TwinGeluQuantizer(bits, found.minima[layer.name])
    return layer.kind.quantized_type(layer.module, weight, operand(twin))


def _softmax_grid(recipe: PTQ4CLIP, bits: int) -> Quantizer | None:
    if recipe.softmax_grid == "twin":
        return TwinSoftmaxQuantizer(bits)
    if recipe.softmax_grid == "uniform":
        return None
    return LogQuantizer(bits, steps_per_octave=1 if recipe.softmax_grid == "log2" else 2)


@dataclass
class _Run:
    """The passes over the calibration set."""

    recipe: PTQ4CLIP
    calibration: Calibration
    averages: frozenset[str]
    text_rule: bool

    def batches(self) -> Iterator[tuple[Any, Rows]]:
        """Yield each batch with its global sample numbers and the lengths of its texts."""
        position = 0
        for batch in self.calibration.batches:
            size = count_samples(batch)
            samples = torch.arange(position, position + size) * world_size() + rank()
            position += size
            yield batch, Rows(samples, self._lengths(batch), self.recipe.start_token)

    def _lengths(self, batch: Any) -> Tensor | None:
        lengths = batch_text_lengths(self.calibration, batch)
        if lengths is None or self.recipe.end_token:
            return lengths
        return lengths.amax().expand(len(lengths))

    def cotangents(self) -> Cotangents:
        """Return a function from (outputs, rows) of a batch to the gradient of the objective by each output."""
        seed = self.recipe.seed
        if self.recipe.objective == "gauss_newton":
            return lambda outputs, rows: {
                name: random_directions(value.shape, rows.samples, seed + i).to(value)
                for i, (name, value) in enumerate(sorted(outputs.items()))
            }
        gradients = self._fisher()
        return lambda outputs, rows: {
            name: torch.stack([gradients[name][number] for number in rows.samples.tolist()]).to(value)
            for name, value in outputs.items()
        }

    def _fisher(self) -> dict[str, dict[int, Tensor]]:
        """Embed the whole calibration set, over all ranks, and differentiate the image-text softmax once."""
        own: dict[str, list[Tensor]] = {"image": [], "text": []}
        numbers = [torch.zeros(0, dtype=torch.int64)]
        with torch.no_grad():
            for batch, rows in self.batches():
                outputs = self.calibration.forward(batch)
                if set(outputs) != set(own):
                    raise CalibrationError(
                        "the Fisher objective needs calibration pairs and takes embeddings of pictures and texts, got "
                        f"{' and '.join(sorted(outputs)) or 'nothing'} alone; give captions or, for a task without "
                        "image-text softmax, take the Gauss-Newton objective"
                    )
                numbers.append(rows.samples)
                for name, value in outputs.items():
                    own[name].append(value.float().cpu())
        pieces = gather((torch.cat(numbers), own))
        order = torch.cat([samples for samples, _ in pieces]).argsort()
        image, text = (torch.cat([x for _, rows in pieces for x in rows[name]])[order] for name in ("image", "text"))
        gradients = contrastive_cotangents(image, text, self.recipe.temperature, self.recipe.seed)
        return {name: dict(enumerate(g)) for name, g in zip(("image", "text"), gradients, strict=True)}

    def collect(self, names: Sequence[str], cotangents: Cotangents | None) -> dict[str, list[Observations]]:
        """Run the calibration set once and return what the named layers saw."""
        modules = {name: self.calibration.modules[name] for name in names}
        text = frozenset(layer.name for layer in self.calibration.layers if layer.tower == "text" and self.text_rule)
        with (
            recording(
                modules,
                text=text,
                averages=self.averages,
                gradients=cotangents is not None,
                dtype=torch.bfloat16 if self.recipe.store_bfloat16 else None,
            ) as recorder,
            torch.set_grad_enabled(cotangents is not None),
        ):
            for batch, rows in self.batches():
                recorder.rows = rows
                outputs = self.calibration.forward(batch)
                if cotangents is not None:
                    directions = cotangents(outputs, rows)
                    torch.autograd.backward(list(outputs.values()), [directions[name] for name in outputs])
        if cotangents is not None:
            _check_gradients(recorder.seen)
        return recorder.seen

    def search(self, name: str, seen: list[Observations]) -> None:
        """Search one layer's grids and keep its result."""
        module = self.calibration.modules[name]
        search = LayerSearch(module, seen, self.recipe.search)
        result = search.run()
        if self.recipe.bias_correction and isinstance(module, QWeighted):
            correction = -search.mean_error().to(module.weight)
            module.bias = nn.Parameter(correction if module.bias is None else module.bias.detach() + correction)
        self.calibration.results[name] = result
        log.info("%s: %.4g -> %.4g, %.1f dB", name, result.before, result.after, result.sqnr_db)
        self.calibration.progress(name)

    def search_after_predecessors(self, names: Sequence[str], cotangents: Cotangents | None) -> None:
        """Search layers whose predecessors are frozen: quantized operands, float targets and gradients."""
        frozen = [m for m in self.calibration.modules.values() if m.phase is Phase.QUANTIZED]
        for module in frozen:
            module.phase = Phase.FLOAT
        exact = self.collect(names, cotangents)
        for module in frozen:
            module.phase = Phase.QUANTIZED
        actual = self.collect(names, None)
        for name in names:
            module = self.calibration.modules[name]
            for want, have in zip(exact[name], actual[name], strict=True):
                have.weight = want.weight
                with torch.no_grad():
                    have.target = module.product(*(x.float() for x in want.inputs))
            self.search(name, actual[name])
            module.freeze()


def _check_gradients(seen: dict[str, list[Observations]]) -> None:
    for name, observations in seen.items():
        total = sum(float(o.weight.sum(dtype=torch.float64)) if o.weight is not None else 0.0 for o in observations)
        if not math.isfinite(total):
            raise CalibrationError(
                f"layer {name} received NaN or Inf as gradient; check the calibration samples, or calibrate in float32"
            )
        if total == 0.0:
            raise CalibrationError(
                f"layer {name} received no gradient at all: the calibrated outputs do not depend on it; exclude it or "
                "take an objective whose outputs do"
            )
