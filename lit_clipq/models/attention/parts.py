"""Build the named parts of an explicit attention from the weights of another module."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.nn.attention import QKVLinear


def qualified_name(module: nn.Module) -> str:
    """Return `package.module.Class` of a module."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def stack_linear(parts: Sequence[tuple[Tensor, Tensor | None]]) -> QKVLinear:
    """Join projections of one input into a `QKVLinear`.

    Args:
        parts: Weight (out, in) and bias (out,) or None of each projection; a missing bias beside a given one is zero.

    Returns:
        A layer with copies of the weights, one segment for each part.
    """
    weights = [weight for weight, _ in parts]
    with_bias = any(bias is not None for _, bias in parts)
    layer = QKVLinear(
        weights[0].shape[1],
        [weight.shape[0] for weight in weights],
        bias=with_bias,
        device=weights[0].device,
        dtype=weights[0].dtype,
    )
    with torch.no_grad():
        layer.weight.copy_(torch.cat(weights))
        if with_bias:
            zeros = [weight.new_zeros(weight.shape[0]) for weight in weights]
            layer.bias.copy_(
                torch.cat([z if bias is None else bias for z, (_, bias) in zip(zeros, parts, strict=True)])
            )
    return layer.requires_grad_(weights[0].requires_grad)


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Make an `nn.Linear` with copies of `weight` (out, in) and `bias` (out,) or None."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer.requires_grad_(weight.requires_grad)


def stack_modules(*layers: nn.Module) -> QKVLinear:
    """Join `nn.Linear` layers of one input into a `QKVLinear`."""
    return stack_linear([(layer.weight, layer.bias) for layer in layers])  # type: ignore[misc]


def stack_qkv(module: Any) -> QKVLinear:
    """Join the projections of a timm attention: one `qkv` layer or three, with a bias in it or beside it."""
    if module.qkv is None:
        return stack_modules(module.q_proj, module.k_proj, module.v_proj)
    q_bias = getattr(module, "q_bias", None)
    bias = module.qkv.bias if q_bias is None else torch.cat([q_bias, torch.zeros_like(q_bias), module.v_bias])
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return stack_linear(list(zip(module.qkv.weight.chunk(3), biases, strict=True)))
