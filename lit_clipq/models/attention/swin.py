"""Explicit counterparts of the window attentions of Swin (arXiv 2103.14030) and Swin V2 (arXiv 2111.09883)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_clipq.models.attention.parts import qualified_name, stack_qkv
from lit_clipq.models.attention.positions import PositionBias
from lit_clipq.nn.attention import ExplicitAttention


class ExplicitWindow(ExplicitAttention):
    """Counterpart of the `WindowAttention` of timm's Swin: attention within windows, with a bias by position."""

    position: PositionBias
    out_drop: nn.Module

    @classmethod
    def convert(cls, module: Any) -> "ExplicitWindow":
        """Convert the attention of Swin's first version."""
        self = cls._with_projections(module, module.scale)
        self.position = PositionBias(module.relative_position_bias_table, module.relative_position_index)
        return self

    @classmethod
    def _with_projections(cls, module: Any, scale: float) -> Any:
        self = cls(
            projections={"qkv_proj": stack_qkv(module)},
            out_proj=module.proj,
            num_heads=module.num_heads,
            scale=scale,
            dropout=module.attn_drop.p,
            original=qualified_name(module),
        )
        self.out_drop = module.proj_drop
        return self

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Compute the scores (B, H, N, N) before bias and mask."""
        return self.qk(q * self.scale, k.transpose(-2, -1))

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the attention weights; `mask` (windows, N, N) hides the neighbours of shifted windows."""
        bias = self.position.get_bias()
        if mask is not None:
            bias = bias + mask[:, None]  # (windows, H, N, N)
        scores = self.scores(q, k)
        return (scores.unflatten(0, (-1, len(bias))) + bias).flatten(0, 1).softmax(dim=-1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within windows.

        Args:
            x: Shape (B * windows, N, D).
            mask: (windows, N, N), added to the scores, or None.

        Returns:
            Shape (B * windows, N, D).
        """
        q, k, v = self.project(x, x, x)
        return self.out_drop(self.out_proj(self.merge(self.weights(q, k, mask), v)))  # type: ignore[no-any-return]


class ExplicitWindowV2(ExplicitWindow):
    """Counterpart of the `WindowAttention` of timm's Swin V2: cosines of q and k, times a learned scale.

    The bias that the original computes from coordinates in every forward pass is a table here.
    """

    logit_scale: nn.Parameter

    @classmethod
    def convert(cls, module: Any) -> "ExplicitWindowV2":
        """Convert the attention of Swin's second version."""
        self = cls._with_projections(module, 1.0)
        self.logit_scale = module.logit_scale
        with torch.no_grad():
            table = 16 * torch.sigmoid(module.cpb_mlp(module.relative_coords_table).reshape(-1, module.num_heads))
        self.position = PositionBias(table.clone(), module.relative_position_index)
        return self  # type: ignore[no-any-return]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Compute the scaled cosines (B, H, N, N)."""
        scale = self.logit_scale.clamp(max=math.log(100)).exp()
        return self.qk(F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1).transpose(-2, -1))
