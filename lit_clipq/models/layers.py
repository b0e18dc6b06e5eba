"""Subclasses of torch's layers that compute something else, taken apart into torch's own layers.

A quantized layer computes what its float type computes. A subclass with a `forward` of its own (padding by input size,
standardised weights, a scaled table) must therefore become torch's layer and what it adds, or stay float.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_clipq.models.attention.parts import qualified_name


class SamePad2d(nn.Module):
    """Zero padding after which a convolution gives ceil(size / stride) places, the odd one at the end.

    Args:
        kernel_size: Of the convolution that follows, height and width.
        stride: Of that convolution.
        dilation: Of that convolution.

    Example:
        >>> SamePad2d((3, 3), (2, 2), (1, 1))(torch.zeros(1, 1, 8, 7)).shape
        torch.Size([1, 1, 9, 9])
    """

    def __init__(self, kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation

    def forward(self, x: Tensor) -> Tensor:
        """Pad a feature map (B, C, h, w)."""
        missing = [
            max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
            for size, k, s, d in zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True)
        ]
        sides = [(total // 2, total - total // 2) for total in reversed(missing)]
        return F.pad(x, [pixels for side in sides for pixels in side])

    def extra_repr(self) -> str:
        """Describe the module inside `print(model)`."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"


def make_plain(module: nn.Module) -> None:
    """Replace the children of one module that are known subclasses of torch's layers; outputs stay the same."""
    for name, child in list(module.named_children()):
        convert = _CONVERTERS.get(qualified_name(child))
        if convert is not None:
            setattr(module, name, convert(child).train(child.training))


def _plain_linear(layer: Any) -> nn.Module:
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


def _plain_conv(layer: Any) -> nn.Conv2d:
    options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
    plain = nn.Conv2d(*sizes, **options, bias=layer.bias is not None, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


def _same_conv(layer: Any) -> nn.Module:
    return nn.Sequential(SamePad2d(layer.kernel_size, layer.stride, layer.dilation), _plain_conv(layer))


@torch.no_grad()
def _standardised_conv(layer: Any) -> nn.Module:
    """Give each filter mean 0 and variance 1, times its gain (arXiv 1903.10520, 2101.08692); computed in float64."""
    weight = layer.weight.double()
    variance, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True, correction=0)
    weight = (weight - mean) * torch.rsqrt(variance + layer.eps)
    if hasattr(layer, "gain"):
        weight = weight * layer.gain.double() * layer.scale
    plain = _plain_conv(layer)
    plain.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    if not getattr(layer, "same_pad", False):
        return plain
    return nn.Sequential(SamePad2d(layer.kernel_size, layer.stride, layer.dilation), plain)


@torch.no_grad()
def _scaled_table(layer: Any) -> nn.Module:
    weight = nn.Parameter(layer.weight * layer.embed_scale, requires_grad=layer.weight.requires_grad)
    plain = nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
    plain.weight = weight
    return plain


_CONVERTERS: dict[str, Callable[[Any], nn.Module]] = {
    "timm.layers.linear.Linear": _plain_linear,
    "timm.layers.conv2d_same.Conv2dSame": _same_conv,
    "timm.layers.std_conv.StdConv2d": _standardised_conv,
    "timm.layers.std_conv.StdConv2dSame": _standardised_conv,
    "timm.layers.std_conv.ScaledStdConv2d": _standardised_conv,
    "timm.layers.std_conv.ScaledStdConv2dSame": _standardised_conv,
    "transformers.models.m2m_100.modeling_m2m_100.M2M100ScaledWordEmbedding": _scaled_table,
}
