"""Results to make reports of: plain JSON as `lightning validate`, `sweep` and `analyze` write it."""

import json
from pathlib import Path
from typing import Any

METRICS = {"recall@1_i2t": 0.698, "recall@5_i2t": 0.914, "recall@1_t2i": 0.4176}


def run(method: str | None = "ptq4clip", bits: int = 4, loss: float = 0.05, **changes: Any) -> dict[str, Any]:
    quantized = {name: value - loss for name, value in METRICS.items()} if method else METRICS
    towers = {f"{t}_{o}": bits for t in ("vision", "text", "other") for o in ("weight", "activation")}
    layers = ["clip.visual.blocks.0.fc", "clip.visual.blocks.1.fc", "clip.blocks.0.fc"]
    return {
        "task": "Retrieval",
        "model": "mini-vit",
        "pretrained": "mini",
        "recipe": method,
        "bits": towers if method else None,
        "metrics": {
            "float": METRICS,
            "quantized": quantized,
            "difference": {n: {"value": -loss, "low": -loss - 0.02, "high": -loss + 0.02} for n in METRICS}
            if method
            else {},
        },
        "samples": {"images": 500, "captions": 2500, "skipped": 0},
        "size_bytes": {"float": 7_130_000, "quantized": 7_130_000 * bits // 32 if method else 7_130_000},
        "calibration_seconds": 1.5,
        "calibration_samples": 32 if method else 0,
        "float_macs_share": 0.0 if method else 1.0,
        "quantize": {},
        "layers": {name: {"sqnr_db": 20.0 + i} for i, name in enumerate(layers)} if method else {},
        "stages": {},
        "map": [],
        "versions": {"torch": "2.14.1"},
        "seed": 0,
        "command": f"lightning validate --quantize.bits {bits}",
        **changes,
    }


def line(
    method: str | None, vision: int, text: int, seed: int = 0, value: float = 0.6, **changes: Any
) -> dict[str, Any]:
    widths = {f"{t}_{o}": b for t, b in (("vision", vision), ("text", text)) for o in ("weight", "activation")}
    metrics = {"recall@1_i2t": value}
    difference = {"value": value - 0.7, "low": value - 0.72, "high": value - 0.68}
    return {
        "format": 1,
        "id": f"{method}-{vision}-{text}-{seed}",
        "kind": "point" if method else "float",
        "identity": {"code": "a", "model": "b", "data": "c", "settings": "d"},
        "task": "Retrieval",
        "model": "mini-vit",
        "pretrained": "mini",
        "method": method,
        "widths": widths,
        "widths_in_words": f"vision W{vision}A{vision}, text W{text}A{text}",
        "seed": seed,
        "calibration_samples": 128 if method else 0,
        "quantize": {},
        "metrics": metrics,
        "differences": {"recall@1_i2t": difference} if method else {},
        "scores": {},
        "samples": {"images": 500},
        "float_bytes": 7_130_000,
        "quantized_bytes": 100_000 * (vision + text),
        "float_macs_share": 0.0,
        "sqnr_db": {},
        "versions": {"torch": "2.14.1"},
        "command": "lightning sweep --config configs/sweeps/mini.yaml",
        "error": None,
        **changes,
    }


def write_run(folder: Path, name: str = "results.json", **changes: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run(**changes)))
    return path


def write_lines(folder: Path, lines: list[dict[str, Any]], name: str = "results.jsonl", end: str = "") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(one) + "\n" for one in lines) + end)
    return path


def grid(widths: tuple[int, ...] = (32, 8, 4), seeds: int = 3) -> list[dict[str, Any]]:
    """A sweep whose accuracies tell where they come from: 0.vtS for vision v, text t and seed S."""
    lines = [line(None, 32, 32, value=0.7)]
    for v in widths:
        for t in widths:
            if v != 32 or t != 32:
                lines += [line("ptq4clip", v, t, seed, 0.01 * v + 0.001 * t + 0.0001 * seed) for seed in range(seeds)]
    return lines
