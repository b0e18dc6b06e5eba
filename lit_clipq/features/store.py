"""A folder of token features that several processes fill together, that survives crashes and that is read by item."""

import errno
import json
import logging
import os
import shutil
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist

from lit_clipq.distributed import gather
from lit_clipq.errors import DataError
from lit_clipq.features.key import FeatureKey
from lit_clipq.features.shard import ShardReader, is_whole, row_bytes, write_shard

logger = logging.getLogger(__name__)

FORMAT = 1
SHARD_BYTES = 32 * 2**20
_MANIFEST = "manifest.json"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Produce = Callable[[list[int]], Iterator[Tensor]]
"""Computes the features (l, D) of the items with the given numbers, in this order."""
Progress = Callable[[float], None]


class FeatureStore:
    """Token features of numbered items in shards of equal size.

    Items are cut into shards in their order. Processes divide the missing shards among themselves and never write the
    same file, and the files do not depend on how many processes there were. Items are read one at a time and no file
    stays mapped, so that memory does not grow with the cache, apart from 8 bytes for each item.

    Args:
        folder: Where the cache lies; made where it is absent.
        key: What the features depend on.
        lengths: Tokens of each item.
        width: Features of a token.
        shard_bytes: Size that a shard exceeds only where a single item does.

    Raises:
        ConfigError: If the folder holds a cache with another key; says which.
        DataError: If the folder cannot be made or read.
    """

    def __init__(
        self, folder: Path, key: FeatureKey, lengths: Sequence[int], width: int, shard_bytes: int = SHARD_BYTES
    ) -> None:
        if len(lengths) != key.count or not lengths:
            raise DataError(f"expected the lengths of {key.count} {key.kind} to cache, got {len(lengths)}.")
        self.folder = folder
        self.key = key
        self.lengths = list(lengths)
        self.width = width
        largest = max(self.lengths) * row_bytes(width, key.dtype)
        self.shard_items = max(1, shard_bytes // max(1, largest))
        self._readers: list[ShardReader | None] = []
        self._missing: list[int] | None = None
        self._open_or_make()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self) // self.shard_items)

    def read(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Read an item: values (l, D) float16 or int8, and the scales float32 (l,) of int8 values."""
        shard, place = divmod(index, self.shard_items)
        if not self._readers:
            self._readers = [None] * self.shards
        reader = self._readers[shard]
        if reader is None:
            reader = self._readers[shard] = ShardReader.open(self._path(shard))
        return reader.read(place)

    def missing(self, group: int = 0) -> list[int]:
        """Find the shards that are absent or damaged; a collective call, after which every process knows them.

        Args:
            group: Processes with the same group number see the same folder and share the work.

        Raises:
            DataError: Processes that share the folder would fill it with different features.
        """
        if self._missing is None:
            rank, members = _share(group)
            own = [shard for shard in range(rank, self.shards, members) if not is_whole(self._path(shard))]
            told = [found for found in gather((group, self.key.digest(), own)) if found[0] == group]
            if len({digest for _, digest, _ in told}) > 1:
                raise DataError(
                    f"the processes of this run see different {self.key.kind} or networks, but share "
                    f"{self.folder.parent}; give them the same files, or set --model.cache.shared false."
                )
            self._missing = sorted(shard for _, _, shards in told for shard in shards)
        return self._missing

    def fill(self, produce: Produce, group: int = 0, progress: Progress = lambda _: None) -> int:
        """Compute what is missing; every process calls this, and all return when all are done.

        Args:
            produce: Computes features of items.
            group: Processes with the same group number see the same folder and share the work.
            progress: Told the share of this process's work that is done, from 0 to 1.

        Returns:
            How many items this process computed.

        Raises:
            DataError: Too little space on the disk, before or while it is filled; finished shards stay. On the other
                processes: that one failed.
        """
        check_space([self], group)
        rank, members = _share(group)
        mine = self.missing(group)[rank::members]
        failure: Exception | None = None
        try:
            self._write(mine, produce, progress)
        except Exception as error:
            failure = error
        failures = gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        self._missing = None
        if failure is not None:
            raise failure
        for number, text in enumerate(failures):
            if text is not None:
                raise DataError(f"process {number} could not fill the feature cache {self.folder}: {text}")
        self._readers = []
        return sum(len(self._items(shard)) for shard in mine)

    def _write(self, missing: list[int], produce: Produce, progress: Progress) -> None:
        if not missing:
            return
        logger.info("caching %d of %d shards in %s", len(missing), self.shards, self.folder)
        features = produce([item for shard in missing for item in self._items(shard)])
        for done, shard in enumerate(missing):
            for left_over in self.folder.glob(f".{self._path(shard).name}*"):  # of a process that was killed
                if not _is_running(left_over.name.rpartition(".")[2]):  # another run may fill the same cache
                    left_over.unlink(missing_ok=True)
            items = []
            for item in self._items(shard):
                value = next(features).detach().cpu()
                if value.shape != (self.lengths[item], self.width):
                    raise DataError(
                        f"expected features {(self.lengths[item], self.width)} of item {item}, got {(*value.shape,)}."
                    )
                if not bool(value.isfinite().all()):
                    raise DataError(f"the features of item {item} in {self.folder} hold NaN or Inf; check the model.")
                items.append(value)
                progress((done + len(items) / len(self._items(shard))) / len(missing))
            try:
                write_shard(self._path(shard), items, self.key.dtype)
            except OSError as error:
                if error.errno in _FULL:
                    raise DataError(
                        f"the disk of the feature cache {self.folder} is full after {done} of {len(missing)} missing "
                        "shards, which stay; free some space and start again, or give --model.cache.folder another "
                        f"place ({error.strerror})."
                    ) from error
                raise DataError(f"the feature cache {self.folder} cannot be written: {error}.") from error

    def predicted_bytes(self, shards: Sequence[int]) -> int:
        """Return what some shards take on the disk at most."""
        return sum(self._bytes(shard) for shard in shards)

    def _items(self, shard: int) -> range:
        return range(shard * self.shard_items, min(len(self), (shard + 1) * self.shard_items))

    def _bytes(self, shard: int) -> int:
        items = self._items(shard)
        rows = sum(self.lengths[item] for item in items)
        return rows * row_bytes(self.width, self.key.dtype) + 8 * len(items) + 1024

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.safetensors"

    def _open_or_make(self) -> None:
        manifest = self.folder / _MANIFEST
        content = {"format": FORMAT, "width": self.width, "shard_items": self.shard_items, "key": asdict(self.key)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not manifest.exists():
                temporary = manifest.with_name(f".{_MANIFEST}.{uuid.uuid4().hex}")
                temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")
                temporary.replace(manifest)
            found = json.loads(manifest.read_text(encoding="utf-8"))
            held = FeatureKey(**found["key"])
            layout = (found["format"], found["width"], found["shard_items"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"the feature cache {self.folder} cannot be used: {error}; give another --model.cache.folder, or "
                "delete that one."
            ) from error
        held.check_serves(self.key, self.folder)
        if layout != (FORMAT, self.width, self.shard_items):
            raise DataError(f"the feature cache {self.folder} has another layout than this version's; delete it.")


def check_space(stores: Sequence[FeatureStore], group: int = 0) -> None:
    """Check that what several stores miss fits on their disks together; a collective call, before any is filled.

    Args:
        stores: The stores.
        group: Processes with the same group number see the same folders.

    Raises:
        DataError: It does not fit, on this process or on another.
    """
    needed: dict[int, int] = defaultdict(int)
    free = {}
    for store in stores:
        disk = store.folder.stat().st_dev
        needed[disk] += store.predicted_bytes(store.missing(group))
        free[disk] = (shutil.disk_usage(store.folder).free, store.folder)
    told = [
        f"the feature cache {folder} {'and others beside it need' if len(stores) > 1 else 'needs'} "
        f"{needed[disk] / 1e9:.2f} GB more, the disk has {space / 1e9:.2f} GB free; give --model.cache.folder another "
        "place or set --model.cache.dtype int8."
        for disk, (space, folder) in free.items()
        if needed[disk] > space
    ]
    for text in sum(gather(told), []):  # noqa: RUF017 short
        raise DataError(text)


def _is_running(number: str) -> bool:
    """Tell whether a process of this machine has the number that a file name ends with."""
    try:
        os.kill(int(number), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        pass  # it is somebody else's
    return True


def _share(group: int) -> tuple[int, int]:
    """Return the number of this process among those of its group, and how many they are."""
    groups = gather(group)
    rank = dist.get_rank() if len(groups) > 1 else 0
    return groups[:rank].count(group), groups.count(group)


def decode(values: Tensor, scales: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return features of stored values (..., D), with the scales (...) of int8 values."""
    return values.to(dtype) if scales is None else values.to(dtype) * scales[..., None].to(dtype)
