"""Explicit counterparts of timm's attentions; they keep the `forward` signature of the class they replace."""

from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.models.attention.parts import qualified_name, stack_linear, stack_qkv
from lit_clipq.nn.attention import ExplicitAttention, as_additive_mask, causal_mask


class ExplicitTimm(ExplicitAttention):
    """Counterpart of timm's `Attention`, `AttentionRope` and `EvaAttention`.

    q and k may be normalised and rotated (RoPE, arXiv 2104.09864; not the first `num_prefix_tokens` tokens), the output
    normalised and gated by a sigmoid of the input.
    """

    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    gate: nn.Module | None
    out_drop: nn.Module
    num_prefix_tokens: int
    rotate_half: bool

    @classmethod
    def convert(cls, module: Any) -> "ExplicitTimm":
        """Convert one of timm's self-attentions, with fused or separate projections."""
        self = cls(
            projections={"qkv_proj": stack_qkv(module)},
            out_proj=module.proj,
            num_heads=module.num_heads,
            scale=module.scale,
            dropout=module.attn_drop.p,
            original=qualified_name(module),
        )
        self.q_norm, self.k_norm = module.q_norm, module.k_norm
        self.norm = getattr(module, "norm", nn.Identity())
        self.gate = getattr(module, "gate", None)
        self.out_drop = module.proj_drop
        self.num_prefix_tokens = getattr(module, "num_prefix_tokens", 0)
        self.rotate_half = getattr(module, "rotate_half", False)
        return self

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend within `x`.

        Args:
            x: Shape (B, L, D).
            rope: Concatenated sines and cosines, (L - prefix, 2 * d), or None.
            attn_mask: Broadcastable to (B, H, L, L); True keeps, a float is added.
            is_causal: Hide later positions; takes precedence over `attn_mask`.

        Returns:
            Shape (B, L, D').
        """
        q, k, v = self.project(x, x, x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._rotate(q, rope).type_as(v), self._rotate(k, rope).type_as(v)
        mask = None
        if is_causal:
            mask = causal_mask(x.shape[1], q)
        elif attn_mask is not None:
            mask = as_additive_mask(attn_mask, q.dtype, true_means_masked=False)
        out = self.norm(self.merge(self.weights(q, k, mask), v))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.out_drop(self.out_proj(out))

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        """Rotate all but the prefix tokens of x (B, H, L, d)."""
        sin, cos = rope.chunk(2, dim=-1)
        prefix, rest = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        if self.rotate_half:
            first, second = rest.chunk(2, dim=-1)
            turned = torch.cat([-second, first], dim=-1)
        else:
            turned = torch.stack([-rest[..., 1::2], rest[..., ::2]], dim=-1).flatten(-2)
        return torch.cat([prefix, rest * cos + turned * sin], dim=2)


class ExplicitTimmPlain(ExplicitTimm):
    """Counterpart of timm's `Attention`, whose second positional argument is the mask."""

    def forward(  # type: ignore[override]
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend within `x`; see `ExplicitTimm.forward`."""
        return super().forward(x, None, attn_mask, is_causal)


class ExplicitPoolLatent(ExplicitAttention):
    """Counterpart of timm's `AttentionPoolLatent`: learned queries attend to the tokens (SigLIP's pooling head)."""

    latent: nn.Parameter
    pos_embed: nn.Parameter | None
    q_norm: nn.Module
    k_norm: nn.Module
    proj_drop: nn.Module
    norm: nn.Module
    mlp: nn.Module | None
    pool: str

    @classmethod
    def convert(cls, module: Any) -> "ExplicitPoolLatent":
        """Convert a `timm.layers.AttentionPoolLatent`."""
        key, value = module.kv.weight.chunk(2)
        biases = (None, None) if module.kv.bias is None else module.kv.bias.chunk(2)
        self = cls(
            projections={"q_proj": module.q, "kv_proj": stack_linear([(key, biases[0]), (value, biases[1])])},
            out_proj=module.proj,
            num_heads=module.num_heads,
            scale=module.scale,
            original=qualified_name(module),
        )
        self.latent, self.pos_embed = module.latent, module.pos_embed
        self.q_norm, self.k_norm = module.q_norm, module.k_norm
        self.proj_drop, self.norm, self.mlp = module.proj_drop, module.norm, module.mlp
        self.pool = module.pool
        return self

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Pool tokens.

        Args:
            x: Shape (B, L, D).
            attn_mask: Broadcastable to (B, H, latents, L); True keeps, a float is added.

        Returns:
            Shape (B, D'), or (B, latents, D') where the original does not pool its latents.
        """
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        q, k, v = self.project(self.latent.expand(x.shape[0], -1, -1), x, x)
        mask = None if attn_mask is None else as_additive_mask(attn_mask, q.dtype, true_means_masked=False)
        out = self.merge(self.weights(self.q_norm(q), self.k_norm(k), mask), v)
        out = self.proj_drop(self.out_proj(out))
        if self.mlp is not None:
            out = out + self.mlp(self.norm(out))
        if self.pool == "token":
            return out[:, 0]
        return out.mean(1) if self.pool == "avg" else out
