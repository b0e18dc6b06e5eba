"""Explicit counterpart of the self-attention of BERT-like Hugging Face text encoders."""

from typing import Any

from torch import Tensor, nn

from lit_clipq.models.attention.parts import qualified_name, stack_modules
from lit_clipq.nn.attention import ExplicitAttention, as_additive_mask


class ExplicitBert(ExplicitAttention):
    """Counterpart of transformers' `BertSelfAttention`, `RobertaSelfAttention` and `XLMRobertaSelfAttention`.

    Their output projection is a `Linear` of the next module, so `out_proj` is an identity here.
    """

    @classmethod
    def convert(cls, module: Any) -> "ExplicitBert":
        """Convert the self-attention of an encoder (not of a decoder)."""
        return cls(
            projections={"qkv_proj": stack_modules(module.query, module.key, module.value)},
            out_proj=nn.Identity(),
            num_heads=module.num_attention_heads,
            scale=module.scaling,
            dropout=module.dropout.p,
            original=qualified_name(module),
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        **kwargs: object,  # noqa: ARG002 - switches of other attention implementations
    ) -> tuple[Tensor, Tensor]:
        """Attend within a sequence.

        Args:
            hidden_states: Shape (B, L, D).
            attention_mask: Broadcastable to (B, H, L, L); True keeps, a float is added.
            past_key_values: Must be None.
            **kwargs: Ignored.

        Returns:
            Output (B, L, D) and weights (B, H, L, L).

        Raises:
            ValueError: When called with a cache of keys and values.
        """
        if past_key_values is not None:
            raise ValueError("the explicit attention of an encoder keeps no cache of keys and values")
        q, k, v = self.project(hidden_states, hidden_states, hidden_states)
        mask = None
        if attention_mask is not None:
            mask = as_additive_mask(attention_mask, q.dtype, true_means_masked=False)
        weights = self.weights(q, k, mask)
        return self.out_proj(self.merge(weights, v)), weights
