"""How long the sensitivity analysis of a large CLIP takes: `python -m benchmarks.analyze`.

Random weights, every product and every operand of both towers; the error of the embedding is predicted for all of them,
and measured for every block, both towers and as many layers and operands as asked for. The bar is 3 minutes for
ViT-B-32 and 32 pairs on two cores.
"""

import argparse
import math
import time
from collections.abc import Sequence

import torch

import lit_clipq
from benchmarks.widths import batches
from lit_clipq.recipes import BitWidths, make_recipe
from lit_clipq.sensitivity import analyze


def main(args: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pretrained", default=None)
    parser.add_argument("--recipe", default="vanilla")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--measure", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    o = parser.parse_args(args)
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    loaded = lit_clipq.load_clip(o.model, o.pretrained)
    options = {"attention_products": True} if o.recipe == "vanilla" else {}
    recipe = make_recipe(o.recipe, bits=BitWidths.resolve({"bits": o.bits}), **options)
    started = time.perf_counter()
    analysis, _ = analyze(loaded.model, batches(loaded, o.samples), recipe, measure=o.measure)
    seconds = time.perf_counter() - started
    layers, operands = ([row for row in analysis.rows if row.scope == scope] for scope in ("layer", "operand"))
    off = [
        10 * math.log10(row.embedding / row.predicted)
        for row in analysis.rows
        if row.scope in ("layer", "operand") and row.embedding and row.predicted
    ]
    print(f"{o.model}, {o.recipe} at {o.bits} bits, {o.samples} pairs, {o.threads} threads")
    print(f"{len(layers)} layers, {len(operands)} operands predicted; {len(off)} of them measured, and every block")
    print(f"{seconds:.0f} s, of which {analysis.seconds:.0f} s calibration and prediction")
    print(f"measured over predicted squared error: {sum(off) / len(off):+.1f} dB, {min(off):+.1f} to {max(off):+.1f}")


if __name__ == "__main__":
    main()
