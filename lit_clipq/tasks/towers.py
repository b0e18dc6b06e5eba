"""Tasks whose image and text tower do not meet before what each of them made is scored."""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lit_clipq.contracts import TowerOutputs, TwoTowerTask
from lit_clipq.tasks.task import EncodingClipTask

TOWERS = ("text", "vision")
"""In the order in which they are scored: the texts of a classifier come before its pictures."""


class TwoTowerClipTask(EncodingClipTask):
    """A CLIP task that scores what the towers made, batch by batch, and does not look at a tower itself.

    What a tower made can be kept and scored again beside what the other tower makes at another width: the numbers are
    those of an evaluation with both in place. It can also be the reference that a later evaluation is compared with.

    Args:
        name: model name or path of an open_clip config JSON.
        pretrained: open_clip tag, local weights file, `mini`, or None for random weights.
        **kwargs: how the CLIP is loaded and pictures are prepared; see `ClipTask`.
    """

    uses_reference = False
    """Whether scores compare with what the float towers made (`keep_reference`)."""

    def __init__(self, name: str, pretrained: str | None = None, **kwargs: Any) -> None:
        super().__init__(name, pretrained, **kwargs)
        self._only: tuple[str, ...] | None = None
        self.made_outputs: dict[str, list[TowerOutputs]] = {}
        """What the towers made in the last evaluation, where it is kept, by tower and batch."""
        self.reference: dict[str, list[TowerOutputs]] | None = None
        """What the float towers made, to compare with."""

    @abstractmethod
    def tower_outputs(self, tower: str, batch: Mapping[str, Tensor]) -> TowerOutputs | None:
        """Return what a tower, `vision` or `text`, makes of a batch, with what scoring needs of the batch beside it.

        None where the batch has nothing for the tower.
        """

    @abstractmethod
    def score_outputs(self, tower: str, outputs: TowerOutputs) -> None:
        """Update `self.metric` by what a tower made of one batch."""

    def complete_scores(self) -> None:
        """Update `self.metric` by what is known when all batches are in."""

    # What two-tower tasks do for others

    def run_towers(self, towers: Collection[str]) -> None:
        """Let the next evaluation run these towers only, keep what they make, and score nothing."""
        self._only = tuple(tower for tower in TOWERS if tower in towers)

    def kept_outputs(self) -> dict[str, list[TowerOutputs]]:
        """Return what the towers made in the last evaluation, by tower and batch; of this process."""
        return dict(self.made_outputs)

    def score_towers(self, outputs: Mapping[str, Sequence[TowerOutputs]]) -> None:
        """Score as an evaluation whose towers made this would; `results` and the like then tell of it.

        Args:
            outputs: By tower and batch, of `kept_outputs`.
        """
        self.begin_evaluation()
        self.made_outputs = {tower: list(outputs[tower]) for tower in TOWERS}
        # What is computed in a step is computed in the precision of steps; the metric's own work is not.
        for tower in TOWERS:
            for batch in outputs[tower]:
                with nullcontext() if self._trainer is None else self.trainer.precision_plugin.val_step_context():
                    self.score_outputs(tower, batch)
        self.finish_evaluation()

    def keep_reference(self) -> None:
        """Compare what is scored from now on with what the towers made in the last evaluation."""
        self.reference = dict(self.made_outputs) or None

    def forget_reference(self) -> None:
        """Compare no more; an evaluation of the float network comes next."""
        self.reference = None

    # The evaluation loop

    def prepare_evaluation(self) -> None:
        """Forget what was kept; then what a tower makes once for all batches."""
        self.made_outputs = {tower: [] for tower in self._towers} if self._keeps else {}
        if "text" in self._towers:
            for outputs in self.shared_outputs():
                self._take("text", outputs)

    def shared_outputs(self) -> Sequence[TowerOutputs]:
        """Return what the text tower makes once for all batches, such as a classifier."""
        return ()

    def evaluation_step(self, batch: Mapping[str, Tensor]) -> None:
        """Run the towers on one batch, and score or keep what they make."""
        for tower in self._towers:
            outputs = self.tower_outputs(tower, batch)
            if outputs is not None:
                self._take(tower, outputs)

    def finish_evaluation(self) -> None:
        """Score what is in."""
        self.complete_scores()
        super().finish_evaluation()

    def on_validation_epoch_end(self) -> None:
        """Gather, score and log; nothing where outputs are only kept."""
        if self._only is None:
            super().on_validation_epoch_end()
        self._only = None

    @property
    def _towers(self) -> tuple[str, ...]:
        return TOWERS if self._only is None else self._only

    @property
    def _keeps(self) -> bool:
        return self._only is not None or self.uses_reference

    def _take(self, tower: str, outputs: TowerOutputs) -> None:
        if self._keeps:
            self.made_outputs[tower].append(outputs)
        if self._only is None:
            self.score_outputs(tower, outputs)


if TYPE_CHECKING:

    def _fulfils(task: TwoTowerClipTask) -> TwoTowerTask:
        """Let the type checker hold the class against its contract."""
        return task
