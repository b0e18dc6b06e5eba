"""Explicit counterparts of the attentions of open_clip's own towers, `torch.nn.MultiheadAttention` among them.

Each class keeps the `forward` signature of the class it replaces, so that the surrounding block calls it unchanged, and
has `convert`, which builds it from an instance of the original, sharing or copying its weights.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_clipq.models.attention.parts import make_linear, qualified_name, stack_linear, stack_modules
from lit_clipq.nn.attention import ExplicitAttention, as_additive_mask


class ExplicitMultihead(ExplicitAttention):
    """Counterpart of `torch.nn.MultiheadAttention`.

    Args:
        batch_first: Whether inputs are (B, L, D) instead of (L, B, D).
        **options: See `ExplicitAttention`.
    """

    def __init__(self, *, batch_first: bool, **options: Any) -> None:
        super().__init__(**options)
        self.batch_first = batch_first

    @classmethod
    def convert(cls, module: nn.MultiheadAttention, inputs: str) -> "ExplicitMultihead":
        """Convert a `torch.nn.MultiheadAttention`.

        Args:
            module: Without `add_bias_kv` and `add_zero_attn`.
            inputs: How the parent calls it: "self" (one input), "cross" (key and value are one) or "any".

        Returns:
            The explicit module.
        """
        width = module.embed_dim
        if module.in_proj_weight is not None:
            weights: Sequence[Tensor] = module.in_proj_weight.split(width)
        else:
            weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.split(width)
        parts = list(zip(weights, biases, strict=True))
        projections: dict[str, nn.Linear]
        if inputs == "self":
            projections = {"qkv_proj": stack_linear(parts)}
        elif inputs == "cross":
            projections = {"q_proj": make_linear(*parts[0]), "kv_proj": stack_linear(parts[1:])}
        else:
            projections = {
                name: make_linear(*part) for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True)
            }
        return cls(
            projections=projections,
            out_proj=make_linear(module.out_proj.weight, module.out_proj.bias),
            num_heads=module.num_heads,
            dropout=module.dropout,
            original=qualified_name(module),
            batch_first=module.batch_first,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; see `torch.nn.MultiheadAttention.forward`.

        Args:
            query: (B, Lq, D), or (Lq, B, D) without `batch_first`.
            key: (B, Lk, Dk), or (Lk, B, Dk).
            value: (B, Lk, Dv), or (Lk, B, Dv).
            key_padding_mask: (B, Lk); True hides a key, a float is added.
            need_weights: Whether to return the attention weights.
            attn_mask: (Lq, Lk) or (B * H, Lq, Lk); True hides, a float is added.
            average_attn_weights: Whether the returned weights are the mean over heads.
            is_causal: As in torch a hint that `attn_mask` is the causal mask, which must be given as well.

        Returns:
            Output in the layout of `query`, and weights (B, Lq, Lk) or (B, H, Lq, Lk), or None.

        Raises:
            ValueError: For inputs without a batch axis, or `is_causal` without a mask.
        """
        if query.dim() != 3:
            raise ValueError(f"expected a batched query of 3 axes, got shape {tuple(query.shape)}")
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint: give the causal mask as attn_mask as well")
        if not self.batch_first:
            query, key, value = _swap_batch(query, key, value)
        q, k, v = self.project(query, key, value)
        weights = self.weights(q, k, self._mask(attn_mask, key_padding_mask, q.dtype))
        out = self.out_proj(self.merge(weights, v))
        if not self.batch_first:
            out = out.transpose(0, 1)
        if not need_weights:
            return out, None
        return out, weights.mean(dim=1) if average_attn_weights else weights

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        mask = None
        if attn_mask is not None:
            mask = as_additive_mask(attn_mask, dtype, true_means_masked=True)
            if mask.dim() == 3:  # (B * H, Lq, Lk) -> (B, H, Lq, Lk)
                mask = mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = as_additive_mask(key_padding_mask, dtype, true_means_masked=True)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask


def _swap_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Swap the first two axes; inputs that are the same tensor stay the same tensor."""
    q = query.transpose(0, 1)
    k = q if key is query else key.transpose(0, 1)
    v = k if value is key else q if value is query else value.transpose(0, 1)
    return q, k, v


class ExplicitOpenClip(ExplicitAttention):
    """Counterpart of `open_clip.transformer.Attention`, with its variants.

    They are LayerNorm on q and k (arXiv 2106.04560), scaled cosine attention (arXiv 2111.09883), a learned scale of
    every head's output and a LayerNorm before the output projection (arXiv 2110.09456).
    """

    logit_scale: nn.Parameter | None
    logit_scale_max: float
    ln_q: nn.Module
    ln_k: nn.Module
    ln_inner: nn.Module
    head_scale: nn.Parameter | None
    out_drop: nn.Module

    @classmethod
    def convert(cls, module: Any) -> "ExplicitOpenClip":
        """Convert an `open_clip.transformer.Attention`."""
        width = module.in_proj_weight.shape[1]
        weights = module.in_proj_weight.split(width)
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.split(width)
        self = cls(
            projections={"qkv_proj": stack_linear(list(zip(weights, biases, strict=True)))},
            out_proj=module.out_proj,
            num_heads=module.num_heads,
            dropout=module.attn_drop.p,
            original=qualified_name(module),
        )
        self.logit_scale = module.logit_scale
        self.logit_scale_max = module.logit_scale_max
        self.ln_q, self.ln_k, self.ln_inner = module.ln_q, module.ln_k, module.ln_inner
        self.head_scale = module.head_scale
        self.out_drop = module.out_drop
        return self

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the attention weights; in scaled cosine attention unit q, times the learned scale, meets unit k."""
        if self.logit_scale is None:
            return super().weights(self.ln_q(q), self.ln_k(k), mask)
        logit_scale = torch.clamp(self.logit_scale, max=self.logit_scale_max).exp()
        scores = self.qk(F.normalize(q, dim=-1) * logit_scale, F.normalize(k, dim=-1).transpose(-2, -1))
        if mask is not None:
            scores = scores + mask
        return scores.softmax(dim=-1)

    def merge(self, weights: Tensor, v: Tensor) -> Tensor:
        """Average the values, scale the heads, put them side by side and normalise."""
        if self.head_scale is None:
            return self.ln_inner(super().merge(weights, v))
        x = self.av(self.attn_drop(weights), v) * self.head_scale
        return self.ln_inner(x.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Attend within `x`.

        Args:
            x: Shape (B, L, D).
            attn_mask: (L, L), (B * H, L, L) or (B, H, L, L); True hides, a float is added.

        Returns:
            Shape (B, L, D).
        """
        q, k, v = self.project(x, x, x)
        mask = None if attn_mask is None else as_additive_mask(attn_mask, q.dtype, true_means_masked=True)
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
        return self.out_drop(self.out_proj(self.merge(self.weights(q, k, mask), v)))


class ExplicitPool2d(ExplicitAttention):
    """Counterpart of open_clip's `AttentionPool2d`: the mean token attends to all tokens (CLIP's ResNets).

    The original computes every position's output and keeps the first; here only the first is computed.
    """

    positional_embedding: nn.Parameter

    @classmethod
    def convert(cls, module: Any) -> "ExplicitPool2d":
        """Convert an `open_clip.modified_resnet.AttentionPool2d`."""
        self = cls(
            projections={"q_proj": module.q_proj, "kv_proj": stack_modules(module.k_proj, module.v_proj)},
            out_proj=module.c_proj,
            num_heads=module.num_heads,
            scale=1.0 / math.sqrt(module.q_proj.out_features // module.num_heads),
            original=qualified_name(module),
        )
        self.positional_embedding = module.positional_embedding
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Pool a feature map (B, C, H, W) to (B, D)."""
        tokens = x.flatten(2).transpose(1, 2)  # (B, HW, C)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        q, k, v = self.project(tokens[:, :1], tokens, tokens)
        return self.out_proj(self.merge(self.weights(q, k), v))[:, 0]
