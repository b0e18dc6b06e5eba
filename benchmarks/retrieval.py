"""Time and memory of similarity and recall for 5,000 images and 25,000 captions: `python -m benchmarks.retrieval`.

Each variant runs in a process of its own, so that its peak memory is its own. The plain variants hold the whole
similarity matrix, whose memory grows with images x captions, and take its top k or sort it; they break ties arbitrarily
and know nothing of who saw which sample.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lit_clipq.metrics import RetrievalRecall

KS = (1, 5, 10)
SHARED_TEXTS = 344  # as many captions of COCO val2017 have a text that another picture has too
LIMIT_SECONDS, LIMIT_GB = 10.0, 1.0


def synthetic(images: int, captions: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of images (images, dim) and of distinct texts (texts, dim), and pairs (captions, 2) of row numbers."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(captions) % images
    text = torch.arange(captions) % max(1, captions - SHARED_TEXTS // 2)
    image = torch.randn(images, dim, generator=generator)
    texts = torch.randn(int(text.max()) + 1, dim, generator=generator)
    for start in range(0, len(texts), 1000):  # in place and in pieces: making the data must not be the peak
        rows = texts[start : start + 1000]
        rows.mul_(8).add_(image[owner[start : start + len(rows)]])
    return image, texts, torch.stack([text, owner], dim=1)


def ours(images: Tensor, texts: Tensor, pairs: Tensor) -> dict[str, float]:
    """Recall by the metric that the retrieval task uses, in batches of 256."""
    metric = RetrievalRecall(ks=KS)
    for ids in torch.arange(len(images)).split(256):
        metric.update(images=images[ids[0] : ids[-1] + 1], image_ids=ids)
    text_of = pairs[:, 0].contiguous()
    for ids in torch.arange(len(texts)).split(256):
        own = pairs[(text_of >= ids[0]) & (text_of <= ids[-1])]
        metric.update(texts=texts[ids[0] : ids[-1] + 1], text_ids=ids, pairs=own)
    return metric.compute()


def plain_topk(images: Tensor, texts: Tensor, pairs: Tensor) -> dict[str, float]:
    """Recall from the top k of the full matrix, both ways."""
    return _plain(images, texts, pairs, lambda similarity: similarity.topk(max(KS), dim=1).indices)


def plain_sort(images: Tensor, texts: Tensor, pairs: Tensor) -> dict[str, float]:
    """Recall from the full matrix sorted both ways."""
    return _plain(images, texts, pairs, lambda similarity: similarity.argsort(dim=1, descending=True)[:, : max(KS)])


def _plain(images: Tensor, texts: Tensor, pairs: Tensor, first: Callable[[Tensor], Tensor]) -> dict[str, float]:
    images = torch.nn.functional.normalize(images, dim=1)
    captions = torch.nn.functional.normalize(texts, dim=1)[pairs[:, 0]]
    similarity = images @ captions.T  # (images, captions)
    owner = pairs[:, 1]
    to_text = owner[first(similarity)] == torch.arange(len(images))[:, None]
    to_image = first(similarity.T) == owner[:, None]
    result = {f"recall@{k}_i2t": to_text[:, :k].any(1).double().mean().item() for k in KS}
    return result | {f"recall@{k}_t2i": to_image[:, :k].any(1).double().mean().item() for k in KS}


VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor], dict[str, float]]] = {
    "ours": ours,
    "plain top k": plain_topk,
    "plain sort": plain_sort,
}


def peak_gb() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(variant: str, sizes: tuple[int, int, int]) -> None:
    """Run one variant in this process and print a JSON line."""
    data = synthetic(*sizes)
    VARIANTS[variant](*(part[:64] for part in synthetic(64, 64, 8)))  # load what torch loads at first use
    before, start = peak_gb(), time.perf_counter()
    recalls = VARIANTS[variant](*data)
    print(json.dumps({"seconds": time.perf_counter() - start, "gb": peak_gb() - before, "recalls": recalls}))


def main() -> None:
    """Measure all variants in processes of their own and print figures and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--captions", type=int, default=25_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = (args.images, args.captions, args.dim)
    if args.measure:
        measure(args.measure, sizes)
        return
    options = [f"--images={args.images}", f"--captions={args.captions}", f"--dim={args.dim}"]
    results = {}
    for variant in VARIANTS:
        command = [sys.executable, "-m", "benchmarks.retrieval", "--measure", variant, *options]
        results[variant] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603 our own arguments
    print(f"{args.images:,} images x {args.captions:,} captions, dim {args.dim}, {torch.get_num_threads()} threads")
    for variant, result in results.items():
        seconds, gb = (result[unit] / results["ours"][unit] for unit in ("seconds", "gb"))
        recalls = "  ".join(f"{name} {value:.4f}" for name, value in result["recalls"].items())
        print(
            f"{variant:>12}: {result['seconds']:6.2f} s ({seconds:5.2f} x ours)  "
            f"{result['gb']:6.3f} GB above the embeddings ({gb:4.1f} x ours)  {recalls}"
        )
    kept = results["ours"]["seconds"] <= LIMIT_SECONDS and results["ours"]["gb"] <= LIMIT_GB
    print(f"{'limit':>12}: {LIMIT_SECONDS:g} s and {LIMIT_GB:g} GB: {'kept' if kept else 'MISSED'}")


if __name__ == "__main__":
    main()
