"""What each method costs in accuracy: `python -m benchmarks.quality`.

Runs `lightning validate` for every combination of model, task, method (an overlay of `configs/quantize`), width and
calibration seed, keeps each `results.json` in a folder (runs that are there already are not repeated), and prints a
Markdown table: mean and spread over seeds of the difference to float, in points. `--photo FOLDER` adds a model trained
on photographs: `photo_vit.json`, `photo_vit.safetensors`, class folders and `classes.json`.
"""

import argparse
import contextlib
import io
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from lit_clipq.cli import main as lightning

METRICS = {"retrieval": ("recall@1_i2t", "recall@1_t2i"), "classification": ("top1",)}
WIDTHS = ("w8a8", "w6a6", "w4a8", "w4a4")
MODELS = ("mini-vit", "mini-resnet", "mini-vit-outlier")
METHODS = ("vanilla", "base_ptq", "ptq4clip_paper", "ptq4clip")
PHOTO = "photo"


@dataclass(frozen=True)
class Run:
    """One `lightning validate`.

    Attributes:
        model: A model of the mini world, or `photo`.
        task: `retrieval` or `classification`.
        method: An overlay of `configs/quantize`.
        width: Likewise.
        seed: Of the calibration set.
        preset: Of the mini world's data.
        extra: Further options.
        label: What the file is called by, where `extra` is long.
        photo: The folder of the model trained on photographs.
    """

    model: str
    task: str
    method: str
    width: str
    seed: int
    preset: str = "full"
    extra: tuple[str, ...] = ()
    label: str = ""
    photo: Path | None = field(default=None)

    def path(self, folder: Path) -> Path:
        """Return where its results are kept."""
        label = self.label or "".join(self.extra).replace("/", "_")
        return folder / f"{self.model}_{self.task}_{self.preset}_{self.method}_{self.width}_{self.seed}{label}.json"

    def options(self) -> list[str]:
        """Return its command line, without the place of its results."""
        options = ["--config", f"mini/{self.task}", "--config", f"quantize/{self.method}"]
        options += ["--config", f"quantize/{self.width}", "--quantize.seed", str(self.seed)]
        options += ["--trainer.enable_progress_bar", "false"]
        if self.model == PHOTO:
            options += ["--model.name", f"{self.photo}/photo_vit.json", "--model.templates", "openai"]
            options += ["--model.pretrained", f"{self.photo}/photo_vit.safetensors"]
            options += ["--data", "datamodules.ImageFolderClassification", "--data.root", str(self.photo)]
            options += ["--data.batch_size", "250"]
        else:
            options += ["--model.name", self.model, "--data.preset", self.preset]
        return [*options, *self.extra]


def result(run: Run, folder: Path) -> dict[str, Any]:
    """Run one combination, or read what an earlier run of it left.

    Raises:
        SystemExit: If it fails.
    """
    path = run.path(folder)
    if not path.exists():
        with contextlib.redirect_stdout(io.StringIO()):
            code = lightning(["validate", *run.options(), "--results", str(path)])
        if code:
            raise SystemExit(f"{' '.join(run.options())} ended with {code}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _worker(run: Run, folder: Path) -> None:
    """Run one combination in a process of its own, on one thread."""
    torch.set_num_threads(1)
    result(run, folder)


def fill(runs: Sequence[Run], folder: Path, jobs: int) -> None:
    """Run what is not there yet, `jobs` at a time; a failed run is told, the others go on."""
    waiting = [run for run in runs if not run.path(folder).exists()]
    if jobs < 2:
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        started = {pool.submit(_worker, run, folder): run for run in waiting}
        for number, done in enumerate(as_completed(started), 1):
            if error := done.exception():
                print(f"failed: {started[done]}: {error}", flush=True)
            elif number % 20 == 0:
                print(f"{number} of {len(waiting)} runs", flush=True)


def cell(results: Sequence[dict[str, Any]], metric: str) -> str:
    """Return `mean (spread)` of the difference in points, and the interval where there is one seed only."""
    points = [100 * r["metrics"]["difference"][metric]["value"] for r in results]
    if len(points) > 1:
        return f"{statistics.mean(points):+.2f} ({max(points) - min(points):.2f})"
    interval = results[0]["metrics"]["difference"][metric]
    return f"{points[0]:+.2f} [{100 * interval['low']:+.2f}, {100 * interval['high']:+.2f}]"


def table(runs: Sequence[Run], folder: Path, jobs: int) -> Iterator[str]:
    """Yield the lines of one model's table; runs differ in method, width and seed."""
    first = runs[0]
    names = METRICS[first.task]
    yield "| method | width | " + " | ".join(names) + " | size (MB) |"
    yield "|---|---|" + "---|" * (len(names) + 1)
    for position, ((method, width, label), same) in enumerate(
        itertools.groupby(runs, key=lambda run: (run.method, run.width, run.label))
    ):
        chosen = [run for run in same if jobs < 2 or run.path(folder).exists()]
        if not chosen:
            yield f"| {label or method} | {width.upper()} |" + " failed |" * (len(names) + 1)
            continue
        results = [result(run, folder) for run in chosen]
        if position == 0:
            values = " | ".join(f"{100 * results[0]['metrics']['float'][name]:.2f}" for name in names)
            yield f"| float | | {values} | {results[0]['size_bytes']['float'] / 1e6:.2f} |"
        cells = " | ".join(cell(results, name) for name in names)
        size = results[0]["size_bytes"]["quantized"] / 1e6
        yield f"| {label or method} | {width.upper()} | {cells} | {size:.2f} |"


def main(args: Sequence[str] | None = None) -> None:
    """Parse the command line, run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", default=list(METRICS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--widths", nargs="+", default=list(WIDTHS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--preset", default="full")
    parser.add_argument("--photo", type=Path, help="folder of the model trained on photographs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--option", action="append", default=[], help="a further option of every run, as --name=value")
    o = parser.parse_args(args)
    tables = [(model, task) for model, task in itertools.product(o.models, o.tasks)]
    tables += [(PHOTO, "classification")] if o.photo else []
    every = {
        (model, task): [
            Run(model, task, method, width, seed, o.preset, tuple(o.option), photo=o.photo)
            for method, width, seed in itertools.product(o.methods, o.widths, range(o.seeds))
        ]
        for model, task in tables
    }
    fill([run for runs in every.values() for run in runs], o.out, o.jobs)
    for (model, task), runs in every.items():
        print(f"\n**{model}, {task}** ({o.seeds} seeds; difference to float in points)\n")
        for line in table(runs, o.out, o.jobs):
            print(line, flush=True)


if __name__ == "__main__":
    main()
