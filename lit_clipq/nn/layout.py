"""How the tensors of a product are laid out: what its units are, and where its output channels lie.

Units are the pieces of a product along the first axis that are counted, weighed and drawn by themselves: rows of a
linear layer, pictures of a convolution, (sample, head) pairs of a product of activations. A kind of layer names its
layout in `lit_clipq.nn.registry`; nobody else asks of which class a layer is.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class TextMask:
    """Which positions of the texts in a batch count, for one product of a causal text tower."""

    lengths: Tensor
    """Valid positions of each text, int64 (B,)."""
    drop_start: bool = False
    """Whether the first position is left out as well, because its keys and values are constants."""
    averages: bool = False
    """Whether the product is that of attention weights and values."""

    def applies(self, x: Tensor) -> bool:
        """Whether x (B, L, ...) has a row for each text."""
        return x.dim() >= 3 and len(x) == len(self.lengths)

    def valid(self, x: Tensor) -> Tensor:
        """Return the boolean (B, L) of positions that count, for x of shape (B, L, ...)."""
        positions = torch.arange(x.shape[1], device=x.device)
        valid = positions < self.lengths.to(x.device)[:, None]
        return valid & (positions > 0) if self.drop_start else valid


class Layout(ABC):
    """How operands, product and errors of one kind of layer are cut into units."""

    channel_axis: ClassVar[int] = -1
    """Axis of the output channels in a product that is cut."""
    by_token: ClassVar[bool] = False
    """Whether a share of the units will do (`token_share`)."""
    constants: int = 0
    """How many constants (registers) stand in front of what is cut."""

    @abstractmethod
    def operands(self, inputs: Tensors, mask: TextMask | None = None) -> Tensors:
        """Return the inputs of a call with units first; what the mask leaves out is cut or zero."""

    @abstractmethod
    def product(self, x: Tensor, mask: TextMask | None = None) -> Tensor:
        """Return an output, or a gradient by it, cut as the product of the cut operands is shaped."""

    @abstractmethod
    def lead(self, output: Tensor) -> torch.Size:
        """Return the leading shape of an output that numbers its units."""

    def counted(self, keys: Tensor, output: Tensor, mask: TextMask | None = None) -> Tensor:  # noqa: ARG002
        """Return those of the keys, of the shape of `lead`, whose units the mask keeps."""
        return keys

    def unit_costs(self, errors: Tensor) -> Tensor:
        """Add up errors of a cut product for each piece that can be drawn by itself: (N,)."""
        return errors.flatten(1).sum(1)

    def unit_any(self, x: Tensor) -> Tensor:
        """Tell which of these pieces hold anything that is not zero, bool of the shape of `unit_costs`."""
        return (x != 0).flatten(1).any(1)

    def elements(self, product: Tensor, matters: Tensor) -> Tensor:
        """Count the elements of a cut product in the pieces that matter, a bool of the shape of `unit_costs`."""
        each = product[0].numel() // max(matters[0].numel(), 1) if len(product) else 0
        return matters.sum() * each


class RowLayout(Layout):
    """Linear layers: input (*, in), output (*, out); units are rows."""

    by_token = True

    def operands(self, inputs: Tensors, mask: TextMask | None = None) -> Tensors:
        """Return the rows (N, in)."""
        return (self._rows(inputs[0], mask),)

    def product(self, x: Tensor, mask: TextMask | None = None) -> Tensor:
        """Return the rows (N, out)."""
        return self._rows(x, mask)

    def lead(self, output: Tensor) -> torch.Size:
        """All axes but the channels."""
        return output.shape[:-1]

    def counted(self, keys: Tensor, output: Tensor, mask: TextMask | None = None) -> Tensor:
        """Leave out the keys of positions that do not count."""
        return keys[mask.valid(output)] if mask is not None and mask.applies(output) else keys

    @staticmethod
    def _rows(x: Tensor, mask: TextMask | None) -> Tensor:
        return x[mask.valid(x)] if mask is not None and mask.applies(x) else x.reshape(-1, x.shape[-1])


class MapLayout(Layout):
    """Grouped convolutions: maps (B, C, H, W); units are pictures."""

    channel_axis = -3

    def operands(self, inputs: Tensors, mask: TextMask | None = None) -> Tensors:  # noqa: ARG002
        """Return the maps as they are."""
        return inputs

    def product(self, x: Tensor, mask: TextMask | None = None) -> Tensor:  # noqa: ARG002
        """Return the maps as they are."""
        return x

    def lead(self, output: Tensor) -> torch.Size:
        """The pictures."""
        return output.shape[:1]


class PatchLayout(MapLayout):
    """Convolutions of one group: as maps, but an output position can be drawn, with the patch it sees, as a row."""

    def unit_costs(self, errors: Tensor) -> Tensor:
        """Add up over channels: (B, H W)."""
        return errors.sum(1).flatten(1)

    def unit_any(self, x: Tensor) -> Tensor:
        """Tell which output positions matter: (B, H W)."""
        return (x != 0).any(1).flatten(1)


class PairLayout(Layout):
    """Products of activations, (*, M, K) @ (*, K, N); units are leading axes, rows of the left operand are drawn.

    Args:
        constants: Registers that the product has; their columns, of scores or of attention weights, are cut.
        scores: Whether it is that of queries and keys, whose output has those columns; else its left operand has.
    """

    def __init__(self, constants: int = 0, *, scores: bool = False) -> None:
        self.constants, self.scores = constants, scores

    def operands(self, inputs: Tensors, mask: TextMask | None = None) -> Tensors:
        """Return (P, M, K) and (P, K, N).

        What lies behind the end of a text is zero, not cut, because texts differ in length; the start token is cut out
        of keys or values. Scores: a = queries (B, H, L, d), b = keys (B, H, d, L). Averages: a = weights (B, H, L, L),
        b = values (B, H, L, d).
        """
        a, b = inputs
        if not self.scores:
            a = a[..., self.constants :]
        if mask is not None and mask.applies(a):
            valid = mask.valid(a.transpose(1, 2))[:, None, :, None]
            a = a * valid
            if mask.averages:
                b = b * valid
                a, b = (a[..., 1:], b[..., 1:, :]) if mask.drop_start else (a, b)
            else:
                b = b * valid.transpose(-2, -1)
                b = b[..., 1:] if mask.drop_start else b
        lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        return tuple(x.expand(*lead, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (a, b))

    def product(self, x: Tensor, mask: TextMask | None = None) -> Tensor:
        """Return (P, M, N); of scores without the start token's column, which is exact."""
        if mask is not None and mask.applies(x) and mask.drop_start and not mask.averages:
            x = x[..., 1:]
        x = x[..., self.constants :] if self.scores else x
        return x.reshape(-1, *x.shape[-2:])

    def lead(self, output: Tensor) -> torch.Size:
        """All axes but those of the product."""
        return output.shape[:-2]

    def unit_costs(self, errors: Tensor) -> Tensor:
        """Add up along each row: (P, M)."""
        return errors.sum(2)

    def unit_any(self, x: Tensor) -> Tensor:
        """Tell which rows matter: (P, M)."""
        return (x != 0).any(2)

    def elements(self, product: Tensor, matters: Tensor) -> Tensor:
        """Count those that are not zero: of scores the columns behind the end of a text do not count either."""
        return (product.count_nonzero(dim=2) * matters).sum()


ROWS, MAPS, PATCHES, PAIRS = RowLayout(), MapLayout(), PatchLayout(), PairLayout()
