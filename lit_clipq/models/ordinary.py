"""Tensors made under `torch.inference_mode()` turned into ordinary ones, which gradients can be taken through."""

import torch
from torch import Tensor, nn


def leave_inference_mode(module: nn.Module) -> None:
    """Replace parameters and buffers made in inference mode by ordinary copies, in place; tied ones stay tied.

    A network loaded inside `torch.inference_mode()`, as notebooks do, computes, but may be neither changed in place nor
    differentiated outside of it.

    Example:
        >>> with torch.inference_mode():
        ...     layer = nn.Linear(2, 2)
        >>> leave_inference_mode(layer)
        >>> layer.weight.is_inference()
        False
    """
    copies: dict[Tensor, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and parameter.is_inference():
                    if parameter not in copies:
                        copies[parameter] = nn.Parameter(parameter.clone(), requires_grad=parameter.requires_grad)
                    part._parameters[name] = copies[parameter]  # type: ignore[assignment]
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.is_inference():
                    part._buffers[name] = copies.setdefault(buffer, buffer.clone())
