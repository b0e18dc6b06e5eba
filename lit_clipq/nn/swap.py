"""Find quantizable layers, decide about each by pattern, put Q-modules in their place, and keep the map of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lit_clipq.errors import ConfigError
from lit_clipq.nn.modules import QModule
from lit_clipq.nn.registry import LayerKind, kind_of
from lit_clipq.nn.widths import FLOAT_BITS as FLOAT_BITS


@dataclass(frozen=True)
class Layer:
    """A float layer that could be quantized."""

    name: str
    """Dotted path, the root's name first: `clip.visual.transformer.resblocks.0.mlp.c_fc`."""
    tower: str
    """`vision` or `text` inside `clip`, else the name of the root."""
    kind: LayerKind
    module: nn.Module


@dataclass(frozen=True)
class MapEntry:
    """What happened to one layer."""

    name: str
    tower: str
    kind: str
    weight_bits: int | None
    """Width of the weight codes; 32 is float, `None` a layer without weight."""
    activation_bits: int
    """Width of the operands' codes; 32 is float."""
    macs: float = 0.0
    """Multiply-accumulates per calibration sample; 0 until profiled."""
    reason: str = ""
    """Why the layer stayed float; empty where it was quantized."""
    float_share: float = 0.0
    """Of a quantized layer: share of its multiply-accumulates, 0 to 1, that stay float (outlier channels)."""

    @property
    def quantized(self) -> bool:
        """Whether at least one operand of the product is quantized."""
        return not self.reason


@dataclass(frozen=True)
class QuantizationMap:
    """Every matrix product of the network and what became of it."""

    entries: tuple[MapEntry, ...] = ()

    @property
    def quantized(self) -> tuple[MapEntry, ...]:
        """Entries with at least one quantized operand."""
        return tuple(entry for entry in self.entries if entry.quantized)

    @property
    def float_share(self) -> float:
        """Share of the multiply-accumulates, 0 to 1, whose operands all stayed float."""
        total = sum(entry.macs for entry in self.entries)
        left = sum(entry.macs * (entry.float_share if entry.quantized else 1) for entry in self.entries)
        return left / total if total else 1.0

    def with_macs(self, macs: Mapping[str, float]) -> "QuantizationMap":
        """Return the map with multiply-accumulates filled in by layer name; names it lacks are added as float."""
        known = {entry.name for entry in self.entries}
        rows = [replace(entry, macs=macs.get(entry.name, 0.0)) for entry in self.entries]
        rows += [
            MapEntry(name, "other", "operator", None, FLOAT_BITS, value, "computed outside of any quantizable layer")
            for name, value in macs.items()
            if name not in known
        ]
        return QuantizationMap(tuple(rows))

    def left_float(self, reasons: Mapping[str, str]) -> "QuantizationMap":
        """Return the map with layers left float, by name and reason."""
        return QuantizationMap(
            tuple(
                replace(
                    entry,
                    weight_bits=None if entry.weight_bits is None else FLOAT_BITS,
                    activation_bits=FLOAT_BITS,
                    reason=reasons[entry.name],
                )
                if entry.name in reasons
                else entry
                for entry in self.entries
            )
        )

    def to_json(self) -> list[dict[str, Any]]:
        """Return the entries as plain dictionaries."""
        return [asdict(entry) for entry in self.entries]


def find_layers(roots: Mapping[str, nn.Module]) -> list[Layer]:
    """List the quantizable layers below each named root, in module order.

    Layers that a fused attention only reads the weights of are left out: a Q-module there would never be called.
    """
    found = []
    for root, module in roots.items():
        fused = tuple(f"{name}." for name, child in module.named_modules() if isinstance(child, nn.MultiheadAttention))
        for name, child in module.named_modules():
            kind = kind_of(child)
            if name and kind is not None and not name.startswith(fused):
                found.append(Layer(f"{root}.{name}", _tower(root, name), kind, child))
    return found


def towers(roots: Iterable[str]) -> set[str]:
    """Name the towers of named roots."""
    return {tower for root in roots for tower in (("vision", "text") if root == "clip" else (root,))}


def _tower(root: str, name: str) -> str:
    if root != "clip":
        return root
    return "vision" if name.startswith("visual.") else "text"


def select(layers: Sequence[Layer], include: Iterable[str], exclude: Iterable[str]) -> dict[str, str]:
    """Return {name: reason} of the layers that shell patterns take out: not included, or excluded.

    Raises:
        ConfigError: For a pattern that matches no layer.
    """
    reasons: dict[str, str] = {}
    include, exclude = tuple(include), tuple(exclude)
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            check_pattern(option, pattern, layers)
    for layer in layers:
        if include and not any(fnmatchcase(layer.name, pattern) for pattern in include):
            reasons[layer.name] = "not in quantize.include"
        matched = next((pattern for pattern in exclude if fnmatchcase(layer.name, pattern)), None)
        if matched is not None:
            reasons[layer.name] = f"excluded by {matched!r}"
    return reasons


def check_pattern(option: str, pattern: str, layers: Sequence[Layer]) -> None:
    """Refuse a pattern that matches no layer.

    Args:
        option: Which option it was given in.
        pattern: The shell pattern.
        layers: What there is.

    Raises:
        ConfigError: Names the pattern and some layers.
    """
    if not any(fnmatchcase(layer.name, pattern) for layer in layers):
        examples = ", ".join(layer.name for layer in layers[:: max(1, len(layers) // 3)][:3])
        raise ConfigError(
            f"quantize.{option} pattern {pattern!r} matches none of the {len(layers)} layers; "
            f"patterns are shell-like and see whole names such as {examples}"
        )


def swap(
    roots: Mapping[str, nn.Module], layers: Iterable[Layer], build: Callable[[Layer], QModule]
) -> dict[str, QModule]:
    """Put `build(layer)` in the place of each layer; returns the Q-modules by name.

    A layer that sits in several places is replaced in all of them by one Q-module.
    """
    layers = list(layers)
    swapped = {layer.name: build(layer) for layer in layers}
    _replace(roots, {layer.module: swapped[layer.name] for layer in layers})
    return swapped


def unswap(roots: Mapping[str, nn.Module], layers: Iterable[Layer], swapped: Mapping[str, QModule]) -> None:
    """Undo `swap`: put the float layers back."""
    _replace(roots, {swapped[layer.name]: layer.module for layer in layers if layer.name in swapped})


def _replace(roots: Mapping[str, nn.Module], new: Mapping[nn.Module, nn.Module]) -> None:
    for root in roots.values():
        for parent in list(root.modules()):
            for key, child in parent._modules.items():
                if child is not None and child in new:
                    parent._modules[key] = new[child]
