"""Explicit counterparts of the attentions over feature maps of timm's MaxViT and CoAtNet (arXiv 2204.01697)."""

from typing import Any

from torch import Tensor, nn

from lit_clipq.models.attention.parts import make_linear, qualified_name, stack_linear
from lit_clipq.models.attention.relative import ExplicitRelative
from lit_clipq.nn.attention import QKVLinear


class ExplicitGridLast(ExplicitRelative):
    """Counterpart of `AttentionCl` of timm's MaxViT family (arXiv 2204.01697): feature maps with channels last."""

    @classmethod
    def convert(cls, module: Any) -> "ExplicitGridLast":
        """Convert `AttentionCl` or `Attention2d`; convolutions of one pixel become linear layers."""
        self = cls(
            projections={"qkv_proj": _stack_heads(module)},
            out_proj=make_linear(module.proj.weight.flatten(1), module.proj.bias),
            num_heads=module.num_heads,
            scale=module.scale,
            dropout=module.attn_drop.p,
            original=qualified_name(module),
        )
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.position = module.rel_pos
        self.out_drop = module.proj_drop
        return self

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Attend within maps (B, ..., D); see `ExplicitRelative.forward`."""
        out = super().forward(x.flatten(1, -2), shared_rel_pos)
        return out.unflatten(1, x.shape[1:-1])


class ExplicitGridFirst(ExplicitGridLast):
    """Counterpart of `Attention2d` of timm's MaxViT family: feature maps (B, C, h, w)."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Attend within maps (B, C, h, w); see `ExplicitRelative.forward`."""
        return super().forward(x.permute(0, 2, 3, 1), shared_rel_pos).permute(0, 3, 1, 2).contiguous()


def _stack_heads(module: Any) -> QKVLinear:
    """Return the projections with the rows of all queries first; some originals keep those of a head together."""
    rows = module.qkv.weight.flatten(1), module.qkv.bias
    parts = []
    for part in range(3):
        weight, bias = (None if x is None else _rows_of(x, module, part) for x in rows)
        parts.append((weight, bias))
    return stack_linear(parts)  # type: ignore[arg-type]


def _rows_of(x: Tensor, module: Any, part: int) -> Tensor:
    if not module.head_first:
        return x.chunk(3)[part]
    return x.unflatten(0, (module.num_heads, 3, module.dim_head))[:, part].flatten(0, 1)
