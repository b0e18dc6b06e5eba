"""Which compositions of stages lose least: `python -m benchmarks.methods`.

Runs `lightning validate` for every composition below, model, width and calibration seed, as `benchmarks.quality` does
(runs that are there already are not repeated), and prints for each width a Markdown table of differences to float in
points, mean and spread over seeds.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality import METRICS, PHOTO, Run, cell, fill, result

Composition = tuple[list[Any], dict[str, Any]]
"""Stages, and options of the recipe or of the callback."""

TWIN = {"grids": {"softmax": "twin", "gelu": "twin"}}
BEST = {"grids": {"softmax": "best", "gelu": "best"}}
L2 = {"search": {"distance": "l2"}}
ZERO_POINTS = {"search": {"grid": {"zero_points": True}}}
HEADS = {"rotate": {"residual": False}}
BASE = ["equalize", TWIN, "search"]
COLUMNS = {"erq": {"rounding": "columns"}}
MIXED = {"allocate": {"budget": "bops", "widths": [3, 4, 6, 8]}}
MIXED_SIZE = {"allocate": {"budget": "size"}}
TOKENS = {"grids": {"softmax": "twin", "gelu": "twin", "inputs": "per_token"}}
TOKENS_BEST = {"grids": {"softmax": "best", "gelu": "best", "inputs": "per_token"}}
GROUPS = {"grids": {"softmax": "twin", "gelu": "twin", "group_size": 64}}
GROUPS_BEST = {"grids": {"softmax": "best", "gelu": "best", "group_size": 64}}

COMPOSITIONS: dict[str, Composition] = {
    "ptq4clip": (BASE, {}),
    "l2": (["equalize", TWIN, L2], {}),
    "zero points": (["equalize", TWIN, ZERO_POINTS], {}),
    "four draws": (BASE, {"draws": 4}),
    "behind layers": (BASE, {"propagate": "layer"}),
    "behind blocks": (BASE, {"propagate": "block"}),
    "480 samples": (BASE, {"calibration_samples": 480}),
    "adalog": (["equalize", BEST, "search"], {}),
    "smooth": (["smooth", TWIN, "search"], {}),
    "repq": (["repq", TWIN, "search"], {}),
    "rotate": (["rotate", TWIN, "search"], {}),
    "rotate heads": ([HEADS, "equalize", TWIN, "search"], {}),
    "registers": (["registers", "equalize", TWIN, "search"], {}),
    "groups of 64": (["equalize", GROUPS, "search"], {}),
    "per token": (["equalize", TOKENS, "search"], {}),
    "gptq": ([*BASE, "gptq"], {}),
    "gptaq": ([*BASE, "gptaq"], {}),
    "erq": ([*BASE, "erq"], {}),
    "affine": ([*BASE, "affine"], {}),
    "bias_correction": ([*BASE, "bias_correction"], {}),
    "qwt": ([*BASE, "qwt"], {}),
    "gptq, affine": ([*BASE, "gptq", "affine"], {}),
    "gptq behind layers": ([*BASE, "gptq"], {"propagate": "layer"}),
    "gptaq behind layers": ([*BASE, "gptaq"], {"propagate": "layer"}),
    "gptq behind blocks": ([*BASE, "gptq"], {"propagate": "block"}),
    "gptq, bias behind layers": ([*BASE, "gptq", "bias_correction"], {"propagate": "layer"}),
    "gptq, 480": ([*BASE, "gptq"], {"calibration_samples": 480}),
    "smooth, gptq": (["smooth", TWIN, "search", "gptq"], {}),
    "rotate, gptq": (["rotate", TWIN, "search", "gptq"], {}),
    "adalog, gptq": (["equalize", BEST, "search", "gptq"], {}),
    "smooth, adalog, gptq": (["smooth", BEST, "search", "gptq"], {}),
    "smooth, adalog, gptq behind layers": (["smooth", BEST, "search", "gptq"], {"propagate": "layer"}),
    "rotate, adalog, gptq behind layers": (["rotate", BEST, "search", "gptq"], {"propagate": "layer"}),
    "erq columns behind blocks": ([*BASE, COLUMNS], {"propagate": "block"}),
    "erq columns, affine behind blocks": ([*BASE, COLUMNS, "affine"], {"propagate": "block"}),
    "smooth, adalog, erq columns behind blocks": (["smooth", BEST, "search", COLUMNS], {"propagate": "block"}),
    "smooth, adalog, erq columns, affine behind blocks": (
        ["smooth", BEST, "search", COLUMNS, "affine"],
        {"propagate": "block"},
    ),
    "per token, gptq": (["equalize", TOKENS, "search", "gptq"], {}),
    "smooth, per token, adalog, gptq behind layers": (
        ["smooth", TOKENS_BEST, "search", "gptq"],
        {"propagate": "layer"},
    ),
    "smooth, per token, adalog, erq columns behind blocks": (
        ["smooth", TOKENS_BEST, "search", COLUMNS],
        {"propagate": "block"},
    ),
    "smooth, groups, gptq": (["smooth", GROUPS, "search", "gptq"], {}),
    "smooth, groups, adalog, erq columns behind blocks": (
        ["smooth", GROUPS_BEST, "search", COLUMNS],
        {"propagate": "block"},
    ),
    "mixed bops": ([*BASE, MIXED], {}),
    "smooth, adalog, mixed bops, gptq": (["smooth", BEST, "search", MIXED, "gptq"], {}),
    "smooth, adalog, gptq, mixed bops": (["smooth", BEST, "search", "gptq", MIXED], {}),
    "smooth, gptq, mixed size": (["smooth", TWIN, "search", "gptq", MIXED_SIZE], {}),
}


def flags(composition: Composition) -> tuple[str, ...]:
    """Return the composition as options of the command line."""
    stages, options = composition
    given = dict(options)
    samples = given.pop("calibration_samples", None)
    flags = [f"--quantize.stages={json.dumps(stages)}"]
    flags += [f"--quantize.options.{name}={value}" for name, value in given.items()]
    return (*flags, *([] if samples is None else [f"--quantize.calibration_samples={samples}"]))


def main(args: Sequence[str] | None = None) -> None:
    """Parse the command line, run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["mini-vit", "mini-resnet"])
    parser.add_argument("--compositions", nargs="+", default=list(COMPOSITIONS), choices=list(COMPOSITIONS))
    parser.add_argument("--widths", nargs="+", default=["w4a4"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--preset", default="full")
    parser.add_argument("--photo", type=Path, help="folder of the model trained on photographs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    o = parser.parse_args(args)
    columns = [(model, "retrieval") for model in o.models] + ([(PHOTO, "classification")] if o.photo else [])

    def runs(name: str, width: str, model: str, task: str) -> list[Run]:
        extra, label = flags(COMPOSITIONS[name]), "_" + name.replace(" ", "_").replace(",", "")
        return [Run(model, task, "ptq4clip", width, seed, o.preset, extra, label, o.photo) for seed in range(o.seeds)]

    cells = list(itertools.product(o.compositions, o.widths, columns))
    fill([run for name, width, (model, task) in cells for run in runs(name, width, model, task)], o.out, o.jobs)
    metrics = [(model, task, metric) for model, task in columns for metric in METRICS[task]]
    for width in o.widths:
        print(f"\n**{width.upper()}** ({o.seeds} seeds; difference to float in points)\n")
        print("| stages | " + " | ".join(f"{model} {metric}" for model, _, metric in metrics) + " |")
        print("|---|" + "---|" * len(metrics))
        for name in o.compositions:
            row = []
            for model, task, metric in metrics:
                done = [r for r in runs(name, width, model, task) if o.jobs < 2 or r.path(o.out).exists()]
                row.append(cell([result(r, o.out) for r in done], metric) if done else "failed")
            print(f"| {name} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
