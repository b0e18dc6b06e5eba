"""How many bytes a network takes when it is stored."""

from torch import nn

from lit_clipq.functional.packing import packed_size
from lit_clipq.nn.modules import QWeighted


def stored_bytes(module: nn.Module) -> int:
    """Count the bytes of a network's state: parameters and persistent buffers, weight codes packed to their width.

    Tensors that share memory count once.
    """
    packed = {
        id(layer.weight_codes): layer.weight_quantizer.bits
        for layer in module.modules()
        if isinstance(layer, QWeighted) and layer.weight_codes is not None and layer.weight_quantizer is not None
    }
    total, seen = 0, set()
    for value in module.state_dict(keep_vars=True).values():
        place = (value.data_ptr(), value.shape)
        if value.numel() and place not in seen:
            seen.add(place)
            total += packed_size(value.numel(), packed.get(id(value), 8 * value.element_size()))
    return total
