"""Explicit counterpart of the self-attention of T5-like encoders (arXiv 1910.10683)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.models.attention.parts import qualified_name, stack_modules
from lit_clipq.nn.attention import ExplicitAttention, as_additive_mask


class ExplicitT5(ExplicitAttention):
    """Counterpart of transformers' `T5Attention` and `MT5Attention` in an encoder.

    Scores are not scaled. The first layer owns a bias by relative position and hands it on to the others.
    """

    relative_attention_bias: nn.Module | None
    max_distance: int

    @classmethod
    def convert(cls, module: Any) -> "ExplicitT5":
        """Convert the self-attention of an encoder."""
        self = cls(
            projections={"qkv_proj": stack_modules(module.q, module.k, module.v)},
            out_proj=module.o,
            num_heads=module.n_heads,
            scale=module.scaling,
            dropout=module.dropout,
            original=qualified_name(module),
        )
        self.relative_attention_bias = getattr(module, "relative_attention_bias", None)
        self.max_distance = module.relative_attention_max_distance
        return self

    def position_bias(self, length: int, like: Tensor) -> Tensor:
        """Return the bias (1, H, L, L), zero in layers that own none."""
        if self.relative_attention_bias is None:
            return like.new_zeros(1, self.num_heads, length, length)
        table: Any = self.relative_attention_bias
        place = torch.arange(length, device=like.device)
        rows = relative_buckets(place[None, :] - place[:, None], table.num_embeddings, self.max_distance)
        return table(rows).permute(2, 0, 1).unsqueeze(0)  # type: ignore[no-any-return]

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: None = None,
        position_bias: Tensor | None = None,
        cache: None = None,
        **kwargs: object,  # noqa: ARG002 - switches of other attention implementations
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend within a sequence.

        Args:
            hidden_states: Shape (B, L, D).
            mask: Broadcastable to (B, H, L, L); True keeps, a float is added.
            key_value_states: Must be None.
            position_bias: What the first layer returned; None there.
            cache: Must be None.
            **kwargs: Ignored.

        Returns:
            Output (B, L, D), position bias (1, H, L, L) and weights (B, H, L, L).

        Raises:
            ValueError: When called as cross-attention or with a cache.
        """
        if key_value_states is not None or cache is not None:
            raise ValueError("the explicit attention of an encoder knows neither another sequence nor a cache")
        q, k, v = self.project(hidden_states, hidden_states, hidden_states)
        if position_bias is None:
            position_bias = self.position_bias(hidden_states.shape[1], q)
        bias = position_bias
        if mask is not None:
            bias = bias + as_additive_mask(mask, q.dtype, true_means_masked=False)
        weights = self.weights(q, k, bias)
        return self.out_proj(self.merge(weights, v)), position_bias, weights


def relative_buckets(distance: Tensor, count: int, max_distance: int) -> Tensor:
    """Number relative positions in both directions: near ones one by one, far ones by the logarithm.

    Of the `count` numbers half belong to keys behind the query. In each half the first half is for single distances
    0, 1, ..., the rest grows geometrically up to `max_distance`, from where on all share the last.

    Args:
        distance: int64, place of the key minus place of the query.
        count: Number of buckets.
        max_distance: In tokens.

    Returns:
        int64 of the same shape, 0 .. count - 1.

    Example:
        >>> relative_buckets(torch.tensor([-200, -3, 0, 3, 200]), 32, 128).tolist()
        [15, 3, 0, 19, 31]
    """
    half = count // 2
    exact = half // 2
    far = distance.abs()
    log = torch.log(far.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    grown = (exact + (log * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(far < exact, far, grown) + half * (distance > 0)
