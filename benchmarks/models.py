"""Which models work, family by family: `python -m benchmarks.models` writes docs/models.md.

Each family's example is built at its full size without memory for weights, rewritten and run on one picture and one
text of full length, to count what stays float. A small member of the family with random weights is then really
quantized, and what rounding to 8 bits changes is measured.
"""

import argparse
import logging
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch

from benchmarks.families import FAMILIES, Family, enliven, family_of, full_config, sample, small_config
from lit_clipq.api import preview, quantize
from lit_clipq.calibration.profile import profile
from lit_clipq.errors import LitClipqError
from lit_clipq.models import encode_image, encode_text, load_clip, make_explicit
from lit_clipq.models.configs import ModelConfig, build_model
from lit_clipq.nn.swap import find_layers
from lit_clipq.recipes import make_recipe

TARGET = Path(__file__).parents[1] / "docs" / "models.md"
RECIPE = "ptq4clip"
HEAD = """# Models

Written by `python -m benchmarks.models`. Every name of `open_clip.list_models()` belongs to a family; families without
a name of open_clip's are towers that a configuration file asks for (`vision_cfg.timm_model_name`).

- **explicit**: every attention is written out, so that both of its products can be quantized; otherwise the class that
  stays fused.
- **parameters, multiply-accumulates**: of the first name in full size, for one picture and one text of full length.
- **stays float**: share of the multiply-accumulates that no layer quantizes, with the products of attention quantized
  (the default of `ptq4clip`), and without (the default of `vanilla`).
- **W8A8**: signal-to-noise ratio of the image and of the text embeddings of a small member with random weights, whose
  classes, options and pooling are the family's, after `ptq4clip` at 8 bits; or what is refused.
- **hub files**: what has to be in the local cache of the hub beside the weights, of any name of the family.

"""
COLUMNS = (
    "family", "names", "explicit", "parameters (M)", "multiply-accumulates (G)", "stays float (%)", "W8A8 (dB)",
    "hub files",
)  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """What the full-size example of a family says."""

    fused: tuple[str, ...]
    parameters: int
    macs: float
    float_share: float
    float_share_without_products: float


def count(family: Family) -> Counted:
    """Build the example on the meta device, rewrite it and count its products."""
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        model: Any = build_model(ModelConfig(family.example, None, full_config(family, Path(folder)), {}), "fp32")
    parameters = sum(parameter.numel() for parameter in model.eval().parameters())
    records = make_explicit(model)
    text = getattr(model, "text", model)
    if hasattr(text, "config"):  # transformers looks into masks, which have no values here
        text.transformer.register_forward_pre_hook(_without_mask, with_kwargs=True)
    roots = {"clip": model}
    layers = find_layers(roots)

    def forward(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        model.encode_image(batch[0], normalize=False)
        model.encode_text(batch[1], normalize=False)

    macs = profile(roots, layers, forward, sample(model, 1, device="meta"), 1).macs
    shares = [
        preview(roots, make_recipe(RECIPE, attention_products=products)).with_macs(macs).float_share
        for products in (True, False)
    ]
    fused = tuple(sorted({record.original for record in records if not record.explicit}))
    return Counted(fused, parameters, sum(macs.values()), *shares)


def _without_mask(_: object, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**options, "attention_mask": None}


def quantize_small(family: Family, samples: int = 8) -> str:
    """Quantize the small member; the signal-to-noise ratio of both embeddings in dB, or why it is refused."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = load_clip(str(small_config(family, Path(folder)))).model
    enliven(model)
    images, tokens = sample(model, samples)
    with torch.no_grad():
        before = encode_image(model, images), encode_text(model, tokens)
        try:
            quantize(model, [(images, tokens)], make_recipe(RECIPE))
        except LitClipqError as error:
            return f"refused: {error}"
        after = encode_image(model, images), encode_text(model, tokens)
    ratios = [20 * torch.log10(x.norm() / (y - x).norm()).item() for x, y in zip(before, after, strict=True)]
    return " / ".join(f"{ratio:.0f}" for ratio in ratios)


def hub_files(names: Sequence[str]) -> str:
    """Name what the family's text towers and tokenizers take from the hub."""
    texts = [open_clip.get_model_config(name)["text_cfg"] for name in names]
    found = [
        f"{what} of {_some(sorted({text[key] for text in texts if key in text}), 2)}"
        for what, key in (("`config.json`", "hf_model_name"), ("tokenizer", "hf_tokenizer_name"))
        if any(key in text for text in texts)
    ]
    return "; ".join(found) or "none"


def _some(words: Sequence[str], shown: int) -> str:
    """List the first words and count the rest."""
    rest = len(words) - shown
    return ", ".join(words[:shown]) + (f" and {rest} more" if rest > 0 else "")


def row(family: Family) -> str:
    """Measure one family and write its row."""
    names = [name for name in open_clip.list_models() if family.published and family_of(name) is family]
    counted = count(family)
    shown = _some([family.example, *(name for name in names if name != family.example)], 4)
    explicit = "yes" if not counted.fused else "no: " + ", ".join(counted.fused)
    shares = f"{100 * counted.float_share:.2f} / {100 * counted.float_share_without_products:.2f}"
    cells = (
        family.title, shown, explicit, f"{counted.parameters / 1e6:.0f}", f"{counted.macs / 1e9:.2f}", shares,
        quantize_small(family), hub_files(names),
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main(args: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="", help="regular expression of titles; by default all, and the page")
    options = parser.parse_args(args)
    logging.disable(logging.WARNING)
    chosen = [family for family in FAMILIES if re.search(options.family, family.title)]
    lines = []
    for family in sorted(chosen, key=lambda family: not family.published):
        lines.append(row(family))
        print(lines[-1], flush=True)
    if not options.family:
        table = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), *lines]
        TARGET.write_text(HEAD + "\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
