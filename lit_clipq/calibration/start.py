"""What attention products of a causal text tower see of the first position: the start token's key and value."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_clipq.calibration.passes import Observer
from lit_clipq.distributed import gather
from lit_clipq.errors import CalibrationError
from lit_clipq.nn.start_token import StartTokenAverage, StartTokenScores
from lit_clipq.nn.swap import Layer

_ALIKE = 1e-3  # of the largest value: rounding, not another token


class StartObserver(Observer):
    """Keeps the first key of products of queries and keys, and the first value of those of weights and values.

    Args:
        layers: The text tower's products of activations.
        averages: Names of those of weights and values.
        device: Where the constants are wanted.
    """

    whole_set = False

    def __init__(self, layers: Sequence[Layer], averages: set[str], device: torch.device) -> None:
        self.layers, self.averages, self.device = layers, averages, device
        self._own: dict[str, Tensor] = {}
        self._varying: set[str] = set()

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hook every product."""
        for layer in self.layers:
            yield layer.module.register_forward_pre_hook(self._keep(layer.name))

    def found(self) -> dict[str, Tensor]:
        """Return the constants by product; all ranks take those of the first one that saw a text, bit for bit.

        Raises:
            CalibrationError: If the first position differs between texts, so that it is no constant.
        """
        everyone = gather(({name: value.cpu() for name, value in self._own.items()}, sorted(self._varying)))
        different = [name for _, names in everyone for name in names]
        if different:
            raise CalibrationError(
                f"the start token's key or value in {different[0]} differs between calibration texts; give texts that "
                "all begin with the same token, or set start_token to false"
            )
        found: dict[str, Tensor] = {}
        for constants, _ in everyone:
            found = {**constants, **found}
        return {name: value.to(self.device) for name, value in found.items()}

    def _keep(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        first_position = (StartTokenAverage if name in self.averages else StartTokenScores).first_position

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self.looks:
                first = first_position(inputs[1])
                if (first - first[:1]).abs().max() > _ALIKE * first.abs().max():
                    self._varying.add(name)
                self._own[name] = first[:1].clone()

        return hook
