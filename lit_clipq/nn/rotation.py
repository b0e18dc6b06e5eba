"""A normalisation with a rotation of the features in front of it or behind it, in float."""

import torch
from torch import Tensor, nn


class RotatedNorm(nn.Module):
    """Computes `norm(x) R`, or `norm(x R)`: the border between features as they were and rotated ones.

    Attributes:
        norm: What stood there: a LayerNorm, or an identity.
        rotation: R, (width, width), in the type of the features.
        behind: Whether the rotation comes behind the normalisation.

    Args:
        norm: See above.
        rotation: See above.
        behind: See above.
    """

    rotation: Tensor

    def __init__(self, norm: nn.Module, rotation: Tensor, *, behind: bool) -> None:
        super().__init__()
        self.norm, self.behind = norm, behind
        self.register_buffer("rotation", rotation)
        self.training = norm.training

    def forward(self, x: Tensor) -> Tensor:
        """Compute it for features (*, width)."""
        return self.rotate(self.norm(x)) if self.behind else self.norm(self.rotate(x))

    def rotate(self, x: Tensor) -> Tensor:
        """Return `x R`."""
        return x @ self.rotation.to(x.dtype)

    def extra_repr(self) -> str:
        """Describe the module inside `print(model)`."""
        return f"width={len(self.rotation)}, behind={self.behind}"

    @classmethod
    def empty(cls, norm: nn.Module, width: int, *, behind: bool) -> "RotatedNorm":
        """Return one whose rotation is still to be loaded."""
        like = next(norm.parameters(), torch.empty(0))
        return cls(norm, torch.zeros(width, width, dtype=like.dtype, device=like.device), behind=behind)
