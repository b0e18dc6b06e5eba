"""Rows of embeddings: which are identical, which belong to the same sample, which are broken."""

from typing import NamedTuple

import torch
from torch import Tensor

from lit_clipq.errors import DataError, ModelError


class DistinctRows(NamedTuple):
    """The distinct rows of a matrix: `rows[first[group]]` equals `rows`."""

    first: Tensor
    """int64 (u,): where each distinct row occurs first, ascending."""
    group: Tensor
    """int64 (n,): which distinct row each row is."""


class DistinctIds(NamedTuple):
    """Where the distinct values of a list of sample ids are, in ascending order of id."""

    first: Tensor
    """int64 (u,): position of the first occurrence of each distinct id."""
    repeated: Tensor
    """int64 (r,): positions of all later occurrences."""
    original: Tensor
    """int64 (r,): position of the first occurrence of the same id as `repeated`."""


def distinct_rows(rows: Tensor) -> DistinctRows:
    """Find rows that are identical in every element; -0.0 and 0.0 are the same.

    Equality is exact (the bytes of the rows are compared, a hash only finds candidates), in time linear in the size of
    `rows` however many rows repeat.

    Args:
        rows: floating point (n, d), on any device, without NaN.

    Returns:
        Distinct rows in the order of their first occurrence, on the device of `rows`.

    Example:
        >>> distinct_rows(torch.tensor([[1.0, 2.0], [0.0, 3.0], [1.0, 2.0]])).group.tolist()
        [0, 1, 0]
    """
    seen: dict[bytes, int] = {}
    first: list[int] = []
    group: list[int] = []
    for block in rows.detach().split(4096):
        # Adding zero turns -0.0 into 0.0; viewing as bytes serves dtypes that numpy does not know, such as bfloat16.
        for row in (block + 0.0).cpu().contiguous().view(torch.uint8).numpy():
            number = seen.setdefault(row.tobytes(), len(seen))
            if number == len(first):
                first.append(len(group))
            group.append(number)
    return DistinctRows(
        torch.tensor(first, dtype=torch.int64, device=rows.device),
        torch.tensor(group, dtype=torch.int64, device=rows.device),
    )


def distinct_ids(ids: Tensor) -> DistinctIds:
    """Find the first and the later occurrences of every id.

    Args:
        ids: int64 (n,).

    Example:
        >>> distinct_ids(torch.tensor([7, 3, 7])).first.tolist()
        [1, 0]
    """
    values, order = torch.sort(ids, stable=True)
    is_first = torch.ones_like(values, dtype=torch.bool)
    is_first[1:] = values[1:] != values[:-1]
    first = order[is_first]
    group = is_first.cumsum(0) - 1
    return DistinctIds(first, order[~is_first], first[group[~is_first]])


def positions(ids: Tensor, wanted: Tensor, what: str) -> Tensor:
    """Find each wanted id in a sorted list of distinct ids.

    Args:
        ids: int64 (n,), ascending, distinct.
        wanted: int64 (m,).
        what: plural of what the ids name, for the message.

    Returns:
        int64 (m,) with `ids[result] == wanted`.

    Raises:
        DataError: A wanted id is not there.
    """
    index = torch.searchsorted(ids, wanted.contiguous())
    found = ids[index.clamp(max=max(len(ids) - 1, 0))] == wanted if len(ids) else torch.zeros_like(wanted).bool()
    if not bool(found.all()):
        missing = torch.unique(wanted[~found])
        raise DataError(
            f"expected an embedding for every id in `pairs`, but {len(missing):,} {what} have none "
            f"(the first is {int(missing[0])}); evaluate all {what} that the pairs name."
        )
    return index


def check_finite_rows(rows: Tensor, what: str) -> None:
    """Refuse NaN and infinite values.

    Args:
        rows: floating point (n, ...), one sample each.
        what: plural of what a row is, for the message.

    Raises:
        ModelError: Some row is not finite.
    """
    broken = sum(int((~block.isfinite()).flatten(1).any(1).sum()) for block in rows.split(4096))
    if broken:
        raise ModelError(
            f"expected finite {what}, but {broken:,} of {len(rows):,} contain NaN or Inf; "
            "check the weights, and the quantized layers' scales."
        )


def check_same_rows(rows: Tensor, ids: Tensor, repeats: DistinctIds, what: str, tolerance: float = 1e-2) -> None:
    """Refuse two different embeddings under one sample id.

    The same sample encoded in another batch differs by rounding (in bfloat16 by almost one percent), a different
    sample by far more: the relative distance |a - b| / |b| decides.

    Args:
        rows: floating point (n, d).
        ids: int64 (n,).
        repeats: `distinct_ids(ids)`.
        what: plural of what a row is, for the message.
        tolerance: largest relative distance that counts as the same.

    Raises:
        DataError: An id stands for two different rows.
    """
    again, before = rows[repeats.repeated], rows[repeats.original]
    different = (again - before).norm(dim=1) > tolerance * before.norm(dim=1)
    if bool(different.any()):
        raise DataError(
            f"expected one sample per id, but {int(different.sum()):,} repeated {what} differ from those seen first "
            f"(for example id {int(ids[repeats.repeated][different][0])}); give every sample an id of its own."
        )
