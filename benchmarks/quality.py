"""What each method costs in accuracy on the mini world: `python -m benchmarks.quality`.

Runs `lightning validate` for every combination of model, task, recipe, width and calibration seed, keeps each
`results.json` in a folder (runs that are there already are not repeated), and prints a Markdown table: mean and spread
over seeds of the difference to float, in points.
"""

import argparse
import contextlib
import io
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_clipq.cli import main as lightning

METRICS = {"retrieval": ("recall@1_i2t", "recall@1_t2i"), "classification": ("top1",)}
WIDTHS = {"W8A8": (8, 8), "W6A6": (6, 6), "W4A8": (4, 8), "W4A4": (4, 4)}


def run(
    folder: Path, model: str, task: str, recipe: str, width: str, seed: int, preset: str, extra: Sequence[str]
) -> dict[str, Any]:
    """Run one combination, or read what an earlier run of it left."""
    path = folder / f"{model}_{task}_{preset}_{recipe}_{width}_{seed}{''.join(extra).replace('/', '_')}.json"
    if not path.exists():
        weight, activation = WIDTHS[width]
        options = ["--model.name", model, "--data.preset", preset, "--quantize.recipe", recipe]
        options += ["--quantize.weight_bits", str(weight), "--quantize.activation_bits", str(activation)]
        options += ["--quantize.seed", str(seed), "--results", str(path), "--trainer.enable_progress_bar", "false"]
        if recipe == "vanilla":
            options += ["--quantize.attention_products", "true"]
        with contextlib.redirect_stdout(io.StringIO()):
            code = lightning(["validate", "--config", f"mini/{task}", *options, *extra])
        if code:
            raise SystemExit(code)
    return json.loads(path.read_text(encoding="utf-8"))


def cell(results: Sequence[dict[str, Any]], metric: str) -> str:
    """Return `mean (spread)` of the difference in points, and the widest interval where there is one seed only."""
    points = [100 * r["metrics"]["difference"][metric]["value"] for r in results]
    if len(points) > 1:
        return f"{statistics.mean(points):+.2f} ({max(points) - min(points):.2f})"
    interval = results[0]["metrics"]["difference"][metric]
    return f"{points[0]:+.2f} [{100 * interval['low']:+.2f}, {100 * interval['high']:+.2f}]"


def main(args: Sequence[str] | None = None) -> None:
    """Parse the command line, run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mini-vit", "mini-resnet", "mini-vit-outlier"])
    parser.add_argument("--tasks", nargs="+", default=list(METRICS))
    parser.add_argument("--recipes", nargs="+", default=["vanilla", "base_ptq", "ptq4clip_paper", "ptq4clip"])
    parser.add_argument("--widths", nargs="+", default=list(WIDTHS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--preset", default="full")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--option", action="append", default=[], help="a further option of every run, as --name=value")
    o = parser.parse_args(args)
    for model, task in itertools.product(o.models, o.tasks):
        names = METRICS[task]
        print(f"\n**{model}, {task}** ({o.preset}, {o.seeds} seeds; difference to float in points)\n")
        print("| recipe | width | " + " | ".join(names) + " | size (MB) |\n|---|---|" + "---|" * (len(names) + 1))
        for position, (recipe, width) in enumerate(itertools.product(o.recipes, o.widths)):
            results = [run(o.out, model, task, recipe, width, s, o.preset, o.option) for s in range(o.seeds)]
            if position == 0:
                values = [f"{100 * results[0]['metrics']['float'][name]:.2f}" for name in names]
                print(f"| float | | {' | '.join(values)} | {results[0]['size_bytes']['float'] / 1e6:.2f} |")
            cells = " | ".join(cell(results, name) for name in names)
            print(f"| {recipe} | {width} | {cells} | {results[0]['size_bytes']['quantized'] / 1e6:.2f} |", flush=True)


if __name__ == "__main__":
    main()
