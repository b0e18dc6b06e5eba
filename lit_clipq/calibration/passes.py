"""The one loop over calibration batches, and what looks on while it runs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_clipq.calibration.batches import Batch, Rows, one_of_each_kind, sample_counts
from lit_clipq.calibration.objective import back_propagate, named_outputs
from lit_clipq.distributed import rank, world_size

Cotangents = Callable[[Mapping[str, Tensor], Rows], dict[str, Tensor]]
"""From (outputs, rows) of a batch to gradients of the objective by each output, (draws, *)."""


class Observer(ABC):
    """Looks at the network while calibration batches run through it.

    Attributes:
        whole_set: Whether it looks at every batch; else at the first one of each kind.
        rows: Which rows of the batch at hand count.
    """

    whole_set: ClassVar[bool] = True
    rows: Rows

    @abstractmethod
    def hooks(self) -> Iterator[RemovableHandle]:
        """Put hooks into the network, one after the other; whoever asked for them removes them."""

    def end(self, outputs: Any) -> None:  # noqa: B027 - most observers see all they want in their hooks
        """End a batch; `outputs` is what the forward returned. Its backward pass, if any, is done."""

    @property
    def looks(self) -> bool:
        """Whether the batch at hand is one to look at."""
        return self._looks

    _looks: bool = False


@dataclass
class CalibrationSet:
    """The batches, and how a network runs on them.

    Attributes:
        batches: In memory; iterated once a pass.
        forward: Runs the networks on a batch and returns the outputs that matter, by name.
        lengths: Valid positions (B,) of the texts in a batch under the end-token rule; `None` where there are none.
    """

    batches: Sequence[Batch]
    forward: Callable[[Batch], Any]
    lengths: Callable[[Batch], Tensor | None] = lambda _: None

    @property
    def examples(self) -> list[Batch]:
        """The first batch of each kind."""
        return list(one_of_each_kind(self.batches))

    def numbered(self, *, end_token: bool = True, drop_start: bool = False) -> Iterator[tuple[Batch, Rows]]:
        """Yield each batch with what counts of it; samples are numbered over all ranks.

        Args:
            end_token: Whether positions behind a text's own end are left out; else those behind the longest one's.
            drop_start: Whether the first position of texts is left out.
        """
        position = 0
        for batch in self.batches:
            sizes = sample_counts(batch)
            samples = torch.arange(position, position + sizes[0]) * world_size() + rank()
            position += sizes[0]
            lengths = self.lengths(batch)
            if lengths is not None and not end_token:
                lengths = lengths.amax().expand(len(lengths))
            yield batch, Rows(samples, lengths, drop_start, sizes)


def look(
    data: CalibrationSet,
    observers: Sequence[Observer],
    *,
    cotangents: Cotangents | None = None,
    roots: Iterable[nn.Module] = (),
    end_token: bool = True,
    drop_start: bool = False,
) -> None:
    """Run the calibration set once, as far as the observers want to see it; hooks are removed however this ends.

    Args:
        data: Batches and how to run them.
        observers: Who looks on; an output-changing hook (gradients) may come from one of them only.
        cotangents: If given, they are back-propagated through every batch, one draw after the other.
        roots: Networks whose parameters track no gradient meanwhile; needed with `cotangents`.
        end_token: See `CalibrationSet.numbered`.
        drop_start: See `CalibrationSet.numbered`.
    """
    everything, examples = any(o.whole_set for o in observers), data.examples
    with ExitStack() as stack:
        for observer in observers:
            for handle in observer.hooks():
                stack.callback(handle.remove)
        stack.enter_context(without_parameter_gradients(roots))
        stack.enter_context(torch.set_grad_enabled(cotangents is not None))
        for batch, rows in data.numbered(end_token=end_token, drop_start=drop_start):
            is_example = any(batch is example for example in examples)
            if not (everything or is_example):
                continue
            for observer in observers:
                observer.rows, observer._looks = rows, observer.whole_set or is_example
            outputs = data.forward(batch)
            if cotangents is not None:
                _back_propagate(named_outputs(outputs), rows, cotangents)
            for observer in observers:
                if observer.looks:
                    observer.end(outputs)


def _back_propagate(outputs: Mapping[str, Tensor], rows: Rows, cotangents: Cotangents) -> None:
    drawn = cotangents(outputs, rows)
    draws = max((len(gradients) for gradients in drawn.values()), default=0)
    for i in range(draws):
        back_propagate(outputs, {name: gradients[i] for name, gradients in drawn.items()}, keep=i + 1 < draws)


class OutputObserver(Observer):
    """Keeps the outputs that matter of one batch of each kind."""

    whole_set = False

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def hooks(self) -> Iterator[RemovableHandle]:
        """None are needed."""
        yield from ()

    def end(self, outputs: Any) -> None:
        """Keep them."""
        self.outputs += named_outputs(outputs).values()


class EmbeddingObserver(Observer):
    """Keeps all outputs that matter, in float32 on the CPU, with their sample numbers."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.outputs: dict[str, list[Tensor]] = {}

    def hooks(self) -> Iterator[RemovableHandle]:
        """None are needed."""
        yield from ()

    def end(self, outputs: Any) -> None:
        """Keep them."""
        self.numbers += self.rows.samples.tolist()
        for name, value in named_outputs(outputs).items():
            self.outputs.setdefault(name, []).append(value.float().cpu())


@contextmanager
def without_parameter_gradients(roots: Iterable[nn.Module]) -> Iterator[None]:
    """Let no parameter of the networks track gradients while the context is open; restore what was, however it ends.

    A backward pass then computes gradients of activations only, and `.grad` of the parameters stays as it is.
    """
    tracking = [parameter for root in roots for parameter in root.parameters() if parameter.requires_grad]
    try:
        for parameter in tracking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in tracking:
            parameter.requires_grad_(True)
