"""Explicit counterpart of GPT-2's attention, and of its transposed linear layers."""

from typing import Any

from torch import Tensor, nn

from lit_clipq.models.attention.parts import make_linear, qualified_name, stack_linear
from lit_clipq.nn.attention import ExplicitAttention, as_additive_mask, causal_mask

CONV1D = "transformers.pytorch_utils.Conv1D"
"""A linear layer whose weight is (in, out)."""


class ExplicitGPT2(ExplicitAttention):
    """Counterpart of transformers' `GPT2Attention`: causal, with a cache of keys and values."""

    hands_on_values = True
    layer_idx: int
    resid_dropout: nn.Module

    @classmethod
    def convert(cls, module: Any) -> "ExplicitGPT2":
        """Convert a self-attention that neither reorders nor upcasts its product."""
        weights = module.c_attn.weight.t().split(module.split_size)
        biases = module.c_attn.bias.split(module.split_size)
        self = cls(
            projections={"qkv_proj": stack_linear(list(zip(weights, biases, strict=True)))},
            out_proj=linear_from_conv1d(module.c_proj),
            num_heads=module.num_heads,
            scale=module.scaling,
            dropout=module.attn_dropout.p,
            original=qualified_name(module),
        )
        self.layer_idx = module.layer_idx
        self.resid_dropout = module.resid_dropout
        return self

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: object,  # noqa: ARG002 - switches of other attention implementations
    ) -> tuple[Tensor, Tensor]:
        """Attend to what came before.

        Args:
            hidden_states: Shape (B, L, D).
            past_key_values: transformers' cache, which the new keys and values are added to, or None.
            attention_mask: Broadcastable to (B, H, L, T + L); True keeps, a float is added. Without one the mask is
                causal.
            cache: What transformers 5.24 and later call `past_key_values`.
            **kwargs: Ignored.

        Returns:
            Output (B, L, D) and weights (B, H, L, T + L).
        """
        q, k, v = self.project(hidden_states, hidden_states, hidden_states)
        kept = past_key_values if cache is None else cache
        if kept is not None:
            k, v = kept.update(k, v, self.layer_idx)
        if attention_mask is None:
            mask = causal_mask(k.shape[2], q)[-q.shape[2] :]
        else:
            mask = as_additive_mask(attention_mask, q.dtype, true_means_masked=False)
        weights = self.weights(q, k, mask)
        return self.resid_dropout(self.out_proj(self.merge(weights, v))), weights


def linear_from_conv1d(module: Any) -> nn.Linear:
    """Return an `nn.Linear` that computes what a `Conv1D` does."""
    return make_linear(module.weight.t(), module.bias)
