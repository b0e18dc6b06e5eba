"""Explicit counterpart of the self-attention of M2M-100 encoders (arXiv 2010.11125), the text towers of NLLB-CLIP."""

from typing import Any

from torch import Tensor

from lit_clipq.models.attention.parts import qualified_name, stack_modules
from lit_clipq.nn.attention import ExplicitAttention, as_additive_mask


class ExplicitM2M100(ExplicitAttention):
    """Counterpart of transformers' `M2M100Attention` in an encoder."""

    @classmethod
    def convert(cls, module: Any) -> "ExplicitM2M100":
        """Convert the self-attention of an encoder."""
        return cls(
            projections={"qkv_proj": stack_modules(module.q_proj, module.k_proj, module.v_proj)},
            out_proj=module.out_proj,
            num_heads=module.num_heads,
            scale=module.scaling,
            dropout=module.dropout,
            original=qualified_name(module),
        )

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: None = None,
        cache: None = None,
        attention_mask: Tensor | None = None,
        **kwargs: object,  # noqa: ARG002 - switches of other attention implementations
    ) -> tuple[Tensor, Tensor]:
        """Attend within a sequence.

        Args:
            hidden_states: Shape (B, L, D).
            key_value_states: Must be None.
            cache: Must be None.
            attention_mask: Broadcastable to (B, H, L, L); True keeps, a float is added.
            **kwargs: Ignored.

        Returns:
            Output (B, L, D) and weights (B, H, L, L).

        Raises:
            ValueError: When called as cross-attention or with a cache.
        """
        if key_value_states is not None or cache is not None:
            raise ValueError("the explicit attention of an encoder knows neither another sequence nor a cache")
        q, k, v = self.project(hidden_states, hidden_states, hidden_states)
        mask = None
        if attention_mask is not None:
            mask = as_additive_mask(attention_mask, q.dtype, true_means_masked=False)
        weights = self.weights(q, k, mask)
        return self.out_proj(self.merge(weights, v)), weights
