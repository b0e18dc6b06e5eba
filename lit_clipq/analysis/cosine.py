"""Cosine similarity of pictures and texts, float against quantized: densities, mean shift, distance, rank correlation.

Matched are the pairs of the data set, a picture with a caption or a class of its own. Of the others, of which there are
as many as pictures times texts, a fixed choice is looked at, the same for every network, so that two networks can be
compared pair by pair.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_clipq.errors import DataError

BINS = 400
"""Bins of a density over [-1, 1]: 0.005 wide."""
KINDS = ("matched", "unmatched")


@dataclass(frozen=True)
class PairCosines:
    """Cosine similarities of one network on a fixed choice of pairs."""

    matched: Tensor
    """float32 (p,), of pictures with texts of their own."""
    unmatched: Tensor
    """float32 (q,), of pictures with others."""

    @property
    def by_kind(self) -> dict[str, Tensor]:
        """Both by name."""
        return {"matched": self.matched, "unmatched": self.unmatched}


def pair_cosines(images: Tensor, texts: Tensor, pairs: Tensor, *, unmatched_per_image: int = 32) -> PairCosines:
    """Return the cosines of all matched pairs, and of every picture with some texts that are not its own.

    The latter are texts at fixed distances along the list of texts, evenly spread.

    Args:
        images: Embeddings (n, d), of any length above 0.
        texts: Embeddings (m, d).
        pairs: int64 (p, 2), rows (position in `texts`, position in `images`).
        unmatched_per_image: How many other texts of each picture are looked at, as far as there are so many.

    Raises:
        DataError: If there is no matched or no unmatched pair.
    """
    image, text = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    count = min(unmatched_per_image, max(len(text) - 1, 0))
    steps = 1 + torch.arange(count) * max(len(text) - 1, 1) // max(count, 1)
    owner = torch.arange(len(image))[:, None].expand(-1, count)  # (n, count)
    other = (owner + steps) % max(len(text), 1)
    known = pairs.cpu()
    own = torch.isin((owner * len(text) + other).flatten(), known[:, 1] * len(text) + known[:, 0])
    chosen = torch.stack([other.flatten(), owner.flatten()], dim=1)[~own]
    if not len(known) or not len(chosen):
        raise DataError(
            f"expected pictures with texts of their own and others, got {len(known)} matched and {len(chosen)} other "
            "pairs; evaluate at least two pictures with different texts"
        )
    return PairCosines(_cosines(image, text, known), _cosines(image, text, chosen))


def _cosines(image: Tensor, text: Tensor, pairs: Tensor, chunk: int = 65536) -> Tensor:
    """Return the cosines of rows (text, image), float32 on the CPU."""
    parts = [
        (text[rows[:, 0].to(text.device)] * image[rows[:, 1].to(image.device)]).sum(1).cpu()
        for rows in pairs.split(chunk)
    ]
    return torch.cat(parts)


def density(values: Tensor, bins: int = BINS) -> list[float]:
    """Return the probability density of values over [-1, 1] as a histogram; its sum times the bin width is 1."""
    counts = torch.histc(values.double().clamp(-1, 1), bins, -1.0, 1.0)
    return [round(x, 6) for x in (counts / counts.sum() * bins / 2).tolist()]


def wasserstein(a: Tensor, b: Tensor) -> float:
    """Return the 1-Wasserstein distance of two samples of the same size: the mean distance of their sorted values."""
    if len(a) != len(b):
        raise ValueError(f"expected samples of the same size, got {len(a)} and {len(b)}")
    return (a.double().sort().values - b.double().sort().values).abs().mean().item()


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Return Spearman's rank correlation, ties at their mean rank; `None` where one sample is constant."""
    x, y = (_ranks(v) for v in (a, b))
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt().item()
    return (x * y).sum().item() / scale if scale > 0 else None


def _ranks(values: Tensor) -> Tensor:
    _, group, counts = torch.unique(values.double(), return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[group]


def describe_cosines(before: PairCosines, after: PairCosines | None = None) -> dict[str, Any]:
    """Return what `results.json` holds of the cosines of a float and, where there is one, a quantized network.

    Args:
        before: Of the float network.
        after: Of the quantized one, on the same pairs.

    Returns:
        `bins` over [-1, 1]; for `matched` and `unmatched` the number of pairs, mean and density of both networks, and
        `mean_shift`, `wasserstein` and `rank_correlation` between them.

    Raises:
        DataError: If the two saw different pairs.
    """
    told: dict[str, Any] = {"bins": BINS}
    for kind in KINDS:
        a = before.by_kind[kind]
        told[kind] = {"pairs": len(a), "float": {"mean": a.double().mean().item(), "density": density(a)}}
        if after is None:
            continue
        b = after.by_kind[kind]
        if len(a) != len(b):
            raise DataError(
                f"float and quantized runs saw {len(a)} and {len(b)} {kind} pairs; evaluate the same data twice"
            )
        told[kind] |= {
            "quantized": {"mean": b.double().mean().item(), "density": density(b)},
            "mean_shift": (b.double().mean() - a.double().mean()).item(),
            "wasserstein": wasserstein(a, b),
            "rank_correlation": rank_correlation(a, b),
        }
    return told
