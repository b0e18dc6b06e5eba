"""One file of a feature cache: token features of consecutive items, one after the other, and a sum that vouches for it.

The file is safetensors: `values` (rows, D), float16 or int8; with int8 also `scales` float32 (rows,); `starts` int64
(items + 1,), the first row of each item. Beside it lies `<name>.sum`, written last: without it, or with another size or
CRC-32 than it says, a shard counts as absent.
"""

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

_CHUNK = 1 << 20
_INT8_MAX = 127


def write_shard(path: Path, items: Sequence[Tensor], dtype: str) -> None:
    """Write a shard so that it is whole or absent, whenever the process ends.

    Args:
        path: The file.
        items: Token features float (l, D) of each item, on the CPU.
        dtype: "float16" or "int8"; int8 codes are round(x / s) with s = max |x| / 127 of each token.

    Raises:
        OSError: If it cannot be written; nothing of it is left then.
    """
    starts = torch.tensor([0, *(len(item) for item in items)]).cumsum(0)
    values = torch.cat(list(items)).float()
    tensors = {"starts": starts}
    if dtype == "int8":
        scales = values.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / _INT8_MAX
        tensors |= {"values": (values / scales[:, None]).round_().to(torch.int8), "scales": scales}
    else:
        limit = torch.finfo(torch.float16).max
        tensors["values"] = values.clamp_(-limit, limit).half()
    content = save(tensors)
    _write_whole(path, content)
    _write_whole(_sum_of(path), json.dumps({"bytes": len(content), "crc32": zlib.crc32(content)}).encode())


def is_whole(path: Path) -> bool:
    """Tell whether a shard is there, with the size and checksum that it was written with; reads it once, in pieces."""
    try:
        told = json.loads(_sum_of(path).read_bytes())
        if path.stat().st_size != told["bytes"]:
            return False
        crc = 0
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                crc = zlib.crc32(chunk, crc)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(crc == told["crc32"])


@dataclass(frozen=True)
class ShardReader:
    """Reads single items of a shard; holds `starts` in memory and no file open.

    Attributes:
        path: The file.
        starts: First row of each item, int64 (items + 1,).
        width: Features of a token, D.
        dtype: NumPy type of the values.
        values_at: Where the values begin in the file, in bytes.
        scales_at: Where the scales begin; None where there are none.
    """

    path: Path
    starts: np.ndarray
    width: int
    dtype: np.dtype
    values_at: int
    scales_at: int | None

    @classmethod
    def open(cls, path: Path) -> "ShardReader":
        """Read the header of a whole shard."""
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            begin = 8 + size
            first, last = header["starts"]["data_offsets"]
            file.seek(begin + first)
            starts = np.frombuffer(file.read(last - first), dtype=np.int64)
        values = header["values"]
        scales = header.get("scales")
        return cls(
            path,
            starts,
            values["shape"][1],
            np.dtype(np.int8 if values["dtype"] == "I8" else np.float16),
            begin + values["data_offsets"][0],
            None if scales is None else begin + scales["data_offsets"][0],
        )

    def read(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Read one item: values (l, D) float16 or int8, and scales float32 (l,) or None."""
        first, last = int(self.starts[index]), int(self.starts[index + 1])
        row = self.width * self.dtype.itemsize
        handle = os.open(self.path, os.O_RDONLY)
        try:
            values = _read(handle, self.values_at + first * row, (last - first, self.width), self.dtype)
            scales = None
            if self.scales_at is not None:
                scales = _read(handle, self.scales_at + 4 * first, (last - first,), np.dtype(np.float32))
        finally:
            os.close(handle)
        return values, scales


def row_bytes(width: int, dtype: str) -> int:
    """Return the bytes that one token takes on disk."""
    return width + 4 if dtype == "int8" else 2 * width


def _read(handle: int, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    target = np.empty(shape, dtype)
    view: Any = target.reshape(-1).view(np.uint8)
    done = 0
    while done < len(view):
        count = os.preadv(handle, [view[done:]], offset + done)
        if count == 0:
            raise OSError("the file of a feature cache ended early; start again, it is then completed")
        done += count
    return torch.from_numpy(target)


def _sum_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sum")


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
