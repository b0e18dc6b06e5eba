"""Values of a file as what a report takes them for, or a ValueError that says what is wrong."""

import json
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

Bounds: TypeAlias = tuple[float, float, float]
"""Value, low, high."""
_MOST = 2**63
_SHOWN = 40
_CURVES = ("float", "quantized")


def parsed(text: str) -> Mapping[str, Any]:
    """Read a JSON object."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content


def number(value: Any) -> float:
    """Return a finite number."""
    try:
        found = float(value)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"expected a number, got {str(value)[:_SHOWN]}") from error
    if not math.isfinite(found):
        raise ValueError(f"expected a finite number, got {found}")
    return found


def whole(value: Any) -> int:
    """Return a whole number that a file's bytes, bits and counts can have."""
    found = int(number(value))
    if abs(found) >= _MOST:
        raise ValueError(f"expected a whole number of 64 bits, got {found:.3g}")
    return found


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return finite numbers by name."""
    return {str(name): _named(number, name, value) for name, value in values.items()}


def whole_numbers(values: Mapping[str, Any]) -> dict[str, int]:
    """Return whole numbers by name."""
    return {str(name): _named(whole, name, value) for name, value in values.items()}


def decibels(values: Mapping[str, Any]) -> dict[str, float]:
    """Return ratios by name; one without any noise or signal, infinite, cannot be drawn and is left out."""
    found = {str(name): value if value in (math.inf, -math.inf) else number(value) for name, value in values.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def bounds(values: Mapping[str, Any]) -> dict[str, Bounds]:
    """Return values with their intervals by name."""
    return {str(n): (number(v["value"]), number(v["low"]), number(v["high"])) for n, v in values.items()}


def cosines(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the densities and what moved between them, by kind of pairs."""
    found: dict[str, Any] = {}
    for kind in ("matched", "unmatched"):
        told = (values or {}).get(kind)
        if told is None:
            continue
        curves = {name: told[name] for name in _CURVES if name in told}
        kept: dict[str, Any] = {
            name: {"mean": number(curve["mean"]), "density": [number(x) for x in curve["density"]]}
            for name, curve in curves.items()
        }
        if any(not any(x > 0 for x in curve["density"]) for curve in kept.values()):
            raise ValueError(f"a density of its {kind} pairs is nowhere above 0")
        if "quantized" in kept:
            if "float" not in kept:
                raise KeyError("float")
            kept |= {name: number(told[name]) for name in ("mean_shift", "wasserstein")}
            rank = told["rank_correlation"]
            kept |= {"pairs": whole(told["pairs"]), "rank_correlation": None if rank is None else number(rank)}
        found[kind] = kept
    return found


def mistakes(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the pictures that quantization cost: text in each row, and the counts."""
    if not values:
        return {}
    rows = [{name: str(row[name]) for name in ("file", "own", "float", "quantized")} for row in values["rows"]]
    return {"rows": rows, **{name: whole(values[name]) for name in ("lost", "won", "pictures") if name in values}}


def sensitivity(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of an analysis, squared errors as numbers that are not negative."""
    found = dict(row) | {name: str(row[name]) for name in ("scope", "layer", "tower", "operand")}
    found |= {name: None if row.get(name) is None else number(row[name]) for name in ("predicted", "embedding")}
    if found["predicted"] is None:
        raise ValueError(f"it predicts nothing for {found['layer']}")
    if min(found["predicted"], found["embedding"] or 0) < 0:
        raise ValueError(f"a squared error of {found['layer']} is negative")
    return found


def _named(kind: Any, name: str, value: Any) -> Any:
    try:
        return kind(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
