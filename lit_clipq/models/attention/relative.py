"""Explicit counterparts of timm's attentions with relative positions over a whole picture: BEiT and relative ViT."""

from typing import Any

from torch import Tensor, nn

from lit_clipq.models.attention.parts import qualified_name, stack_qkv
from lit_clipq.models.attention.positions import PositionBias
from lit_clipq.nn.attention import ExplicitAttention


class ExplicitRelative(ExplicitAttention):
    """Counterpart of timm's `RelPosAttention`: its own bias by position counts, else the one that it is called with."""

    q_norm: nn.Module
    k_norm: nn.Module
    position: nn.Module | None
    out_drop: nn.Module

    @classmethod
    def convert(cls, module: Any) -> "ExplicitRelative":
        """Convert a `timm.models.vision_transformer_relpos.RelPosAttention`."""
        self = cls._with_projections(module)
        self.q_norm, self.k_norm = module.q_norm, module.k_norm
        self.position = module.rel_pos
        return self

    @classmethod
    def _with_projections(cls, module: Any) -> Any:
        self = cls(
            projections={"qkv_proj": stack_qkv(module)},
            out_proj=module.proj,
            num_heads=module.num_heads,
            scale=module.scale,
            dropout=module.attn_drop.p,
            original=qualified_name(module),
        )
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.out_drop = module.proj_drop
        return self

    def bias(self, shared: Tensor | None) -> Tensor | None:
        """Return what is added to the scores, (1, H, N, N) or None."""
        return shared if self.position is None else self.position.get_bias()  # type: ignore[operator]

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Attend within `x`.

        Args:
            x: Shape (B, N, D).
            shared_rel_pos: (1, H, N, N), added to the scores, or None.

        Returns:
            Shape (B, N, D).
        """
        q, k, v = self.project(x, x, x)
        weights = self.weights(self.q_norm(q), self.k_norm(k), self.bias(shared_rel_pos))
        return self.out_drop(self.out_proj(self.merge(weights, v)))


class ExplicitBeit(ExplicitRelative):
    """Counterpart of the `Attention` of timm's BEiT (arXiv 2106.08254), whose two biases by position add up."""

    @classmethod
    def convert(cls, module: Any) -> "ExplicitBeit":
        """Convert a `timm.models.beit.Attention`."""
        self = cls._with_projections(module)
        table = module.relative_position_bias_table
        self.position = None if table is None else PositionBias(table, module.relative_position_index)
        return self  # type: ignore[no-any-return]

    def bias(self, shared: Tensor | None) -> Tensor | None:
        """Return the sum of the biases that there are, (1, H, N, N) or None."""
        own = super().bias(None)
        return shared if own is None else own if shared is None else own + shared

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Attend within `x`; see `ExplicitRelative.forward`."""
        return super().forward(x, shared_rel_pos_bias)
