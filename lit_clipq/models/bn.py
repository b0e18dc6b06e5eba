"""Fold BatchNorm into the convolution before it."""

import logging
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from lit_clipq.errors import ModelError
from lit_clipq.models.attention.parts import qualified_name
from lit_clipq.models.ordinary import leave_inference_mode

logger = logging.getLogger(__name__)

# Classes whose `forward` is known to call each normalisation right after the convolution named with it.
_PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "open_clip.modified_resnet.ModifiedResNet": (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")),
    "open_clip.modified_resnet.Bottleneck": (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")),
    "timm.models.resnet.ResNet": (("conv1", "bn1"),),
    "timm.models.resnet.BasicBlock": (("conv1", "bn1"), ("conv2", "bn2")),
    "timm.models.resnet.Bottleneck": (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")),
}


def fold_batchnorm(model: nn.Module) -> int:
    """Fold every BatchNorm2d whose convolution is known into that convolution, in place.

    In eval mode the pair computes gamma (W * x + b - mean) / sqrt(var + eps) + beta: a convolution with the weight
    W gamma / sqrt(var + eps) (arXiv 1712.05877, section 3.2). The factors are computed in float64. The pairs are those
    of CLIP's ModifiedResNet, of timm's ResNet, and neighbours within an `nn.Sequential`; other BatchNorms stay and are
    logged.

    Args:
        model: A model in eval mode.

    Returns:
        Number of BatchNorm layers folded; each is now an `nn.Identity`.

    Raises:
        ModelError: Where a BatchNorm to fold is in train mode or has non-finite statistics.
    """
    leave_inference_mode(model)
    folded = 0
    for path, parent in list(model.named_modules()):
        for conv, owner, name in list(_pairs(parent)):
            _fold(conv, getattr(owner, name), f"{path}.{name}" if path else name)
            setattr(owner, name, nn.Identity())
            folded += 1
    left = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    if left:
        logger.info("%d BatchNorm layers stay, no convolution is known to precede them: %s", len(left), ", ".join(left))
    return folded


def _pairs(parent: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.Module, str]]:
    """Yield convolution, owner and name of the foldable BatchNorms directly inside one module."""
    if type(parent) is nn.Sequential:
        children = list(parent.named_children())
        named: list[tuple[Any, str]] = [(first, name) for (_, first), (name, _) in pairwise(children)]
    else:
        names = _PAIRS.get(qualified_name(parent), ())
        named = [(getattr(parent, conv, None), name) for conv, name in names]
    for first, name in named:
        conv = (
            first[-1] if type(first) is nn.Sequential and len(first) else first
        )  # a deep stem ends in its convolution
        norm = getattr(parent, name, None)
        if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.track_running_stats:
            yield conv, parent, name


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d, name: str) -> None:
    if norm.training:
        raise ModelError(
            f"expected a model in eval mode to fold BatchNorm, but {name} is in train mode; call model.eval()"
        )
    mean, var = norm.running_mean.double(), norm.running_var.double()  # type: ignore[union-attr]
    factor = torch.rsqrt(var + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    bias = -mean if conv.bias is None else conv.bias.double() - mean
    bias = bias * factor if norm.bias is None else bias * factor + norm.bias.double()
    if not (torch.isfinite(factor).all() and torch.isfinite(bias).all()):
        raise ModelError(f"BatchNorm {name} has non-finite statistics or weights; the checkpoint is damaged")
    weight = conv.weight.double() * factor.view(-1, 1, 1, 1)
    conv.weight.copy_(weight.to(conv.weight.dtype))
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
