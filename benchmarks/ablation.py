"""What each ingredient of PTQ4CLIP is worth on the mini world: `python -m benchmarks.ablation`.

Runs `lightning validate` with one ingredient changed at a time, over calibration seeds, as `benchmarks.quality` does
(runs that are there already are not repeated), and prints a Markdown table of differences to float, in points.

`reference weighting` weighs errors as the reference implementation does: with the gradient of the divergence between
the float network and itself, which is zero but for rounding. The project refuses such a gradient, so that its checks
are taken out here.
"""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality import METRICS, Run, cell, result

VARIANTS = {
    "as shipped": [],
    "uniform grids behind softmax and GELU": [
        "--quantize.options.softmax_grid=uniform",
        "--quantize.options.gelu_grid=uniform",
    ],
    "uniform grid behind softmax": ["--quantize.options.softmax_grid=uniform"],
    "uniform grid behind GELU": ["--quantize.options.gelu_grid=uniform"],
    "log2 grid behind softmax": ["--quantize.options.softmax_grid=log2"],
    "log sqrt 2 grid behind softmax": ["--quantize.options.softmax_grid=log_sqrt2"],
    "steps that are powers of two apart": ["--quantize.options.search.grid.powers_of_two=true"],
    "Fisher of the image-text softmax": ["--quantize.options.objective=fisher"],
    "reference weighting": ["--quantize.options.objective=fisher"],
    "squared gradients element by element": ["--quantize.options.search.factored=false"],
    "four draws a sample": ["--quantize.options.draws=4"],
    "no weighting (L2)": ["--quantize.options.search.distance=l2"],
    "cosine": ["--quantize.options.search.distance=cosine"],
    "L1": ["--quantize.options.search.distance=l1"],
    "channels not equalised": ["--quantize.options.equalize=false"],
    "start token quantized": ["--quantize.options.start_token=false"],
    "positions behind the end token counted": ["--quantize.options.end_token=false"],
    "sequential order": ["--quantize.options.sequential=true"],
    "bias correction": ["--quantize.options.bias_correction=true"],
    "a scale a tensor": ["--quantize.options.per_channel=false"],
    "observations stored in bfloat16": ["--quantize.options.store_bfloat16=true"],
    "half of the tokens": ["--quantize.options.token_share=0.5"],
}
REFERENCE = "reference weighting"


def self_divergence_gradient(
    image: Tensor,
    text: Tensor,
    temperature: float,
    *_: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of KL(p || p) of the image-text softmax by the embeddings, in float32: rounding noise."""
    with torch.enable_grad():
        image, text = (x.float().detach().requires_grad_() for x in (image, text))
        scores = (image @ text.T / temperature).log_softmax(dim=1)
        F.kl_div(scores, scores.detach(), reduction="batchmean", log_target=True).backward()
    return tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in (image, text))  # type: ignore[return-value]


@contextlib.contextmanager
def weighing(variant: str) -> Iterator[None]:
    """Weigh as the variant does."""
    if variant != REFERENCE:
        yield
        return
    with (
        mock.patch("lit_clipq.calibration.objective.contrastive_cotangents", self_divergence_gradient),
        mock.patch("lit_clipq.calibration.session.check_gradients", return_value=None),
    ):
        yield


def main(args: Sequence[str] | None = None) -> None:
    """Parse the command line, run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mini-vit", "mini-resnet"])
    parser.add_argument("--tasks", nargs="+", default=list(METRICS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--width", default="w4a4")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--preset", default="full")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    o = parser.parse_args(args)
    names = [(task, metric) for task in o.tasks for metric in METRICS[task]]
    for model in o.models:
        print(
            f"\n**{model}, ptq4clip {o.width.upper()}** ({o.preset}, {o.seeds} seeds; difference to float in points)\n"
        )
        print("| variant | " + " | ".join(metric for _, metric in names) + " |\n|---|" + "---|" * len(names))
        for variant in o.variants:
            folder = o.out / "reference" if variant == REFERENCE else o.out
            with weighing(variant):
                results = {
                    task: [
                        result(Run(model, task, "ptq4clip", o.width, seed, o.preset, tuple(VARIANTS[variant])), folder)
                        for seed in range(o.seeds)
                    ]
                    for task in o.tasks
                }
            print(
                f"| {variant} | " + " | ".join(cell(results[task], metric) for task, metric in names) + " |", flush=True
            )


if __name__ == "__main__":
    main()
