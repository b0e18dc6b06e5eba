"""Calibration batches: how many samples they hold, of which kind they are, and which of their rows count."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_clipq.nn.layout import Layout, TextMask

Batch = Any
"""A tensor, or tensors in a tuple, list or dictionary; a part may be `None`. Only `forward` knows what it means."""

PLACES = 2**24  # more than a sample has units


@dataclass
class Rows:
    """Which rows of the batch at hand count.

    Attributes:
        samples: Global sample numbers of the batch, int64 (B,).
        lengths: Valid positions of each text, int64 (B,), where the text tower is causal and pooled at its end token;
            `None` elsewhere. Positions behind the end never reach the output.
        drop_start: Whether the first position is left out as well, because its keys and values are constants.
        sizes: How many pictures, texts and so on the batch has, where they are not all `len(samples)`.
    """

    samples: Tensor
    lengths: Tensor | None = None
    drop_start: bool = False
    sizes: tuple[int, ...] = ()

    def mask(self, *, text: bool, averages: bool = False) -> TextMask | None:
        """Return what the positions of a layer are held against; `None` where all of them count.

        Args:
            text: Whether the layer's rows are positions of a text under the end-token rule.
            averages: Whether it is the product of attention weights and values.
        """
        return TextMask(self.lengths, self.drop_start, averages) if text and self.lengths is not None else None


def sample_counts(batch: Batch) -> tuple[int, ...]:
    """Return the different numbers of samples that the tensors of a batch hold, largest first."""
    tensors = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    return tuple(sorted({len(x) for x in tensors if isinstance(x, Tensor) and x.dim()}, reverse=True)) or (1,)


def count_samples(batch: Batch) -> int:
    """Return the number of samples in a batch: the length of its longest tensor."""
    return sample_counts(batch)[0]


def one_of_each_kind(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the first batch of each kind: which parts it has, of what types and with how many axes.

    A set of pairs has one kind; one whose pictures and texts come in batches of their own has two.
    """
    seen = set()
    for batch in batches:
        kind = _kind(batch)
        if kind not in seen:
            seen.add(kind)
            yield batch


def _kind(batch: Batch) -> Any:
    if isinstance(batch, Tensor):
        return batch.dtype, batch.dim()
    if isinstance(batch, Mapping):
        return tuple((name, _kind(value)) for name, value in batch.items())
    return tuple(_kind(value) for value in batch) if isinstance(batch, list | tuple) else type(batch)


def hashed(keys: Tensor) -> Tensor:
    """Mix the bits of int64 keys to 0 .. 2^31 - 1; neighbours become unrelated."""
    mixed = (keys * 0x9E3779B1) & 0x7FFFFFFFFFFF
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA6B
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35
    return (mixed ^ (mixed >> 16)) & 0x7FFFFFFF


def unit_keys(layout: Layout, output: Tensor, rows: Rows, mask: TextMask | None) -> Tensor:
    """Number the units of an output, int64 (N,): sample number times a constant, plus the place within the sample."""
    return layout.counted(_numbered(layout.lead(output), rows, output.device), output, mask).reshape(-1)


def sample_of(keys: Tensor) -> Tensor:
    """Return the global number of the sample that each unit belongs to, int64 (N,)."""
    return keys // PLACES


def _numbered(lead: torch.Size, rows: Rows, device: torch.device) -> Tensor:
    """Return a key for each unit of the leading shape, int64, of that shape.

    The samples are the first axis that is as long as a part of the batch (pictures, texts), else axis 0 where it is a
    multiple of that (windows or heads beside samples). Units of a layer that sees no samples (a table of positions) are
    numbered by place alone.
    """
    sizes = rows.sizes or (len(rows.samples),)
    found = next(((axis, length) for axis, length in enumerate(lead) if length in sizes), None)
    axis, size = found or (0, next((size for size in sizes if size and lead[:1].numel() % size == 0), 0))
    if not size:
        return torch.arange(lead.numel(), device=device).reshape(lead)
    shape = (lead[:axis].numel(), size, lead[axis : axis + 1].numel() // size, lead[axis + 1 :].numel())
    samples = rows.samples[:size].to(device).view(1, size, 1, 1)
    place = torch.arange(shape[0] * shape[2] * shape[3], device=device).view(shape[0], 1, *shape[2:])
    return (samples * PLACES + place).reshape(lead)
