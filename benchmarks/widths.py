"""Several widths from one collection against a run for each: `python -m benchmarks.widths`.

On a mini model, interleaved in one process: `quantize` once for every width, and `quantize_many` once for all of them.
The results are compared to the bit. Printed is the time of the latter over that of the former, the median of the
repeats. Two sets of widths: four that have nothing in common, and the two towers at two widths each, as a sweep over
vision and text has them, where a layer is wanted at two widths only.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Sequence

import torch
from PIL import Image

import lit_clipq
from lit_clipq.models import LoadedCLIP
from lit_clipq.recipes import BitWidths, Recipe, make_recipe

SETS: dict[str, list[dict[str, int | None]]] = {
    "W8A8 W6A6 W4A8 W4A4": [
        {"bits": 8},
        {"bits": 6},
        {"weight_bits": 4, "activation_bits": 8},
        {"bits": 4},
    ],
    "vision 8, 4 x text 8, 4": [{"vision_bits": v, "text_bits": t} for v in (8, 4) for t in (8, 4)],
}


def batches(loaded: LoadedCLIP, samples: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return random pictures with captions, 32 a batch."""
    size = loaded.preprocessing.image(Image.new("RGB", (64, 64))).shape
    images = torch.randn(samples, *size, generator=torch.Generator().manual_seed(0))
    texts = loaded.preprocessing.tokenizer(["a red circle" + " above a square" * (i % 3) for i in range(samples)])
    return list(zip(images.split(32), texts.split(32), strict=True))


def compare(loaded: LoadedCLIP, data: list[tuple[torch.Tensor, torch.Tensor]], recipes: Sequence[Recipe]) -> float:
    """Return seconds together over seconds apart.

    Raises:
        SystemExit: If any bit of a result differs.
    """
    apart, states = 0.0, []
    for recipe in recipes:
        model = copy.deepcopy(loaded.model)
        started = time.perf_counter()
        lit_clipq.quantize(model, data, recipe)
        apart += time.perf_counter() - started
        states.append(model.state_dict())
    model = copy.deepcopy(loaded.model)
    started = time.perf_counter()
    found = lit_clipq.quantize_many(model, data, recipes)
    together = time.perf_counter() - started
    for quantized, state in zip(found, states, strict=True):
        with quantized.installed():
            now = model.state_dict()
            if now.keys() != state.keys() or any(not torch.equal(now[name], state[name]) for name in state):
                raise SystemExit("results differ")
    return together / apart


def main(args: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mini-vit"])
    parser.add_argument("--recipes", nargs="+", default=["vanilla", "base_ptq", "ptq4clip"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    o = parser.parse_args(args)
    torch.set_num_threads(o.threads)
    print("| model | recipe | widths | time of four together / four apart |\n|---|---|---|---|")
    for model in o.models:
        loaded = lit_clipq.load_clip(model, "mini")
        data = batches(loaded, o.samples)
        for recipe in o.recipes:
            options = {"attention_products": True} if recipe == "vanilla" else {}
            for name, flags in SETS.items():
                recipes = [make_recipe(recipe, bits=BitWidths.resolve(flag), **options) for flag in flags]
                ratio = statistics.median(compare(loaded, data, recipes) for _ in range(o.repeats))
                print(f"| {model} | {recipe} | {name} | {ratio:.2f}, equal to the bit |", flush=True)


if __name__ == "__main__":
    main()
