"""PTQ4CLIP: twin uniform grids and a Hessian-guided search of every scale (after PTQ4ViT, arXiv 2111.12293)."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_clipq.calibration.collect import Observations, Rows, recording, without_parameter_gradients
from lit_clipq.calibration.emulation import emulated, rounded_weight
from lit_clipq.calibration.engine import Calibration, Storage, one_of_each_kind, sample_counts, searched_layers
from lit_clipq.calibration.objective import (
    back_propagate,
    check_gradients,
    contrastive_cotangents,
    named_outputs,
    random_directions,
)
from lit_clipq.calibration.probe import Probe, joined, probe
from lit_clipq.calibration.start_tokens import keep_start_tokens
from lit_clipq.calibration.streams import in_turn
from lit_clipq.distributed import gather, rank, world_size
from lit_clipq.errors import CalibrationError, ConfigError
from lit_clipq.functional.granularity import PerChannel, PerTensor, extrema
from lit_clipq.nn.embedding import QEmbedding
from lit_clipq.nn.modules import QModule, QWeighted
from lit_clipq.nn.quantizer import LogQuantizer, Quantizer, TwinGeluQuantizer, TwinSoftmaxQuantizer, UniformQuantizer
from lit_clipq.nn.start_token import StartTokenAverage, StartTokenScores
from lit_clipq.nn.swap import FLOAT_BITS, Layer, MapEntry
from lit_clipq.recipes.base import Recipe, register
from lit_clipq.recipes.equalize import equalize
from lit_clipq.recipes.text import has_text_rule, measuring_texts
from lit_clipq.search.layer import LayerResult, LayerSearch, SearchOptions
from lit_clipq.search.selection import coarse_to_fine

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
    draws: int = 1
    """How many draws the squared gradients of a sample are averaged over; each is one more backward pass."""
    temperature: float = 0.1
    """Of the image-text softmax, for the Fisher objective."""
    per_channel: bool = True
    """Whether each output channel of a weight has its own scale; else one scale a projection (q, k and v apart)."""
    start_token: bool = True
    """Whether causal text towers keep the start token's keys and values as float constants."""
    end_token: bool = True
    """Whether positions behind a text's end token are left out of every statistic."""
    equalize: bool = True
    """Whether channels that LayerNorms and attentions hand on within a block are equalised first, by powers of two."""
    sequential: bool = False
    """Whether each layer is searched with its predecessors quantized, one after the other."""
    bias_correction: bool = False
    """Whether the mean error of each output channel, with float inputs in front, is taken off the bias."""
    store_bfloat16: bool = False
    """Whether operands and gradients are stored in bfloat16."""
    token_share: float = 1.0
    """Share of the rows (tokens) of linear layers that is stored and searched; their ranges still count all of them."""
    seed: int = 0
    """Of the draws in the objective."""
    search: SearchOptions = field(default_factory=SearchOptions)
    """How grids are searched."""

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ConfigError(f"draws must be at least 1, got {self.draws}")
        if not 0 < self.token_share <= 1:
            raise ConfigError(f"token_share must be above 0 and at most 1, got {self.token_share}")

    def footprint(self, calibration: Calibration) -> tuple[int, int]:
        """Predict (bytes of operands, gradients and search workspace, passes over the calibration set).

        Raises:
            CalibrationError: If the memory limit is below what one layer needs.
        """
        groups = calibration.groups(self.storage)
        embed = self.search.distance == "hessian" and self.objective == "fisher"
        needed = max((calibration.group_bytes(group, self.storage) for group in groups), default=0)
        return needed, len(groups) + (sum(map(len, groups)) if self.sequential else 0) + embed + self.equalize

    @property
    def storage(self) -> Storage:
        """How observations are kept."""
        width = 2 if self.store_bfloat16 else 4
        return Storage(width, gradients=self.search.distance == "hessian", token_share=self.token_share)


@dataclass(frozen=True)
class PTQ4CLIPPaper(PTQ4CLIP):
    """PTQ4CLIP on what its report quantized: the convolutions and the linear layers of the MLPs, in both towers.

    Attention and the projections into the embedding stay float.
    """

    embeddings: bool = False
    """Whether token embedding tables are stored as codes."""
    start_token: bool = False
    """Whether causal text towers keep the start token's keys and values as float constants."""
    equalize: bool = False
    """Whether channels that LayerNorms and attentions hand on within a block are equalised first, by powers of two."""

    def why_float(self, layer: Layer) -> str:
        """Leave everything float but convolutions and MLPs."""
        if layer.kind.name == "conv2d" or ".mlp." in layer.name:
            return ""
        return super().why_float(layer) or "the report quantized convolutions and MLPs only"


@dataclass(frozen=True)
class BasePTQ(PTQ4CLIP):
    """The baseline of PTQ4ViT: scales that maximise the cosine similarity of each product, uniform grids only.

    Each channel of a weight has a scale of its own, and the cosine of its column of the product decides on it.
    """

    softmax_grid: Literal["twin", "uniform", "log2", "log_sqrt2"] = "uniform"
    """Grid of attention weights."""
    gelu_grid: Literal["twin", "uniform"] = "uniform"
    """Grid behind GELU-like activations."""
    start_token: bool = False
    """Whether causal text towers keep the start token's keys and values as float constants."""
    end_token: bool = False
    """Whether positions behind a text's end token are left out of every statistic."""
    equalize: bool = False
    """Whether channels that LayerNorms and attentions hand on within a block are equalised first, by powers of two."""
    search: SearchOptions = field(default_factory=lambda: SearchOptions(distance="cosine"))
    """How grids are searched."""


@register("base_ptq", BasePTQ)
@register("ptq4clip_paper", PTQ4CLIPPaper)
@register("ptq4clip", PTQ4CLIP)
def apply(recipe: PTQ4CLIP, calibration: Calibration) -> None:
    """Probe, swap, collect, search and freeze.

    Raises:
        CalibrationError: For layers that no batch reaches or that are not float32, texts or gradients that do not do.
    """
    _check(calibration)
    found = probe(calibration.roots, calibration.layers, calibration.forward, one_of_each_kind(calibration.batches))
    found = joined(gather(found))
    text_rule, start = has_text_rule(calibration), _start_products(recipe, calibration)
    if recipe.equalize:
        calibration.equalized = equalize(
            calibration, end_token=recipe.end_token, drop_start=bool(start), per_channel=recipe.per_channel
        )
    modules = calibration.swap(lambda layer, entry: _build(recipe, layer, entry, found, text_rule))
    keep_start_tokens({name: modules[name] for name in start}, calibration)
    run = _Run(recipe, calibration, frozenset(found.averages), text_rule, drop_start=bool(start))
    cotangents = run.cotangents() if recipe.search.distance == "hessian" else None
    for group in calibration.groups(recipe.storage):
        run.search_group(group, cotangents)
    for name, module in modules.items():
        if isinstance(module, QEmbedding):
            _search_table(module, recipe.search)
        elif isinstance(module, QWeighted) and name in run.biases:
            module.bias = nn.Parameter(run.biases[name])
        module.freeze()


def _check(calibration: Calibration) -> None:
    reached = set(searched_layers(calibration))
    products = [entry.name for entry in calibration.plan.quantized if entry.kind != "embedding"]
    unseen = [name for name in products if name not in reached]
    if unseen:
        raise CalibrationError(
            f"layer {unseen[0]} saw 0 calibration batches ({len(unseen)} such layers); give batches that reach it "
            "(pictures for the image tower, texts for the text tower) or exclude it"
        )
    for layer in calibration.layers:
        weight = getattr(layer.module, "weight", None)
        if layer.name in reached and weight is not None and weight.dtype != torch.float32:
            raise CalibrationError(
                f"the search needs float32, but {layer.name} is in {str(weight.dtype).removeprefix('torch.')}; "
                "calibrate the model in fp32"
            )


def _search_table(table: QEmbedding, options: SearchOptions) -> None:
    """Search the scale of each row of a table by the squared error of the row itself."""
    weight, quantizer = table.weight.detach(), table.weight_quantizer
    if quantizer is None:
        return
    family = options.grid.of(quantizer, *extrema(weight, quantizer.granularity), device=weight.device)

    def error(index: Tensor) -> Tensor:
        return (family.apply(weight, index[None])[0] - weight).square_().sum(dim=1)

    with torch.no_grad():
        family.commit(coarse_to_fine(error, family.count, family.start))


def _start_products(recipe: PTQ4CLIP, calibration: Calibration) -> list[str]:
    """Name the products that keep the start token's key or value: all those of the text tower, or none.

    If one were left out, the start token would have to pass through grids that never saw it.
    """
    if not (recipe.start_token and has_text_rule(calibration)):
        return []
    names = [layer.name for layer in calibration.layers if layer.tower == "text" and layer.kind.name == "matmul"]
    quantized = {entry.name for entry in calibration.plan.quantized}
    return names if quantized.issuperset(names) else []


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
    drop_start: bool
    biases: dict[str, Tensor] = field(default_factory=dict)
    rounded: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def batches(self) -> Iterator[tuple[Any, Rows]]:
        """Yield each batch with its global sample numbers."""
        position = 0
        for batch in self.calibration.batches:
            sizes = sample_counts(batch)
            samples = torch.arange(position, position + sizes[0]) * world_size() + rank()
            position += sizes[0]
            yield batch, Rows(samples, drop_start=self.drop_start, sizes=sizes)

    def cotangents(self) -> Cotangents:
        """Return a function from (outputs, rows) of a batch to gradients of the objective by each output, (K, *)."""
        seed, draws = self.recipe.seed, self.recipe.draws
        if self.recipe.objective == "gauss_newton":
            return lambda outputs, rows: {
                name: random_directions(value.shape, rows.samples, seed + i, draws).to(value) / draws**0.5
                for i, (name, value) in enumerate(sorted(outputs.items()))
            }
        gradients = self._fisher()
        return lambda outputs, rows: {
            name: torch.stack([gradients[name][number] for number in rows.samples.tolist()], dim=1).to(value)
            / draws**0.5
            for name, value in outputs.items()
            if name in gradients
        }

    def _fisher(self) -> dict[str, dict[int, Tensor]]:
        """Embed the whole calibration set, over all ranks, and differentiate the image-text softmax for every draw.

        Returns:
            Gradients (K, D) by sample number, of pictures and of texts.
        """
        own: dict[str, list[Tensor]] = {}
        numbers: list[int] = []
        with torch.no_grad():
            for batch, rows in self.batches():
                numbers += rows.samples.tolist()
                for name, value in named_outputs(self.calibration.forward(batch)).items():
                    own.setdefault(name, []).append(value.float().cpu())
        pieces = gather((numbers, {name: torch.cat(values) for name, values in own.items()}))
        pieces = [piece for piece in pieces if piece[0]]
        others = sorted({name for _, rows in pieces for name in rows} - {"image", "text"})
        if others:
            raise CalibrationError(
                f"the Fisher objective takes embeddings of pictures and texts, got {', '.join(others)}; for "
                "a task without image-text softmax take the Gauss-Newton objective"
            )
        counts = [{name: len(rows[name]) if name in rows else 0 for name in ("image", "text")} for _, rows in pieces]
        if any(set(count.values()) != {len(piece[0])} for count, piece in zip(counts, pieces, strict=True)):
            raise CalibrationError(
                "the Fisher objective needs calibration pairs of pictures and texts, got "
                f"{sum(c['image'] for c in counts)} pictures and {sum(c['text'] for c in counts)} texts that are not "
                "paired batch by batch; give captions or take the Gauss-Newton objective"
            )
        order = sorted((number, i) for i, number in enumerate(n for numbers, _ in pieces for n in numbers))
        image, text = (
            torch.cat([rows[name] for _, rows in pieces])[[i for _, i in order]] for name in ("image", "text")
        )
        recipe = self.recipe
        drawn = [contrastive_cotangents(image, text, recipe.temperature, recipe.seed + i) for i in range(recipe.draws)]
        return {
            name: {number: row for (number, _), row in zip(order, torch.stack(draws, dim=1), strict=True)}
            for name, draws in zip(("image", "text"), zip(*drawn, strict=True), strict=True)
        }

    def collect(self, names: Sequence[str], cotangents: Cotangents | None) -> dict[str, list[Observations]]:
        """Run the calibration set once and return what the named layers saw."""
        modules = {name: self.calibration.modules[name] for name in names}
        text = frozenset(layer.name for layer in self.calibration.layers if layer.tower == "text" and self.text_rule)
        with (
            without_parameter_gradients(self.calibration.roots.values()),
            recording(
                modules,
                text=text,
                averages=self.averages,
                gradients=cotangents is not None,
                dtype=torch.bfloat16 if self.recipe.store_bfloat16 else None,
                token_share=self.recipe.token_share,
            ) as recorder,
            measuring_texts(self.calibration, lambda: recorder.rows, end_token=self.recipe.end_token),
            torch.set_grad_enabled(cotangents is not None),
        ):
            for batch, rows in self.batches():
                recorder.rows = rows
                outputs = self.calibration.forward(batch)
                if cotangents is not None:
                    outputs = named_outputs(outputs)
                    drawn = cotangents(outputs, rows)
                    for i in range(self.recipe.draws):
                        one = {name: gradients[i] for name, gradients in drawn.items()}
                        back_propagate(outputs, one, keep=i + 1 < self.recipe.draws)
                recorder.finish_batch()
        if cotangents is not None:
            check_gradients(names, recorder.seen)
        return recorder.seen

    def search_group(self, names: Sequence[str], cotangents: Cotangents | None) -> None:
        """Search layers that fit the memory limit together."""
        seen = self.collect(names, cotangents)
        if self.recipe.sequential:
            for name in names:
                self.keep(name, *self.search(name, self._behind_predecessors(name, seen.pop(name, []))))
            return
        jobs = [partial(self.search, name, seen.pop(name, [])) for name in names]
        alone = world_size() > 1 or self.calibration.memory_limit_bytes is not None
        for name, found in zip(names, in_turn(jobs, self.calibration.device, together=not alone), strict=True):
            self.keep(name, *found)

    def _behind_predecessors(self, name: str, exact: list[Observations]) -> list[Observations]:
        """Return what a layer sees once the layers searched so far are quantized; gradients and targets stay exact."""
        with emulated({done: self.calibration.modules[done] for done in self.calibration.results}, self.rounded):
            actual = self.collect([name], None).get(name, [])
        module = self.calibration.modules[name]
        with torch.no_grad():
            for want, have in zip(exact, actual, strict=True):
                have.weight = want.weight
                have.target = module.product(*(x.float() for x in want.inputs))
        return actual

    def search(self, name: str, seen: list[Observations]) -> tuple[LayerResult, Tensor | None]:
        """Search one layer's grids; return how it went, and a new bias if biases are corrected."""
        module = self.calibration.modules[name]
        search = LayerSearch(module, seen, self.recipe.search, name=name, device=self.calibration.device)
        result = search.run()
        if not (self.recipe.bias_correction and isinstance(module, QWeighted)):
            return result, None
        error = search.mean_error().to(module.weight)
        return result, -error if module.bias is None else module.bias.detach() - error

    def keep(self, name: str, result: LayerResult, bias: Tensor | None) -> None:
        """Keep what the search of a layer found, and tell that it is done."""
        module = self.calibration.modules[name]
        if bias is not None:
            self.biases[name] = bias
        if self.recipe.sequential and isinstance(module, QWeighted):
            self.rounded[name] = rounded_weight(module), self.biases.get(name, module.bias)
        self.calibration.results[name] = result
        log.info("%s: %.4g -> %.4g, %.1f dB", name, result.before, result.after, result.sqnr_db)
        self.calibration.progress(name)
