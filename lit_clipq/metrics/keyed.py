"""What our metrics share: states of known shape and dtype that several processes can gather, and scores per sample."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_clipq.metrics.functional import SampleScores, exact_mean


@dataclass(frozen=True)
class Evaluation:
    """Everything a metric knows once all samples are in."""

    scores: dict[str, SampleScores]
    """Scores of every sample by metric name."""
    counts: dict[str, int]
    """Number of samples by kind, repetitions not counted."""
    totals: dict[str, float] = field(default_factory=dict)
    """Metrics of the whole set that are no mean over samples, by name."""


class SampleKeyedMetric(Metric):
    """A metric that counts every sample id once, whoever saw it and how often.

    Subclasses declare states with `add_rows`, append to them in `update` and score all samples in `evaluate`. `compute`
    gives the mean of each score, as Python floats rounded once, and what exists for the whole set only.

    torchmetrics gathers a list state of a process that saw nothing as a one-dimensional float tensor, which aborts or
    corrupts the gathering of anything else; here such a process contributes zero rows of the declared shape and dtype.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._empty_rows: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._evaluation: Evaluation | None = None

    def add_rows(self, name: str, *columns: int, dtype: torch.dtype = torch.int64) -> None:
        """Declare a state that is concatenated along its rows.

        Args:
            name: attribute that holds the list of appended tensors.
            *columns: shape of one row; none for a scalar.
            dtype: dtype of all appended tensors.
        """
        self.add_state(name, [], dist_reduce_fx="cat")
        self._empty_rows[name] = ((0, *columns), dtype)

    def rows(self, name: str) -> Tensor:
        """All rows of a state, also where there are none."""
        value = getattr(self, name)
        return dim_zero_cat(value) if len(value) else self._no_rows(name)

    def sync(
        self,
        dist_sync_fn: Callable | None = None,
        process_group: Any | None = None,
        should_sync: bool = True,
        distributed_available: Callable | None = None,
    ) -> None:
        """Gather the states of all processes, those that saw nothing included. See `torchmetrics.Metric.sync`."""
        for name in self._empty_rows:
            value = getattr(self, name)
            if isinstance(value, list) and not value:
                value.append(self._no_rows(name))
        super().sync(dist_sync_fn, process_group, should_sync, distributed_available)

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self._evaluation = None

    def compute(self) -> dict[str, float]:
        """Mean of each score over all samples of all processes, as fractions, by name; then the totals."""
        self._evaluation = self.evaluate()
        means = {name: exact_mean(scores.values) for name, scores in self._evaluation.scores.items()}
        return means | self._evaluation.totals

    def evaluation(self) -> Evaluation:
        """Scores and counts of all samples of all processes; the same on each of them."""
        self.compute()  # cached by torchmetrics; after `forward` it is computed again, over all batches
        if self._evaluation is None:
            raise RuntimeError("`compute` has to be the one that torchmetrics wraps around this class's own.")
        return self._evaluation

    @abstractmethod
    def evaluate(self) -> Evaluation:
        """Score every sample in the states, in an order that does not depend on who saw it."""

    def _no_rows(self, name: str) -> Tensor:
        shape, dtype = self._empty_rows[name]
        return torch.empty(shape, dtype=dtype, device=self.device)
