"""A counter-based random generator whose numbers are the same on every machine and in every version of every library.

SplitMix64 (Steele, Lea, Flood 2014): the n-th number is a bit mix of `key + n * golden ratio`, in 64-bit integers only.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


class Rng:
    """A stream of random integers named by its keys; streams with other keys are independent.

    Args:
        *keys: integers and words that name the stream, e.g. `Rng(seed, "val", 17, "captions")`.

    Example:
        >>> Rng(0, "doc").below(10) == Rng(0, "doc").below(10)
        True
    """

    def __init__(self, *keys: int | str) -> None:
        digest = hashlib.blake2b(repr(keys).encode("utf-8"), digest_size=8).digest()
        self._key = int.from_bytes(digest, "little")
        self._count = 0

    def below(self, bound: int) -> int:
        """Return an integer in [0, bound)."""
        self._count += 1
        z = (self._key + self._count * _GOLDEN) & _MASK
        z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
        z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
        return (z ^ (z >> 31)) % bound

    def between(self, low: int, high: int) -> int:
        """Return an integer in [low, high], both ends included."""
        return low + self.below(high - low + 1)

    def percent(self, chance: int) -> bool:
        """Return True in `chance` of 100 draws."""
        return self.below(100) < chance

    def choice(self, items: Sequence[T]) -> T:
        """Return one of the items, all equally likely."""
        return items[self.below(len(items))]

    def weighted(self, items: Sequence[T], weights: Sequence[int]) -> T:
        """Return one of the items, each as likely as its integer weight."""
        draw = self.below(sum(weights))
        for item, weight in zip(items, weights, strict=True):
            if draw < weight:
                return item
            draw -= weight
        raise AssertionError("the draw is below the sum of the weights")

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """Return `count` different items in random order."""
        pool = list(items)
        for i in range(count):
            j = self.between(i, len(pool) - 1)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]

    def byte_array(self, count: int) -> np.ndarray:
        """Return `count` random bytes, uint8."""
        words = (count + 7) // 8
        z = np.arange(self._count + 1, self._count + 1 + words, dtype=np.uint64)
        self._count += words
        z = z * np.uint64(_GOLDEN) + np.uint64(self._key)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
        z = z ^ (z >> np.uint64(31))
        return z.astype("<u8").view(np.uint8)[:count]
