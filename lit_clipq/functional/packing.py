"""Dense packing of integer codes: b bits for each code, with nothing between them.

Code i occupies the bits i * b .. (i + 1) * b - 1 of the stream, the lowest bit first; bit k of the stream is bit k % 8
of byte k // 8. So eight codes fill b bytes, and both directions work on whole columns of such groups.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lit_clipq.functional.uniform import code_range

_GROUP = 8


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes of `bits` bits.

    Args:
        codes: Integers in -2^(b-1) .. 2^(b-1) - 1, any shape, read in row-major order.
        bits: Width b, 2 to 16.

    Returns:
        uint8 of shape (ceil(codes.numel() * b / 8),), on the device of `codes`.

    Raises:
        ValueError: For a width outside 2..16 or codes that do not fit it.

    Example:
        >>> pack_codes(torch.tensor([1, -1, 0, -8]), 4).tolist()  # 0x1, 0xf, 0x0, 0x8
        [241, 128]
    """
    low, high = code_range(bits, symmetric=True)
    codes = codes.reshape(-1)
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) > high):
        raise ValueError(f"expected codes in {low}..{high}, got {int(codes.min())}..{int(codes.max())}; widen `bits`")
    groups = codes.new_zeros(-(-codes.numel() // _GROUP), _GROUP, dtype=torch.int32)
    groups.view(-1)[: codes.numel()] = codes
    groups &= 2**bits - 1
    packed = torch.zeros(len(groups), bits, dtype=torch.uint8, device=codes.device)
    for code, byte, shift in _overlaps(bits):
        part = groups[:, code] << shift if shift >= 0 else groups[:, code] >> -shift
        packed[:, byte] |= (part & 0xFF).to(torch.uint8)
    return packed.view(-1)[: packed_size(codes.numel(), bits)].clone()


def unpack_codes(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack_codes`.

    Args:
        packed: uint8 of one axis.
        bits: Width of the codes, 2 to 16.
        shape: Shape of the codes.

    Returns:
        Signed codes of that shape, int8 up to 8 bits and int16 above.

    Raises:
        ValueError: If `packed` does not have the size that width and shape imply.
    """
    count = torch.Size(shape).numel()
    low, _ = code_range(bits, symmetric=True)
    if packed.dtype != torch.uint8 or packed.shape != (packed_size(count, bits),):
        raise ValueError(
            f"expected {packed_size(count, bits)} bytes for {count} codes of {bits} bits, "
            f"got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    rows = -(-count // _GROUP)
    columns = packed.new_zeros(rows, bits, dtype=torch.int32)
    columns.view(-1)[: packed.numel()] = packed
    codes = torch.zeros(rows, _GROUP, dtype=torch.int32, device=packed.device)
    for code, byte, shift in _overlaps(bits):
        codes[:, code] |= columns[:, byte] >> shift if shift >= 0 else columns[:, byte] << -shift
    codes &= 2**bits - 1
    codes = ((codes ^ -low) + low).to(torch.int8 if bits <= 8 else torch.int16)  # extends the sign bit
    return codes.view(-1)[:count].reshape(shape)


def _overlaps(bits: int) -> Iterator[tuple[int, int, int]]:
    """Yield (code, byte, left shift of the code into the byte) wherever a code of a group has bits in a byte."""
    for code in range(_GROUP):
        for byte in range(code * bits // 8, ((code + 1) * bits - 1) // 8 + 1):
            yield code, byte, code * bits - 8 * byte
