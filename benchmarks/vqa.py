"""Training of a VQA head on cached features: `python -m benchmarks.vqa`.

ViT-B-32 and MCAN-small, random weights, 3,129 answers, pictures of COCO's size. It prints

- milliseconds of a training step: the head alone (features in memory), with cached features, with CLIP in every step,
- questions a second of `fit` on one process and on two, one thread each, the same batch over all of them,
- peak memory of a training on a small and on a large cache.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from benchmarks.timing import medians
from datamodules import VQAv2
from datamodules.vqa_files import Question
from lit_clipq.features import CacheOptions, FeatureBatch, FeatureKey, FeatureStore
from lit_clipq.tasks import VQA
from lit_clipq.tasks.vqa import answer_loss

ANSWERS = 3129
TOKENS, WIDTH = 49, 768  # of ViT-B-32
LIMITS = {"cached against head": 1.05, "without cache": 2.0, "two processes": 1.6, "memory": 1.05}


def write_data(root: Path, pictures: int) -> None:
    """Write noise pictures of 640 x 480 and two questions about each, in the layout of VQA v2."""
    random = np.random.default_rng(0)
    for split, count in (("train", pictures), ("val", 2)):
        (root / f"{split}2014").mkdir(parents=True)
        rows: dict[str, list[dict[str, Any]]] = {"questions": [], "annotations": []}
        for i in range(count):
            image_id = i + (1 if split == "train" else 10**6)
            small = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8))
            small.resize((640, 480)).save(root / f"{split}2014" / f"COCO_{split}2014_{image_id:012}.jpg")
            for k, text in enumerate((f"What is the man number {i} holding in his hand?", "Is this a cat?")):
                key = {"image_id": image_id, "question_id": 10 * image_id + k}
                rows["questions"].append({**key, "question": text})
                answers = [
                    {"answer": f"word {n % 3}", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)
                ]
                kinds = {"answer_type": "other", "question_type": "what", "multiple_choice_answer": "word 1"}
                rows["annotations"].append({**key, **kinds, "answers": answers})
        for name, kind in (("OpenEnded_mscoco", "questions"), ("mscoco", "annotations")):
            (root / f"v2_{name}_{split}2014_{kind}.json").write_text(json.dumps({kind: rows[kind]}))


def vocabulary(path: Path) -> str:
    """Write a vocabulary of the size of VQA v2's."""
    words = [f"word {n}" for n in range(ANSWERS)]
    path.write_text(json.dumps({"format": 1, "questions": 0, "words": words, "counts": [1] * ANSWERS}))
    return str(path)


def make(folder: Path, batch: int, cached: bool = True) -> tuple[VQA, VQAv2]:
    """Return task and data of a training."""
    seed_everything(0, verbose=False)
    cache = CacheOptions(str(folder / "cache")) if cached else None
    data = VQAv2(
        str(folder / "data"), vocabulary=vocabulary(folder / "words.json"), batch_size=16, train_batch_size=batch
    )
    return VQA("ViT-B-32", cache=cache), data


def fit(task: VQA, data: VQAv2, folder: Path, *callbacks: Callback, **options: Any) -> None:
    """Train for some steps and write nothing."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=list(callbacks),
        **quiet,
        **options,
    ).fit(task, datamodule=data)


def compare_steps(folder: Path, batch: int, runs: int) -> None:
    """Time a step of the head alone, with cached features, and with CLIP in every step, in turn."""
    task, data = make(folder, batch)
    fit(task, data, folder, max_steps=1)
    # of different pictures, as nearly every batch of VQA v2's 82,783 pictures is
    questions = [data.train_questions[2 * i + i % 2] for i in range(batch)]
    collate = data._collate("train")
    data.use_collators({})
    collate_pictures = data._collate("train")
    held = collate(questions)
    optimizer: Any = task.configure_optimizers()["optimizer"]  # type: ignore[index]

    def step(batch: Any) -> None:
        optimizer.zero_grad()
        answer_loss(task(batch), batch["targets"]).backward()
        optimizer.step()

    calls = [lambda: step(held), lambda: step(collate(questions)), lambda: step(collate_pictures(questions))]
    alone, cached, direct = medians(calls, runs, warmup=1, inference=False)
    (reading,) = medians([lambda: collate(questions)], 10)
    print(f"a step of {batch} questions, ViT-B-32 and MCAN-small, {torch.get_num_threads()} thread(s)")
    print(f"  head alone {alone:.0f} ms, cached {cached:.0f} ms, CLIP in every step {direct:.0f} ms")
    verdict("cached against head", cached / alone, f"of which reading and joining features {reading:.1f} ms")
    verdict("without cache", direct / cached, "", at_least=True)


class Speed(Callback):
    """Questions a second after the first steps."""

    def __init__(self, skip: int) -> None:
        self.skip = skip
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def seconds(self) -> float:
        """Median of a step."""
        steps = np.diff(self.times[self.skip :])
        return float(np.median(steps))


def measure_fit(folder: Path, batch: int, devices: int) -> None:
    """Train on some processes with one thread each and print the seconds of a step as JSON."""
    torch.set_num_threads(1)
    task, data = make(folder, batch)
    speed = Speed(skip=2)
    fit(task, data, folder, speed, devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=9)
    if task.global_rank == 0:
        print(json.dumps({"seconds": speed.seconds()}), flush=True)


def measure_memory(folder: Path, pictures: int, steps: int) -> None:
    """Read batches from a cache of some size, and print its size and the peak memory as JSON."""
    questions = [Question(i, i, f"question {i % 50}", ("yes",) * 10, "other", "what") for i in range(pictures)]
    texts = [f"question {i}" for i in range(50)]

    def store(kind: Any, count: int, length: int, width: int) -> FeatureStore:
        key = FeatureKey("random", "", "float", "", kind, "", count, "float16")
        filled = FeatureStore(folder / f"{kind}-{pictures}", key, [length] * count, width)

        def produce(items: Sequence[int]) -> Iterator[Tensor]:
            for item in items:
                yield torch.randn(length, width, generator=torch.Generator().manual_seed(item))

        filled.fill(produce)
        return filled

    images, words = store("images", pictures, TOKENS, WIDTH), store("texts", 50, 10, 512)
    rows = {text: row for row, text in enumerate(texts)}
    collate = FeatureBatch(images, {i: i for i in range(pictures)}, words, rows, lambda a: torch.zeros(len(a), ANSWERS))
    order = torch.randperm(pictures, generator=torch.Generator().manual_seed(0)).tolist()
    total = 0.0
    for start in range(0, 64 * steps, 64):
        chosen = [questions[order[i % pictures]] for i in range(start, start + 64)]
        total += collate(chosen)["image"].float().sum().item()
    size = sum(path.stat().st_size for path in (folder / f"images-{pictures}").iterdir())
    status = Path("/proc/self/status").read_text()  # ru_maxrss would be that of the process that started this one
    peak = 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"gb": size / 1e9, "peak": peak / 1e9}), flush=True)


def verdict(name: str, ratio: float, note: str, at_least: bool = False) -> None:
    """Print a ratio beside its limit."""
    limit = LIMITS[name]
    kept = ratio >= limit if at_least else ratio <= limit
    sign = ">=" if at_least else "<="
    print(
        f"  {name}: {ratio:.2f}x (limit {sign} {limit:g}: {'kept' if kept else 'MISSED'}) {note}".rstrip(), flush=True
    )


def run(part: str, folder: Path, *options: str) -> dict[str, float]:
    """Run a part in a process of its own and return what it printed last."""
    command = [sys.executable, "-m", "benchmarks.vqa", "--measure", part, "--folder", str(folder), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 our own arguments
    result: dict[str, float] = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line[:1] == "{"))
    return result


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="questions in a step")
    parser.add_argument("--runs", type=int, default=5, help="steps of each kind")
    parser.add_argument("--pictures", type=int, nargs=2, default=(1_000, 8_000), help="pictures in the two caches")
    parser.add_argument("--parts", nargs="+", default=["steps", "processes", "memory"])
    parser.add_argument("--measure", choices=("fit", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--value", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure == "fit":
        measure_fit(options.folder, options.batch, options.value)
        return
    if options.measure == "memory":
        measure_memory(options.folder, options.value, steps=40)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data", pictures=2 * options.batch)
        if {"steps", "processes"} & set(options.parts):
            compare_steps(folder, options.batch, options.runs)
        if "processes" in options.parts:
            batch = ("--batch", str(options.batch))
            one, two = (min(run("fit", folder, *batch, "--value", str(n))["seconds"] for _ in range(2)) for n in (1, 2))
            print(f"fit: {options.batch / one:.2f} questions/s on one process, {options.batch / two:.2f} on two")
            verdict("two processes", one / two, "one thread each", at_least=True)
        if "memory" in options.parts:
            small, large = (run("memory", folder, "--value", str(count)) for count in options.pictures)
            print(f"peak memory: {small['peak']:.3f} GB with {small['gb']:.2f} GB of cache, ", end="")
            print(f"{large['peak']:.3f} GB with {large['gb']:.2f} GB")
            verdict("memory", large["peak"] / small["peak"], f"for {large['gb'] / small['gb']:.1f}x the cache")


if __name__ == "__main__":
    main()
