"""Rotations that leave the float function as it is and spread outliers over channels (QuaRot, SpinQuant).

After arXiv 2404.00456 and 2405.16406, for LayerNorm without its conversion to RMSNorm: without gain and bias it
commutes with every orthogonal R that keeps the vector of ones, `norm(x R) = norm(x) R`. All is folded in float64.
"""

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.calibration.batches import count_samples
from lit_clipq.calibration.channels import Channels, Link
from lit_clipq.calibration.needs import Need, Write
from lit_clipq.calibration.scaling import ChannelScaling, divided, multiplied
from lit_clipq.distributed import gather
from lit_clipq.errors import ConfigError
from lit_clipq.functional.rotation import keeping_ones, random_orthogonal
from lit_clipq.models.attention.openclip import ExplicitMultihead, ExplicitOpenClip, ExplicitPool2d
from lit_clipq.models.attention.timm import ExplicitPoolLatent, ExplicitTimm
from lit_clipq.models.residual import ResidualStream, residual_streams
from lit_clipq.nn.attention import ExplicitAttention
from lit_clipq.nn.rotation import RotatedNorm
from lit_clipq.nn.structure import float_bias, rotated_norm
from lit_clipq.nn.swap import FLOAT_BITS, MapEntry, QuantizationMap
from lit_clipq.stages.draft import Draft
from lit_clipq.stages.proof import output_change
from lit_clipq.stages.stage import FloatStage, Report, Stage, stage

log = logging.getLogger(__name__)

_TOLERANCE = 1e-5  # relative, of the float output
_ROPE = ("EvaAttention", "AttentionRope")
REASON = "rotates the residual stream's border, which tasks read, in float"


@stage("rotate")
@dataclass(frozen=True)
class Rotate(FloatStage):
    """Rotate residual streams, the values of attentions, and their queries with their keys.

    Each is done where it leaves the function as it is, and the report names what is left out and why; where an option
    is `true`, a place where it cannot be done is an error. Matrices are Hadamard where the size allows, else random.

    - `residual`: gains and biases of LayerNorms are folded into what reads them, embeddings and what writes into the
      stream are rotated. A first normalisation is followed, the last one preceded by a product with the matrix, in
      float, as tasks read what is behind it; both are listed in the map. What reads the last normalisation divides its
      input by that one's gain instead.
    - `values`: each head's values, their channels brought to one size first, and the columns of the output projection.
    - `keys`: each head's queries and keys by the same matrix.
    """

    needs = frozenset({Need.LINKS, Need.OUTPUTS})
    writes = frozenset({Write.NORMS, Write.WEIGHTS, Write.BIAS, Write.STRUCTURE})

    residual: bool | None = None
    """Whether residual streams are rotated; `null` is wherever it can be done."""
    values: bool | None = None
    """Whether values are rotated; `null` is wherever it can be done."""
    keys: bool | None = None
    """Whether queries and keys are rotated; `null` is wherever it can be done."""
    seed: int = 0
    """Of signs and random matrices."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed of rotate must be at least 0 and below 2^31, got {self.seed}")

    def check_behind(self, before: Sequence[Stage]) -> None:
        """Refuse stages in front that scaled channels, which folding the gains would undo."""
        early = next((s.name for s in before if isinstance(s, FloatStage)), None)
        if early is not None:
            raise ConfigError(
                f"stage rotate must stand before {early}: rotating folds the gains of LayerNorms and mixes channels, "
                f"which undoes what {early} did to single ones"
            )

    def check_networks(self, plan: QuantizationMap, roots: Mapping[str, nn.Module]) -> None:
        """Refuse, by name, what an option that is `true` cannot be done to."""
        for option, places in (
            ("residual", _streams(roots, plan)),
            ("values", _attentions(roots, plan, why_not_values)),
            ("keys", _attentions(roots, plan, why_not_keys)),
        ):
            if getattr(self, option):
                for name, found in places:
                    if isinstance(found, str):
                        raise ConfigError(
                            f"rotate cannot rotate the {option} of {name}: {found}; set {option} of rotate to null "
                            "(wherever it can be done) or false, or leave these layers out of the recipe"
                        )

    @torch.no_grad()
    def rewrite(self, draft: Draft) -> Report:
        """Rotate the network of a draft.

        Returns:
            By place: the size of the matrix, or why it is left out; by `float outputs` their largest relative change.
        """
        roots, plan = draft.session.roots, draft.plan
        seen = draft.session.links  # of the network as it was
        report: dict[str, Any] = {}
        work = _Rotation(draft, self.seed, seen.channels)
        turns: tuple[tuple[str, Iterable[tuple[str, Any]], Callable[[str, Any], int]], ...] = (
            ("values", _attentions(roots, plan, why_not_values), work.values),
            ("keys", _attentions(roots, plan, why_not_keys), work.keys),
            ("residual", _streams(roots, plan), work.residual),
        )
        for option, places, turn in turns:
            for name, found in places if getattr(self, option) is not False else ():
                told = {"reason": found} if isinstance(found, str) else {"size": turn(name, found)}
                report[f"{name} ({option})"] = told
        work.divide_by_last_gains(seen.links)
        change = work.measure()
        if change > _TOLERANCE:
            log.warning("rotating changes the float outputs by %.1e of the largest, expected %.0e", change, _TOLERANCE)
        return {**report, "float outputs": {"relative change": change}}


def why_not_values(attention: ExplicitAttention) -> str:
    """Return why the values of an attention cannot be rotated, or an empty text."""
    if attention.hands_on_values:
        return "its values go into a cache that others change"
    if not isinstance(attention, _KNOWN):
        return f"what {type(attention).__name__} does to its heads is not known"
    parts: Any = attention._modules
    inner = next((n for n in _inner_norms(attention) if not isinstance(parts[n], nn.Identity)), None)
    if inner is not None:
        return f"{inner} stands between its values and out_proj"
    if parts.get("gate") is not None:
        return "gate stands between its values and out_proj"
    if getattr(attention, "head_scale", None) is not None:
        return "head_scale stands between its values and out_proj"
    return "" if isinstance(attention.out_proj, nn.Linear) else "out_proj is no linear layer"


def why_not_keys(attention: ExplicitAttention) -> str:
    """Return why queries and keys of an attention cannot be rotated, or an empty text."""
    if not isinstance(attention, _KNOWN):
        return f"what {type(attention).__name__} does to its heads is not known"
    if attention.original.endswith(_ROPE):
        return "its queries and keys are rotated by position"
    parts: Any = attention._modules
    normed = next((n for n in ("ln_q", "ln_k", "q_norm", "k_norm") if not _is_identity(parts.get(n))), None)
    if normed is not None:
        return f"{normed} stands between its projection and the scores"
    return "its scores are cosines" if getattr(attention, "logit_scale", None) is not None else ""


_KNOWN = (ExplicitMultihead, ExplicitOpenClip, ExplicitTimm, ExplicitPool2d, ExplicitPoolLatent)


def _inner_norms(attention: ExplicitAttention) -> tuple[str, ...]:
    if isinstance(attention, ExplicitOpenClip):
        return ("ln_inner",)
    return ("norm",) if isinstance(attention, ExplicitTimm) else ()


def _is_identity(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)


def _attentions(
    roots: Mapping[str, nn.Module], plan: QuantizationMap, why_not: Callable[[ExplicitAttention], str]
) -> Iterator[tuple[str, ExplicitAttention | str]]:
    """Yield the attentions that have a quantized layer, or why one is left out."""
    quantized = {entry.name.rpartition(".")[0] for entry in plan.quantized}
    for root, network in roots.items():
        for name, module in network.named_modules():
            if isinstance(module, ExplicitAttention) and f"{root}.{name}" in quantized:
                yield f"{root}.{name}", why_not(module) or module


def _streams(
    roots: Mapping[str, nn.Module], plan: QuantizationMap
) -> Iterator[tuple[str, tuple[str, ResidualStream] | str]]:
    """Yield the towers of a CLIP that have a quantized layer, with their streams or why there is none."""
    towers = {entry.tower for entry in plan.quantized}
    for root, network in roots.items():
        if root == "clip":
            for tower, found in residual_streams(network):
                if tower in towers:
                    yield f"{root} ({tower} tower)", found if isinstance(found, str) else (root, found)
        elif root in towers:
            yield root, "it is no CLIP"


@dataclass
class _Rotation:
    """What is done to the network of a draft."""

    draft: Draft
    seed: int
    seen: Mapping[str, Channels]

    def __post_init__(self) -> None:
        self.names = {module: name for name, module in self.draft.session.modules.items()}
        self.borders: dict[str, tuple[RotatedNorm, str]] = {}
        self.gains: dict[str, Tensor] = {}

    def values(self, name: str, attention: ExplicitAttention) -> int:
        """Rotate each head's values and the columns of the output projection; returns the size of a head.

        Channels are brought to one root mean square first: what stands out by its size alone would drown the others.
        """
        maker, first = _projection(attention, "v")
        size = (_rows_of(maker) - first) // attention.num_heads
        out = attention.out_proj
        sizes = self._sizes(self.names[out], attention.num_heads * size)
        for parameter, _ in list(maker.named_parameters(recurse=False)):
            self._put(maker, parameter, divided(maker.get_parameter(parameter).double(), first, sizes))
        matrix = self._random(size, f"{name}.values")
        self._rows(maker, first, matrix, attention.num_heads)
        columns = multiplied(out.get_parameter("weight").double(), sizes).unflatten(1, (attention.num_heads, size))
        self._put(out, "weight", (columns @ matrix.to(columns.device)).flatten(1))
        return size

    def _sizes(self, reader: str, channels: int) -> Tensor:
        """Return the root mean squares of what a layer reads, relative to their median; ones where it was not seen."""
        seen = self.seen.get(reader)
        if seen is None or len(seen.squares) != channels:
            return torch.ones(channels, dtype=torch.float64)
        sizes = (seen.squares / seen.rows).sqrt()
        return (sizes / sizes.median().clamp(min=1e-30)).clamp(1e-3, 1e3)

    def keys(self, name: str, attention: ExplicitAttention) -> int:
        """Rotate each head's queries and keys; returns the size of a head."""
        places = [_projection(attention, part) for part in "qk"]
        size = _query_rows(attention) // attention.num_heads
        matrix = self._random(size, f"{name}.keys")
        for maker, first in places:
            self._rows(maker, first, matrix, attention.num_heads)
        return size

    def residual(self, name: str, found: tuple[str, ResidualStream]) -> int:
        """Rotate a residual stream; returns its width."""
        root, stream = found
        matrix = keeping_ones(stream.width, self._seed(f"{name}.residual"))
        for writer in stream.writers:
            self._fold_scale(writer.layer, writer.scale)
            self._rows(writer.layer, 0, matrix, 1)
        for norm, readers in stream.readers:
            self._fold_norm(norm, readers, matrix)
        for patches in stream.patches:
            self._rows(patches, 0, matrix, 1)
        for owner, parameter in stream.embeddings:
            value = owner.get_parameter(parameter).double()
            self._put(owner, parameter, value @ matrix.to(value.device))
        if stream.first is not None:
            self._border(root, stream.tower, *stream.first, matrix, behind=True)
        for owner, key in stream.last:
            last: Any = owner._modules[key]
            if isinstance(last, nn.LayerNorm) and last.elementwise_affine:
                gain = last.weight.double().square()
                square = gain if last.bias is None else gain + last.bias.double().square()
                self.gains[self.names[last]] = square.sqrt().cpu()
            self._border(root, stream.tower, owner, key, matrix.T, behind=False)
        return stream.width

    def divide_by_last_gains(self, links: tuple[Link, ...]) -> None:
        """Let what reads a last LayerNorm divide its input by the root mean square that this gives each channel."""
        widths = {entry.name for entry in self.draft.plan.quantized}
        scalings = []
        for link in links:
            sizes = self.gains.get(link.maker)
            if sizes is not None and link.at_reader:
                readers = tuple(name for name in link.readers if name in widths)
                factors = (sizes / sizes.median().clamp(min=1e-30)).clamp(1e-3, 1e6)
                scalings += [ChannelScaling(replace(link, readers=readers), factors)] if readers else []
        self.draft.scale(scalings)

    def measure(self) -> float:
        """Enter the products at the borders into the map, and return the largest relative change of the outputs."""
        session, products = self.draft.session, dict.fromkeys(self.borders, 0)

        def watch(name: str) -> Callable[..., None]:
            def count(module: RotatedNorm, inputs: tuple[Tensor, ...], _: Tensor) -> None:
                products[name] += inputs[0].numel() * len(module.rotation)

            return count

        handles = [module.register_forward_hook(watch(name)) for name, (module, _) in self.borders.items()]
        try:
            change = output_change(self.draft)
        finally:
            for handle in handles:
                handle.remove()
        samples = max(1, sum(count_samples(batch) for batch in session.data.examples))
        counts = gather({name: total / samples for name, total in products.items()})
        added = tuple(
            MapEntry(
                name, tower, "rotation", FLOAT_BITS, FLOAT_BITS, max(c.get(name, 0.0) for c in counts), reason=REASON
            )
            for name, (_, tower) in self.borders.items()
        )
        self.draft.plan = QuantizationMap((*self.draft.plan.entries, *added))
        return change

    def _seed(self, name: str) -> int:
        return (self.seed + zlib.crc32(name.encode())) % 2**31

    def _random(self, size: int, name: str) -> Tensor:
        return random_orthogonal(size, self._seed(name))

    def _put(self, owner: nn.Module, parameter: str, value: Tensor) -> None:
        self.draft.replace(owner, parameter, value)

    def _rows(self, layer: nn.Module, first: int, matrix: Tensor, heads: int) -> None:
        """Rotate the output features of a layer from `first` on, head by head: `W <- R^T W`, `b <- R^T b`."""
        last = first + heads * len(matrix)
        for name, parameter in list(layer.named_parameters(recurse=False)):
            value = parameter.detach().double()
            rows = (
                value[first:last].unflatten(0, (heads, len(matrix))).flatten(2)
                if value.dim() > 1
                else value[first:last].view(heads, len(matrix), 1)
            )
            turned = matrix.T.to(value.device) @ rows
            value[first:last] = turned.reshape(value[first:last].shape)
            self._put(layer, name, value)

    def _fold_scale(self, layer: nn.Linear, scale: tuple[nn.Module, str] | None) -> None:
        if scale is not None:
            gamma = scale[0].get_parameter(scale[1]).double()
            self._put(layer, "weight", layer.weight.double() * gamma[:, None])
            if layer.bias is not None:
                self._put(layer, "bias", layer.bias.double() * gamma)
            self._put(scale[0], scale[1], torch.ones_like(gamma))

    def _fold_norm(self, norm: nn.LayerNorm, readers: list[nn.Linear], matrix: Tensor) -> None:
        """Fold gain and bias of a LayerNorm into its readers, and let them read rotated channels."""
        gain = norm.weight.double() if norm.elementwise_affine else None
        bias = norm.bias.double() if norm.elementwise_affine and norm.bias is not None else None
        for reader in readers:
            weight = reader.weight.double()
            if bias is not None and bool((bias != 0).any()):
                if reader.bias is None:
                    entry = float_bias(self.names[reader])
                    self.draft.add_parameter(reader, "bias", weight.new_zeros(len(weight)), entry)
                self._put(reader, "bias", reader.bias.double() + weight @ bias)
            weight = weight if gain is None else weight * gain
            self._put(reader, "weight", weight @ matrix.to(weight.device))
        if gain is not None:
            self._put(norm, "weight", torch.ones_like(gain))
        if bias is not None:
            self._put(norm, "bias", torch.zeros_like(bias))

    def _border(self, root: str, tower: str, owner: nn.Module, key: str, matrix: Tensor, *, behind: bool) -> None:
        norm = owner._modules[key]
        assert norm is not None  # noqa: S101 - the stream names what is there
        name = self.names[norm] if norm in self.names else ".".join(part for part in (root, tower, key) if part)
        like = next(self.draft.session.roots[root].parameters())
        border = RotatedNorm(norm, matrix.to(like), behind=behind)

        def do() -> None:
            owner._modules[key] = border

        def undo() -> None:
            owner._modules[key] = norm

        self.draft.change(do, undo)
        self.draft.structure.append(dict(rotated_norm(name, len(matrix), behind=behind)))
        self.borders[f"{name}.rotation"] = border, "vision" if "visual" in name.split(".") else "text"


def _rows_of(layer: nn.Module) -> int:
    return len(layer.get_parameter("weight"))


def _query_rows(attention: ExplicitAttention) -> int:
    parts: Any = attention._modules
    return int(parts["qkv_proj"].segments[0]) if "qkv_proj" in parts else _rows_of(parts["q_proj"])


def _projection(attention: ExplicitAttention, part: str) -> tuple[nn.Module, int]:
    """Return the layer that makes queries, keys or values, and its first row that does."""
    parts: Any = attention._modules
    joint, order = ("qkv_proj", "qkv") if "qkv_proj" in parts else ("kv_proj", "kv")
    if joint in parts and part in order:
        return parts[joint], sum(parts[joint].segments[: order.index(part)])
    return parts[f"{part}_proj"], 0
