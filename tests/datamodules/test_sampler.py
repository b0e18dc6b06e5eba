from itertools import chain

import pytest
from torch.utils.data import DistributedSampler

from datamodules.sampler import ShardSampler, shard


@pytest.mark.parametrize("length", [0, 1, 7, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shards_partition_the_samples(length, world_size):
    shards = [list(ShardSampler(range(length), rank, world_size)) for rank in range(world_size)]
    assert sorted(chain(*shards)) == list(range(length))
    assert [len(ShardSampler(range(length), rank, world_size)) for rank in range(world_size)] == list(map(len, shards))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_a_trainer_takes_it_for_a_distributed_sampler():
    assert isinstance(ShardSampler(range(3)), DistributedSampler)


def test_without_a_process_group_there_is_one_rank():
    assert shard() == (0, 1)
    assert list(ShardSampler(range(4))) == [0, 1, 2, 3]
