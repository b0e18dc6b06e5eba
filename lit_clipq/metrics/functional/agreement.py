"""How far two sets of embeddings of the same items rank the same way. No labels."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_clipq.metrics.functional.rows import check_finite_rows

BLOCK_BYTES = 64 * 2**20


def cosine_of_pairs(first: Tensor, second: Tensor) -> Tensor:
    """Cosine similarity of matching rows, float64 (n,) on the CPU.

    Args:
        first: floating point (n, d).
        second: floating point (n, d).

    Example:
        >>> cosine_of_pairs(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]])).tolist()
        [0.6]
    """
    return (_unit(first) * _unit(second)).sum(1).clamp(-1, 1).cpu()


@torch.no_grad()
def ranking_agreement(
    queries: tuple[Tensor, Tensor],
    index: tuple[Tensor, Tensor],
    ks: Sequence[int] = (1, 10),
    *,
    exclude_self: bool = False,
    block_bytes: int = BLOCK_BYTES,
) -> dict[str, Tensor]:
    """Compare, query by query, how two searches rank the same index by cosine similarity.

    `top{k}` is the share of the first k items of one search that are among the first k of the other; items of equal
    similarity stand in the order of the index. `rank_correlation` is Spearman's: the correlation of the ranks of all
    items, equal ones with their mean rank (Spearman, 1904). Where every item of one search is equally similar it is 0,
    and 1 where that is so in both.

    Args:
        queries: floating point (q, d) of the first and of the second search; row i is the same query.
        index: floating point (n, d) of the first and of the second search; row j is the same item.
        ks: how many items to look at; of an index with fewer items all of them.
        exclude_self: whether item i is not looked for by query i, as queries and index are the same items.
        block_bytes: working memory.

    Returns:
        float64 (q,) on the CPU by name, in [0, 1], the correlation in [-1, 1].

    Raises:
        ValueError: Shapes do not belong together, or there is nothing to find.
        ModelError: NaN or Inf in a row.

    Example:
        >>> eye = torch.eye(3)
        >>> ranking_agreement((eye, eye), (eye, eye.flip(0)), ks=(1,))["top1"].tolist()
        [0.0, 1.0, 0.0]
    """
    count = len(index[0]) - exclude_self
    if len({len(rows) for rows in queries}) > 1 or len({len(rows) for rows in index}) > 1 or min(ks) < 1 or count < 1:
        raise ValueError(
            f"expected as many queries and items in both searches, ks of at least 1 and an item to find, got "
            f"{[len(rows) for rows in queries]}, {[len(rows) for rows in index]} and {list(ks)}."
        )
    if exclude_self and len(queries[0]) != len(index[0]):
        raise ValueError(f"expected the items as queries, got {len(queries[0])} queries and {len(index[0])} items.")
    for rows in (*queries, *index):
        check_finite_rows(rows, "embeddings")
    first, second = ((_unit(q), _unit(i)) for q, i in zip(queries, index, strict=True))
    found: dict[str, list[Tensor]] = {}
    for block in _blocks(len(queries[0]), count, block_bytes):
        start = block.start if exclude_self else None
        one, other = (_similarities(q[block], i, start) for q, i in (first, second))
        for k in ks:
            found.setdefault(f"top{k}", []).append(_overlap(one, other, min(k, count)))
        found.setdefault("rank_correlation", []).append(_correlation(mean_ranks(one), mean_ranks(other)))
    return {name: torch.cat(values).cpu() for name, values in found.items()}


def mean_ranks(values: Tensor) -> Tensor:
    """Ranks from 1 in ascending order along the last axis; equal values have the mean of theirs.

    Args:
        values: (b, n).

    Returns:
        float64 (b, n).

    Example:
        >>> mean_ranks(torch.tensor([[3.0, 1.0, 3.0]])).tolist()
        [[2.5, 1.0, 2.5]]
    """
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values.contiguous())
    up_to = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + up_to + 1).double() / 2


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.detach().double(), dim=1)


def _blocks(queries: int, items: int, block_bytes: int) -> Iterator[slice]:
    rows = max(1, block_bytes // (8 * 8 * items))  # similarities, ranks and what sorting takes
    return (slice(start, min(start + rows, queries)) for start in range(0, queries, rows))


def _similarities(queries: Tensor, index: Tensor, first: int | None) -> Tensor:
    """Similarities (b, n); with `first`, the number of the first query, (b, n - 1) without the query itself."""
    found = queries @ index.T
    if first is None:
        return found
    others = torch.ones_like(found, dtype=torch.bool)
    others[torch.arange(len(found)), first + torch.arange(len(found))] = False
    return found[others].view(len(found), -1)


def _overlap(first: Tensor, second: Tensor, k: int) -> Tensor:
    chosen = []
    for similarities in (first, second):
        order = similarities.argsort(dim=1, descending=True, stable=True)[:, :k]
        chosen.append(torch.zeros_like(similarities, dtype=torch.bool).scatter_(1, order, True))
    return (chosen[0] & chosen[1]).sum(1).double() / k


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    first, second = (ranks - ranks.mean(1, keepdim=True) for ranks in (first, second))
    spread, other = first.square().sum(1), second.square().sum(1)
    both_level = (spread == 0) & (other == 0)
    value = (first * second).sum(1) / (spread * other).sqrt().clamp(min=1e-30)
    return torch.where(both_level, 1.0, value).clamp(-1, 1)
