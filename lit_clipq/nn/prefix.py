"""Attention products with a prefix: keys and values of registers, the same for every sample, kept as float constants.

Registers are tokens that are not there. Every query may attend to them, as if they stood in front of the others; what
they add to scores and averages is computed in float, so that the grids of the product never see them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lit_clipq.nn.state import LateBuffers


class Prefixed(LateBuffers):
    """A product of activations that may have a prefix.

    Attributes:
        prefix_keys: Keys of r registers in a product of queries and keys, (1, H, d, r), or `None`.
        prefix_values: Their values in a product of attention weights and values, (1, H, r, d), or `None`.
    """

    prefix_keys: Tensor | None
    prefix_values: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("prefix_keys", None)
        self.register_buffer("prefix_values", None)

    @property
    def prefix_size(self) -> int:
        """How many registers there are."""
        if self.prefix_keys is not None:
            return self.prefix_keys.shape[-1]
        return 0 if self.prefix_values is None else self.prefix_values.shape[-2]

    def with_prefix(self, a: Tensor, b: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the product with what the registers add.

        Args:
            a: Queries (B, H, L, d), or attention weights (B, H, L, r + L), those of the registers first.
            b: Keys (B, H, d, L), or values (B, H, L, d).
            product: Computes the product of what is not of registers.

        Returns:
            Scores (B, H, L, r + L), or averages (B, H, L, d).
        """
        if self.prefix_keys is not None:
            return torch.cat([a @ self.prefix_keys.to(a.dtype), product(a, b)], dim=-1)
        values = self.prefix_values
        assert values is not None  # noqa: S101 - there is a prefix
        r = values.shape[-2]
        return product(a[..., r:], b) + a[..., :r] @ values.to(a.dtype)
