"""Whether a change moved any number of a recipe: `python -m benchmarks.same_numbers record FILE`, then `compare FILE`.

Quantizes the mini models and one with planted outliers by every recipe at several widths, and hashes what came out:
codes, scales and all other state, the objectives of the search, and embeddings of a fixed batch. Hashes belong to a
machine, its number of threads and a version of torch, so both runs are made on the same one; it takes minutes.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

import lit_clipq
from lit_clipq.recipes import BitWidths, make_recipe

MODELS = ("mini-vit", "mini-resnet", "mini-vit-outlier")
RECIPES = ("vanilla", "base_ptq", "ptq4clip_paper", "ptq4clip")
WIDTHS = {"W8A8": (8, 8), "W6A6": (6, 6), "W4A8": (4, 8), "W4A4": (4, 4)}
OPTIONS = {"vanilla": {"attention_products": True}}


def hashes(samples: int) -> dict[str, str]:
    """Return one hash for each model, recipe and width."""
    found = {}
    for model in MODELS:
        for recipe in RECIPES:
            for width, (weight, activation) in WIDTHS.items():
                name = f"{model} {recipe} {width}"
                found[name] = _run(model, recipe, {"weight_bits": weight, "activation_bits": activation}, samples)
                print(name, found[name], flush=True)
    return found


def _run(model: str, recipe: str, widths: dict[str, int | None], samples: int) -> str:
    torch.manual_seed(0)
    loaded = lit_clipq.load_clip(model, "mini")
    generator = torch.Generator().manual_seed(1)
    size = loaded.preprocessing.image(Image.new("RGB", (64, 64))).shape
    colours = ("red", "green", "blue", "yellow")
    texts = loaded.preprocessing.tokenizer(
        [f"a {colours[i % 4]} circle" + " above a square" * (i % 3) for i in range(samples)]
    )
    images = torch.randn(samples, *size, generator=generator)
    batches = [(images[i : i + 16], texts[i : i + 16]) for i in range(0, samples, 16)]
    chosen = make_recipe(recipe, bits=BitWidths.resolve(widths), **OPTIONS.get(recipe, {}))
    report = lit_clipq.quantize(loaded.model, batches, chosen)
    digest = hashlib.sha256()
    for key, value in sorted(loaded.model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for key, layer in sorted(report.layers.items()):
        digest.update(f"{key} {layer.before!r} {layer.after!r} {layer.sqnr_db!r} {layer.clipped!r}".encode())
    with torch.inference_mode():
        for output in (loaded.model.encode_image(images[:4]), loaded.model.encode_text(texts[:4])):
            digest.update(output.numpy().tobytes())
    return digest.hexdigest()[:16]


def main(args: Sequence[str] | None = None) -> int:
    """Record, or compare with what was recorded; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    o = parser.parse_args(args)
    torch.set_num_threads(o.threads)
    found = hashes(o.samples)
    setting = {"torch": torch.__version__, "threads": o.threads, "samples": o.samples}
    if o.verb == "record":
        o.file.write_text(json.dumps({"setting": setting, "hashes": found}, indent=1) + "\n", encoding="utf-8")
        return 0
    recorded = json.loads(o.file.read_text(encoding="utf-8"))
    if recorded["setting"] != setting:
        print(f"recorded with {recorded['setting']}, now {setting}: nothing to compare")
        return 1
    differing = [name for name, value in recorded["hashes"].items() if found.get(name) != value]
    print(
        f"{len(found) - len(differing)} of {len(found)} equal to the bit"
        + "".join(f"\ndiffers: {n}" for n in differing)
    )
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
