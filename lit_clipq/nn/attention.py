"""Attention written out: projections, QK^T, softmax, attention x V, each a named module.

The fused attentions of torch, open_clip and timm compute their products inside one operator, out of reach of hooks
and of quantization. `ExplicitAttention` computes the same function from parts that can be swapped one by one.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lit_clipq.nn.matmul import MatMul


class QKVLinear(nn.Linear):
    """Linear layer whose output rows are several projections of one input, computed in one product.

    Attributes:
        segments: Output features of each projection, in order; they add up to `out_features`.

    Args:
        in_features: Size of the shared input.
        segments: Output features of each projection (query, key, value; or key, value).
        bias: Whether the layer adds a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Example:
        >>> layer = QKVLinear(8, (8, 8, 4))
        >>> [part.shape[-1] for part in layer(torch.zeros(2, 3, 8)).split(layer.segments, dim=-1)]
        [8, 8, 4]
    """

    segments: tuple[int, ...]

    def __init__(
        self,
        in_features: int,
        segments: Sequence[int],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, sum(segments), bias=bias, device=device, dtype=dtype)
        self.segments = tuple(segments)

    def extra_repr(self) -> str:
        """Describe the layer inside `print(model)`."""
        return f"{super().extra_repr()}, segments={self.segments}"


class Projection(nn.Linear):
    """Bias-free projection that also answers `x @ projection`.

    open_clip keeps `visual.proj` and `text_projection` as bare Parameters of shape (width, embed) used with `@`. A
    `Projection` put in their place is a named layer, and open_clip's own `x @ self.proj` still works.

    Args:
        in_features: Width of the tower.
        out_features: Size of the embedding.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Example:
        >>> layer = Projection(8, 4)
        >>> x = torch.ones(2, 8)
        >>> torch.equal(x @ layer, layer(x))
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)

    @classmethod
    def from_parameter(cls, weight: Tensor) -> "Projection":
        """Make a projection that computes `x @ weight`.

        Args:
            weight: Shape (in_features, out_features), as open_clip stores it.

        Returns:
            A layer with a contiguous copy of `weight.T`.
        """
        layer = cls(weight.shape[0], weight.shape[1], device=weight.device, dtype=weight.dtype)
        layer.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
        return layer

    def __rmatmul__(self, x: Tensor) -> Tensor:
        """Compute `x @ self`: `x` has shape (..., in_features), the result (..., out_features)."""
        return self(x)


class ExplicitAttention(nn.Module):
    """Scaled dot-product attention, softmax(scale * Q K^T + mask) V, with every product a named child.

    Children are one of three sets of projections, then `qk`, `av` and `out_proj`:

    - `qkv_proj` (`QKVLinear` of three segments) where query, key and value are projected from the same input,
    - `q_proj` and `kv_proj` (`QKVLinear` of two segments) where key and value share theirs,
    - `q_proj`, `k_proj`, `v_proj` otherwise.

    The scale is multiplied into q before `qk`, and the mask is added after it. This class holds what all attentions
    share; subclasses keep the calling convention of the class they replace. Equation 1 of arXiv 1706.03762.

    Args:
        projections: The input projections by name, one of the three sets above.
        out_proj: Output projection, or an identity.
        num_heads: Number of heads H; every segment is divisible by it.
        scale: Factor on q; None means head_dim ** -0.5.
        dropout: Probability of dropping an attention weight, in train mode only.
        original: Qualified name of the class that this module replaces, for reports.

    Raises:
        ValueError: Where the names of the projections are none of the three sets.
    """

    hands_on_values: ClassVar[bool] = False
    """Whether others than `av` get to see the values, in a cache."""
    qkv_proj: nn.Module
    q_proj: nn.Module
    kv_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def __init__(
        self,
        projections: Mapping[str, nn.Linear],
        out_proj: nn.Module,
        num_heads: int,
        scale: float | None = None,
        dropout: float = 0.0,
        original: str = "",
    ) -> None:
        super().__init__()
        if set(projections) not in ({"qkv_proj"}, {"q_proj", "kv_proj"}, {"q_proj", "k_proj", "v_proj"}):
            raise ValueError(f"projections must be qkv_proj, q_proj + kv_proj or q/k/v_proj, got {sorted(projections)}")
        for name, projection in projections.items():
            self.add_module(name, projection)
        self.num_heads = num_heads
        self.scale = scale if scale is not None else (_query_features(projections) // num_heads) ** -0.5
        self.original = original
        self.qk = MatMul()
        self.attn_drop = nn.Dropout(dropout)
        self.av = MatMul()
        self.out_proj = out_proj

    def extra_repr(self) -> str:
        """Describe the module inside `print(model)`."""
        return f"num_heads={self.num_heads}, scale={self.scale:.6g}, original={self.original}"

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project the inputs and split them into heads.

        Args:
            query: Shape (B, Lq, Dq).
            key: Shape (B, Lk, Dk).
            value: Shape (B, Lk, Dv).

        Returns:
            q (B, H, Lq, d), k (B, H, Lk, d) and v (B, H, Lk, dv), contiguous.

        Raises:
            ValueError: Where the inputs differ although one projection serves several of them.
        """
        if "qkv_proj" in self._modules:
            if key is not query or value is not query:
                raise ValueError("this attention projects q, k and v from one input, but was called with several")
            q, k, v = self._split(self.qkv_proj, query)
            return q, k, v
        (q,) = self._split(self.q_proj, query)
        if "kv_proj" in self._modules:
            if value is not key:
                raise ValueError("this attention projects k and v from one input, but was called with two")
            k, v = self._split(self.kv_proj, key)
        else:
            (k,), (v,) = self._split(self.k_proj, key), self._split(self.v_proj, value)
        return q, k, v

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the attention weights, softmax(scale * q k^T + mask).

        Args:
            q: Shape (B, H, Lq, d).
            k: Shape (B, H, Lk, d).
            mask: Floating mask to add, broadcastable to (B, H, Lq, Lk), or None.

        Returns:
            Shape (B, H, Lq, Lk); rows add up to 1.
        """
        scores = self.qk(q * self.scale, k.transpose(-2, -1))
        if mask is not None:
            scores = scores + mask
        return scores.softmax(dim=-1)

    def merge(self, weights: Tensor, v: Tensor) -> Tensor:
        """Average the values and put the heads side by side.

        Args:
            weights: Shape (B, H, Lq, Lk).
            v: Shape (B, H, Lk, dv).

        Returns:
            Shape (B, Lq, H * dv), before the output projection.
        """
        return self.av(self.attn_drop(weights), v).transpose(1, 2).flatten(2)

    def _split(self, projection: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """Apply a projection to (B, L, D); one (B, H, L, d) for each of its segments, in a single copy where it can."""
        out = projection(x)
        segments: tuple[int, ...] = getattr(projection, "segments", (out.shape[-1],))
        if len(set(segments)) > 1:
            parts = out.split(segments, dim=-1)
            return tuple(part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).contiguous() for part in parts)
        # (B, L, S * D) -> (S, B, H, L, d)
        heads = out.unflatten(-1, (len(segments), self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return heads.contiguous().unbind(0)


def _query_features(projections: Mapping[str, nn.Linear]) -> int:
    joint = projections.get("qkv_proj")
    return joint.segments[0] if isinstance(joint, QKVLinear) else projections["q_proj"].out_features


def as_additive_mask(mask: Tensor, dtype: torch.dtype, *, true_means_masked: bool) -> Tensor:
    """Turn a boolean mask into one that is added to the scores; pass a floating mask on in the given type.

    Args:
        mask: Any shape, boolean or floating.
        dtype: Type of the scores.
        true_means_masked: torch's `MultiheadAttention` and open_clip hide positions that are True; timm and
            `scaled_dot_product_attention` keep them.

    Returns:
        A floating mask of the same shape: 0 where attention is allowed, -inf where it is not.
    """
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    hidden = mask if true_means_masked else ~mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(hidden, float("-inf"))


def causal_mask(length: int, like: Tensor) -> Tensor:
    """Build the additive mask (length, length) that hides later positions, with the type and device of `like`."""
    return like.new_full((length, length), float("-inf")).triu_(1)
