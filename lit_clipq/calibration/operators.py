"""Multiply-accumulates of every matrix product that runs, whichever operator computes it.

torch's own `FlopCounterMode` follows modules with gradient hooks, which fail on a view of a Parameter that was taken
without gradients, and has no formula for the fused attentions of the CPU and of `nn.MultiheadAttention`.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Formula = Callable[..., int]
"""Multiply-accumulates of one call, from the arguments of the operator and its output."""


class OperatorCount(TorchDispatchMode):
    """Count while the context is open, with gradients, without, or in inference mode.

    Masks and causality are not taken off: a hidden score costs its product all the same. Operators without a formula
    are taken apart where torch can, and count as nothing where it cannot.

    Attributes:
        macs: Multiply-accumulates so far.

    Example:
        >>> with OperatorCount() as count:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
        >>> count.macs
        24
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator and add what it multiplies."""
        kwargs = kwargs or {}
        formula = FORMULAS.get(getattr(func, "_overloadpacket", None))
        if formula is None:
            with self:  # in inference mode operators arrive here whole
                result = func.decompose(*args, **kwargs) if hasattr(func, "decompose") else NotImplemented
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None:
            self.macs += formula(*args, **kwargs, out=result)
        return result


def _product(a: Tensor, b: Tensor, **_: Any) -> int:  # (..., m, k) x (..., k, n)
    return a.numel() * b.shape[-1]


def _vector_product(a: Tensor, *_: Any, **__: Any) -> int:  # (m, k) x (k) or (k) x (k)
    return a.numel()


def _added_product(_: Tensor, a: Tensor, b: Tensor, **__: Any) -> int:
    return a.numel() * b.shape[-1]


def _added_vector_product(_: Tensor, a: Tensor, *__: Any, **___: Any) -> int:
    return a.numel()


def _linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return x.numel() * weight.shape[0]


def _convolution(x: Tensor, weight: Tensor, *args: Any, out: Tensor, **options: Any) -> int:
    transposed = options.get("transposed", args[4] if len(args) > 4 else False)
    if transposed:
        return x.numel() * prod(weight.shape[1:])
    return out.numel() * prod(weight.shape[1:])


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:  # (..., L, d), (..., S, d), (..., S, dv)
    return q.numel() // q.shape[-1] * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _multihead(*args: Any, **options: Any) -> int:
    """`nn.MultiheadAttention` in one operator."""
    given = {**dict(zip(_MULTIHEAD, args, strict=False)), **options}
    query, key, width = given["query"], given["key"], given["embed_dim"]
    projected = (query.numel() + key.numel() + given["value"].numel()) * width
    scores_and_average = 2 * query.shape[0] * query.shape[1] * key.shape[1] * width
    return projected + scores_and_average + query.shape[0] * query.shape[1] * given["proj_weight"].numel()


def _encoder_layer(*args: Any, **options: Any) -> int:
    """`nn.TransformerEncoderLayer` in one operator."""
    given = {**dict(zip(_ENCODER_LAYER, args, strict=False)), **options}
    src = given["src"]
    attention = _multihead(query=src, key=src, value=src, **{n: given[n] for n in ("embed_dim", "proj_weight")})
    return attention + src.shape[0] * src.shape[1] * (given["ffn_weight_1"].numel() + given["ffn_weight_2"].numel())


_MULTIHEAD = ("query", "key", "value", "embed_dim", "num_head", "qkv_weight", "qkv_bias", "proj_weight")
_ENCODER_LAYER = (
    *("src", "embed_dim", "num_heads", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "use_gelu", "norm_first"),
    *("eps", "norm_weight_1", "norm_bias_1", "norm_weight_2", "norm_bias_2"),
    *("ffn_weight_1", "ffn_bias_1", "ffn_weight_2", "ffn_bias_2"),
)
_aten = torch.ops.aten
_BY_NAME: dict[str, Formula] = {
    "mm": _product,
    "bmm": _product,
    "_int_mm": _product,
    "_scaled_mm": _product,
    "addmm": _added_product,
    "_addmm_activation": _added_product,
    "baddbmm": _added_product,
    "addbmm": _added_product,
    "mv": _vector_product,
    "dot": _vector_product,
    "vdot": _vector_product,
    "addmv": _added_vector_product,
    "mkldnn_linear": _linear,
    "convolution": _convolution,
    "_convolution": _convolution,
    "convolution_overrideable": _convolution,
    "cudnn_convolution": _convolution,
    "mkldnn_convolution": _convolution,
    "_slow_conv2d_forward": _convolution,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_attention_math_for_mps": _attention,
    "_native_multi_head_attention": _multihead,
    "_triton_multi_head_attention": _multihead,
    "_transformer_encoder_layer_fwd": _encoder_layer,
}
FORMULAS: dict[Any, Formula] = {
    getattr(_aten, name): formula for name, formula in _BY_NAME.items() if hasattr(_aten, name)
}
"""Operator packet -> formula, for the operators that this torch has."""
