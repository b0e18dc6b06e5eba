"""Explicit counterpart of the attention of timm's FastViT (arXiv 2303.14189), the image towers of MobileCLIP-S."""

from typing import Any

from torch import Tensor, nn

from lit_clipq.models.attention.parts import qualified_name, stack_qkv
from lit_clipq.nn.attention import ExplicitAttention


class ExplicitFastVit(ExplicitAttention):
    """Counterpart of the `Attention` of timm's FastViT: all places of a feature map attend to each other."""

    out_drop: nn.Module

    @classmethod
    def convert(cls, module: Any) -> "ExplicitFastVit":
        """Convert a `timm.models.fastvit.Attention`."""
        self = cls(
            projections={"qkv_proj": stack_qkv(module)},
            out_proj=module.proj,
            num_heads=module.num_heads,
            scale=module.scale,
            dropout=module.attn_drop.p,
            original=qualified_name(module),
        )
        self.out_drop = module.proj_drop
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Attend within feature maps (B, C, h, w); returns the same shape."""
        tokens = x.flatten(2).transpose(1, 2)  # (B, h * w, C)
        q, k, v = self.project(tokens, tokens, tokens)
        out = self.out_drop(self.out_proj(self.merge(self.weights(q, k), v)))
        return out.transpose(1, 2).reshape(x.shape)  # type: ignore[no-any-return]
