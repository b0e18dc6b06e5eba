"""Exports against float32, both in ONNX Runtime: `python -m benchmarks.integer --model ViT-B-32-quickgelu`.

Weights are random and grids come from the ranges of a scene: time depends on neither. Twin grids are put in place of
the uniform ones by hand for the same reason. All variants of a row are run in turn, one call each, so that other work
on the machine meets all alike; the ratio is that of medians. The flags of the CPU decide: without VNNI the gain halves.
Prints a Markdown table.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from torch import nn

from lit_clipq import load_clip, quantize
from lit_clipq.export import Samples
from lit_clipq.export import operators as _operators  # noqa: F401 - registers them
from lit_clipq.export.products import Form, form_of
from lit_clipq.export.towers import towers_of
from lit_clipq.export.trace import Tracer
from lit_clipq.models import LoadedCLIP, fold_batchnorm, make_explicit
from lit_clipq.nn.modules import QModule
from lit_clipq.nn.quantizer import TwinGeluQuantizer, TwinSoftmaxQuantizer
from lit_clipq.recipes import make_recipe
from lit_clipq.recipes.widths import BitWidths
from lit_clipq.runtime.session import cpu_flags, open_session

DENOMINATOR = "float32"
WIDTHS: dict[str, dict[str, int]] = {"W8A8": {}, "W7A8": {"weight_bits": 7}, "W4A8": {"weight_bits": 4}}


def forms_of(model: nn.Module) -> dict[str, Form]:
    """Return the forms of the quantized layers by name; none for a float network."""
    return {f"clip.{name}": form_of(layer) for name, layer in model.named_modules() if isinstance(layer, QModule)}


def write(loaded: LoadedCLIP, folder: Path, label: str) -> dict[str, Path]:
    """Write both towers as they are now; returns their files."""
    files = {}
    for name, tower in towers_of(loaded).items():
        tracer = Tracer(forms_of(loaded.model))
        inputs, outputs = tracer.run(tower, tower.example(), tower.port, tower.free, tower.output)
        files[name] = folder / f"{label}-{name}.onnx"
        onnx.save(tracer.graph.model(inputs, outputs), str(files[name]))
    return files


def put_twin_grids(model: nn.Module) -> None:
    """Replace the grids behind softmax and activation functions by twin ones."""
    for name, layer in model.named_modules():
        grid: Any = None
        if isinstance(layer, QModule) and name.endswith(".av"):
            grid = TwinSoftmaxQuantizer(8)
            grid.split = torch.tensor(0.1)
            layer.input_quantizers["a"] = grid
        elif isinstance(layer, QModule) and name.endswith((".c_proj", ".fc2")):
            grid = TwinGeluQuantizer(8, -0.17)
            grid.positive_step = cast(Any, layer.input_quantizers["input"]).scale
            layer.input_quantizers["input"] = grid


def build(model: str, folder: Path) -> tuple[dict[str, dict[str, Path]], LoadedCLIP]:
    """Write every variant of a model; returns files by variant and tower, and the float network."""
    files: dict[str, dict[str, Path]] = {}
    for label, widths in WIDTHS.items():
        if (folder / f"{label}-text.onnx").is_file():  # written last
            kept = (label, "W8A8 twin") if label == "W8A8" else (label,)
            files |= {name: {tower: folder / f"{name}-{tower}.onnx" for tower in ("image", "text")} for name in kept}
            continue
        loaded = load_clip(model)
        samples = Samples.make(loaded.preprocessing)
        recipe = make_recipe("vanilla", attention_products=True, embeddings=True, bits=BitWidths.resolve(widths, None))
        quantize(loaded.model, [(samples.images[:1], samples.tokens[:1])], recipe)
        files[label] = write(loaded, folder, label)
        if label == "W8A8":
            put_twin_grids(loaded.model)
            files["W8A8 twin"] = write(loaded, folder, "W8A8 twin")
        del loaded
        gc.collect()
    loaded = load_clip(model)
    fold_batchnorm(loaded.model)
    make_explicit(loaded.model)
    files[DENOMINATOR] = write(loaded, folder, "float")
    return files, loaded


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Run all calls in turn; returns the median seconds of each."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def calls_of(files: Mapping[str, Mapping[str, Path]], loaded: LoadedCLIP, tower: str, batch: int, threads: int) -> Any:
    """Return what a row times, by name."""
    module = towers_of(loaded)[tower]
    if tower == "image":
        x = torch.randn(batch, *module.example().shape[1:])
    else:  # the longest texts: the end token comes last
        x = torch.randint(1, 400, (batch, loaded.preprocessing.context_length))
        x[:, -1] = loaded.preprocessing.tokenizer(["a"]).max()
    array = np.ascontiguousarray(x.numpy())

    def session(file: Path, *, exact: bool = True) -> Callable[[], Any]:
        opened = open_session(file, threads=threads, exact=exact)
        return lambda: opened.run(None, {module.port: array})

    def eager() -> Any:
        with torch.inference_mode():
            return module(x)

    return {"eager torch": eager, **{label: session(of[tower]) for label, of in files.items()}}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32-quickgelu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, default=None, help="Where files stay, for another run; by default they vanish."
    )
    chosen = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        files, loaded = build(chosen.model, folder)
        labels = ["eager torch", *(label for label in files if label != DENOMINATOR)]
        print(f"{chosen.model}, {date.today()}, {chosen.threads} threads, CPU flags: {' '.join(cpu_flags())}")
        print(f"\n| | {DENOMINATOR} (ms) | " + " | ".join(f"{label} (x)" for label in labels) + " |")
        print("|---|" + "---|" * (len(labels) + 1))
        for tower in ("image", "text"):
            for batch in chosen.batches:
                found = interleaved(calls_of(files, loaded, tower, batch, chosen.threads), chosen.rounds)
                base = found[DENOMINATOR]
                cells = [f"{base / found[label]:.2f}" for label in labels]
                print(f"| {tower}, batch {batch} | {1000 * base:.1f} | " + " | ".join(cells) + " |", flush=True)
        sizes = {label: sum(file.stat().st_size for file in of.values()) for label, of in files.items()}
        cells = ["" if label == "eager torch" else f"{sizes[label] / sizes[DENOMINATOR]:.1%}" for label in labels]
        print(f"| files (MB) | {sizes[DENOMINATOR] / 1e6:.1f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
