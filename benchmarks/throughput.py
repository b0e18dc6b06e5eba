"""Time of a fake-quantized forward pass against the float one: `python -m benchmarks.throughput`.

Both run in turn in one process, so that drift of the machine meets both; the ratio of medians is printed. The claim:
ViT-B-32 at batch 8, every matrix product quantized, costs at most 1.4 times the float pass on a CPU.
"""

import argparse
import copy
from collections.abc import Callable, Sequence

import torch

import lit_clipq
from benchmarks.timing import medians
from lit_clipq.models import encode_image, encode_text
from lit_clipq.recipes import BitWidths, make_recipe


def compare(name: str, batch: int, runs: int) -> None:
    """Print milliseconds and ratio for both towers of the open_clip model `name`."""
    loaded = lit_clipq.load_clip(name)
    images = torch.rand(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    texts = loaded.preprocessing.tokenizer(["a photo of two dogs that play in the snow beside a red car"] * batch)
    quantized = copy.deepcopy(loaded.model)
    recipe = make_recipe("vanilla", bits=BitWidths.resolve({"bits": 8}), attention_products=True)
    report = lit_clipq.quantize(quantized, [(images, texts)], recipe)
    print(f"{name}, batch {batch}, {torch.get_num_threads()} threads, {len(report.map.quantized)} layers quantized")
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "image tower": (lambda: encode_image(loaded.model, images), lambda: encode_image(quantized, images)),
        "text tower": (lambda: encode_text(loaded.model, texts), lambda: encode_text(quantized, texts)),
    }
    for tower, (plain, rounded) in calls.items():
        before, after = medians([plain, rounded], runs)
        print(f"  {tower}: float {before:7.1f} ms, quantized {after:7.1f} ms, ratio {after / before:.2f}")


def main(args: Sequence[str] | None = None) -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-32-quickgelu", help="open_clip model name")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args(args)
    compare(options.model, options.batch, options.runs)


if __name__ == "__main__":
    main()
