"""Float against quantized: the record of one run, as JSON and as a table."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lit_clipq.analysis.counts import describe_counts
from lit_clipq.nn.swap import QuantizationMap
from lit_clipq.paths import write_whole


@dataclass(frozen=True)
class Interval:
    """A difference quantized - float with its bootstrap confidence bounds, as fractions."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class IntegerResult:
    """An evaluation by the export of the quantized network."""

    backend: str
    """What computed it."""
    metrics: dict[str, float]
    """As fractions."""
    bytes: int
    """Size of the towers' files."""
    parity: dict[str, dict[str, Any]]
    """By tower: how far it is from the fake-quantized network."""
    kernels: dict[str, dict[str, int]]
    """By tower: how often each kernel multiplies a layer."""


@dataclass(frozen=True)
class Comparison:
    """One evaluation of one model, float and quantized. Metrics are fractions."""

    task: str
    model: str
    pretrained: str | None
    recipe: str | None
    bits: dict[str, int] | None
    float_metrics: dict[str, float]
    quantized_metrics: dict[str, float]
    differences: dict[str, Interval]
    samples: dict[str, int]
    float_bytes: int
    quantized_bytes: int
    calibration_seconds: float
    calibration_samples: int
    map: QuantizationMap
    versions: dict[str, str]
    seed: int
    widths: str = ""
    """The widths in words."""
    quantize_options: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    """Per layer: objective before and after the search, SQNR in dB, clipped share, seconds."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each stage of the recipe says of itself."""
    integer: IntegerResult | None = None
    """The same evaluation with integer products, where it was asked for."""
    observed: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What callbacks saw, by their section: `cosine`, `mistakes`."""
    command: str = ""
    """Command line of the run."""

    @property
    def float_macs_share(self) -> float:
        """Share of multiply-accumulates that stayed float; 1 where nothing was quantized."""
        return self.map.float_share

    def to_json(self) -> dict[str, Any]:
        """Return the content of `results.json`."""
        integer = {} if self.integer is None else {"integer": asdict(self.integer)}
        return {
            **integer,
            "task": self.task,
            "model": self.model,
            "pretrained": self.pretrained,
            "recipe": self.recipe,
            "bits": self.bits,
            "metrics": {
                "float": self.float_metrics,
                "quantized": self.quantized_metrics,
                "difference": {name: vars(interval) for name, interval in self.differences.items()},
            },
            "samples": self.samples,
            "size_bytes": {"float": self.float_bytes, "quantized": self.quantized_bytes},
            "calibration_seconds": self.calibration_seconds,
            "calibration_samples": self.calibration_samples,
            "float_macs_share": self.float_macs_share,
            "quantize": self.quantize_options,
            "layers": self.layers,
            "stages": self.stages,
            "map": self.map.to_json(),
            "versions": self.versions,
            "seed": self.seed,
            "command": self.command,
            **self.observed,
        }


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that `path` holds either its old content or all of the new one.

    Raises:
        OSError: If the folder cannot be made or written.
    """
    write_whole(path, json.dumps(content, indent=2) + "\n")


def comparison_table(result: Comparison) -> RenderableType:
    """Render float | quantized | difference of every metric in percent, then size, time and coverage."""
    method = _method(result)
    caption = f"N: {describe_counts(result.samples)}"
    table = Table(title=f"{result.task} · {result.model} · {method}", title_justify="left", caption=caption)
    table.caption_justify = "left"
    integer = result.integer
    for name in ("", "float", "quantized", *(["integer"] if integer else []), "difference"):
        table.add_column(name, justify="right" if name else "left")
    for name, value in result.float_metrics.items():
        cells = [value, result.quantized_metrics[name], *([integer.metrics[name]] if integer else [])]
        table.add_row(f"{name} (%)", *(f"{100 * cell:.2f}" for cell in cells), _difference(result, name))
    table.add_section()
    nothing = [""] if integer else []
    files = [f"{integer.bytes / 1e6:.2f}"] if integer else []
    float_mb, quantized_mb = result.float_bytes / 1e6, result.quantized_bytes / 1e6
    ratio = f"{result.float_bytes / result.quantized_bytes:.2f}x smaller" if quantized_mb else ""
    table.add_row("model size (MB)", f"{float_mb:.2f}", f"{quantized_mb:.2f}", *files, ratio)
    seconds, samples = f"{result.calibration_seconds:.1f}", f"{result.calibration_samples} samples"
    table.add_row("calibration (s)", "", seconds, *nothing, samples)
    table.add_row("float multiply-accumulates (%)", "100.00", f"{100 * result.float_macs_share:.2f}", *nothing, "")
    note = "difference: quantized - float in points, with a 95 % interval from a paired bootstrap over pictures"
    lines: list[RenderableType] = [table, Text(note, style="dim")]
    if integer:
        lines.append(Text(f"integer: {integer.backend}, {_parity(integer)}", style="dim"))
    if result.layers:
        lines.append(Text(f"lowest signal-to-noise ratio: {_worst(result.layers)}", style="dim"))
    return Group(*lines)


def _parity(integer: IntegerResult) -> str:
    told = [f"{tower} {parity['integer_db']:.1f} dB" for tower, parity in integer.parity.items()]
    return f"SQNR to the quantized embeddings {', '.join(told)}"


def _worst(layers: dict[str, dict[str, float]], count: int = 5) -> str:
    names = sorted(layers, key=lambda name: layers[name]["sqnr_db"])[:count]
    return ", ".join(f"{name} {layers[name]['sqnr_db']:.1f} dB" for name in names)


def map_table(map_: QuantizationMap) -> RenderableType:
    """Render a row per layer: widths, share of the multiply-accumulates, and why a layer stayed float."""
    total = sum(entry.macs for entry in map_.entries) or 1.0
    table = Table(title=f"{len(map_.quantized)} of {len(map_.entries)} layers quantized", title_justify="left")
    for name in ("layer", "kind", "weights", "activations", "MACs (%)", "stays float because"):
        table.add_column(name, justify="right" if name in ("weights", "activations", "MACs (%)") else "left")
    for entry in map_.entries:
        weights = "-" if entry.weight_bits is None else str(entry.weight_bits)
        share = f"{100 * entry.macs / total:.3f}"
        table.add_row(entry.name, entry.kind, weights, str(entry.activation_bits), share, entry.reason)
    return table


def _method(result: Comparison) -> str:
    return "float" if result.recipe is None else f"{result.recipe} {result.widths}"


def _difference(result: Comparison, name: str) -> str:
    interval = result.differences.get(name)
    if interval is None:
        return f"{100 * (result.quantized_metrics[name] - result.float_metrics[name]):+.2f}"
    return f"{100 * interval.value:+.2f} [{100 * interval.low:+.2f}, {100 * interval.high:+.2f}]"
