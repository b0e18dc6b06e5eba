"""Modules that own their state: buffers that calibration or a saved model brings are taken from a state dict."""

from typing import Any

from torch import Tensor, nn


class LateBuffers(nn.Module):
    """A module whose buffers are `None` until calibration, or until `load_state_dict` brings them."""

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name, buffer in self._buffers.items():
            value = state_dict.get(prefix + name)
            if buffer is None and value is not None and name not in self._non_persistent_buffers_set:
                self._buffers[name] = value.detach().clone()
        super()._load_from_state_dict(state_dict, prefix, *args)
