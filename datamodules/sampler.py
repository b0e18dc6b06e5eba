"""One rank's share of the samples."""

from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from lit_clipq.errors import ConfigError


class ShardSampler(DistributedSampler):
    """Yield the indices `rank, rank + world_size, ...` below `len(data)`, in order.

    It never pads, so shards differ in length by at most one and every sample is seen exactly once. It is a
    `DistributedSampler` so that a Trainer takes it for one and does not replace it.

    Args:
        data: Anything with a length.
        rank: This process; by default the rank in the process group, or 0 without one.
        world_size: Number of processes; by default the size of the process group, or 1 without one.

    Example:
        >>> list(ShardSampler(range(5), rank=1, world_size=2))
        [1, 3]
    """

    def __init__(self, data: Sized, rank: int | None = None, world_size: int | None = None) -> None:
        group_rank, group_size = shard()
        super().__init__(
            data,  # type: ignore[arg-type]
            num_replicas=group_size if world_size is None else world_size,
            rank=group_rank if rank is None else rank,
            shuffle=False,
        )
        self._indices = range(self.rank, len(data), self.num_replicas)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


class ShuffledBatches(Sampler[Tensor]):
    """Batches of indices in an order drawn from seed and epoch; each process takes its share of each batch.

    N processes with batches of B together see the batches of one process with N x B. What does not fill a last batch
    is left out.

    Args:
        size: Number of samples.
        batch_size: Samples in a batch of one process.
        seed: Seed of the order.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.start = 0

    @property
    def sampler(self) -> "ShuffledBatches":
        """What a Trainer tells the epoch, where this is the batch sampler of a loader."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; a Trainer calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // (self.batch_size * shard()[1])

    def __iter__(self) -> Iterator[Tensor]:
        rank, world_size = shard()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator)
        for batch in order.split(self.batch_size * world_size)[self.start : len(self)]:
            yield batch[rank::world_size]


class ResumableLoader(DataLoader):
    """A loader of shuffled batches that continues in the middle of an epoch.

    A Trainer keeps `state_dict` in its checkpoints. Nothing is drawn from the global random state, and nothing is
    read before the first batch of an epoch is asked for: only then is the epoch known.

    Args:
        data: Samples by index.
        batches: Their order.
        **options: Of `torch.utils.data.DataLoader`.
    """

    def __init__(self, data: Any, batches: ShuffledBatches, **options: Any) -> None:
        super().__init__(data, batch_sampler=batches, generator=torch.Generator(), **options)  # type: ignore[arg-type]
        self.batches = batches
        self._done = 0
        self._resume = (-1, 0)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        epoch, done = self._resume
        self._resume = (-1, 0)
        self._done = self.batches.start = done if epoch == self.batches.epoch and done < len(self.batches) else 0
        for batch in super().__iter__():
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return what continues after the last batch that was handed out."""
        return {"epoch": self.batches.epoch, "done": self._done, **self._order()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where `state` was taken; on another number of processes, too.

        Raises:
            ConfigError: The order of the samples is another one.
        """
        for name, value in self._order().items():
            if state[name] != value:
                raise ConfigError(
                    f"the checkpoint is of {name} {state[name]} of the training samples, this one has {value}; "
                    "train with the options it was taken with, or start anew without --ckpt_path."
                )
        self._resume = (state["epoch"], state["done"])

    def _order(self) -> dict[str, int]:
        batches = self.batches
        return {"size": batches.size, "batch": batches.batch_size * shard()[1], "seed": batches.seed}


def shard() -> tuple[int, int]:
    """Return (rank, world size) of the process group, or (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
