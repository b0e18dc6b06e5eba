"""Give the attention products of a causal text tower the start token's key and value as constants."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor

from lit_clipq.calibration.engine import Calibration, one_of_each_kind
from lit_clipq.distributed import gather
from lit_clipq.errors import CalibrationError
from lit_clipq.nn.modules import QModule
from lit_clipq.nn.start_token import StartTokenAverage, StartTokenScores

_ALIKE = 1e-3  # of the largest value: rounding, not another token


def keep_start_tokens(modules: Mapping[str, QModule], calibration: Calibration) -> None:
    """Run one batch of each kind in float and let the products keep what they see of the first position.

    All ranks take the constants of the first rank that saw a text, bit for bit.

    Args:
        modules: The text tower's attention products.
        calibration: With the float networks.

    Raises:
        CalibrationError: If the first position differs between texts, so that it is no constant.
    """
    varying: set[str] = set()

    def keep(name: str) -> Callable[[QModule, tuple[Tensor, ...]], None]:
        def hook(module: QModule, inputs: tuple[Tensor, ...]) -> None:
            if isinstance(module, StartTokenScores | StartTokenAverage):
                first = module.first_position(inputs[1])
                if (first - first[:1]).abs().max() > _ALIKE * first.abs().max():
                    varying.add(name)
                module.constant = first[:1].clone()

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(keep(name)).remove)
        for batch in one_of_each_kind(calibration.batches):
            calibration.forward(batch)
    own = {name: module.constant.cpu() for name, module in modules.items() if isinstance(module.constant, Tensor)}
    everyone = gather((own, sorted(varying)))
    different = [name for _, names in everyone for name in names]
    if different:
        raise CalibrationError(
            f"the start token's key or value in {different[0]} differs between calibration texts; give texts that all "
            "begin with the same token, or set start_token to false"
        )
    for name, module in modules.items():
        constant = next((constants[name] for constants, _ in everyone if name in constants), None)
        module.register_buffer("constant", None if constant is None else constant.to(calibration.device))
