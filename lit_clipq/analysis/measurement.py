"""What one pass over an evaluation set gave, in plain values that can be written and read again."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from lit_clipq.analysis.counts import evaluated_counts
from lit_clipq.contracts import CaptioningTask, CountedData, MeasuredTask
from lit_clipq.nn.size import stored_bytes

log = logging.getLogger(__name__)

CaptionedRow = tuple[str, list[str], str]
"""Caption, references and file of one picture."""


@dataclass(frozen=True)
class Scores:
    """Values of one metric for single samples."""

    values: list[float]
    clusters: list[int]
    """The picture of each sample."""


@dataclass(frozen=True)
class Measurement:
    """One pass over the evaluation set."""

    metrics: dict[str, float]
    scores: dict[str, Scores]
    samples: dict[str, int]
    bytes: int
    """Size of the networks; a checkpoint may bring some of them."""
    captioned: dict[str, CaptionedRow] = field(default_factory=dict)
    """Caption, references and file of each picture by its id as text; of captioning only."""

    @classmethod
    def of(cls, task: MeasuredTask, data: object) -> "Measurement":
        """Take the last evaluation of a task.

        Args:
            task: Evaluated.
            data: What it was evaluated on; its counts are added where it has any.
        """
        listed = data.sample_counts() if isinstance(data, CountedData) else {}
        counts = evaluated_counts(task.sample_counts(), listed)
        scores = {
            name: Scores(s.values.double().tolist(), s.clusters.tolist()) for name, s in task.sample_scores().items()
        }
        stored = sum(stored_bytes(root) for root in task.roots().values())
        return cls(task.results(), scores, counts, stored, _captioned_rows(task))

    @classmethod
    def read(cls, path: Path) -> "Measurement | None":
        """Read a remembered measurement; a damaged file counts as none and is measured again."""
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            scores = {name: Scores(**value) for name, value in content["scores"].items()}
            return cls(content["metrics"], scores, content["samples"], content["bytes"], content.get("captioned", {}))
        except (ValueError, KeyError, TypeError):
            log.warning("ignoring the damaged float measurement %s; it is measured again", path)
            return None


def _captioned_rows(task: object) -> dict[str, CaptionedRow]:
    """Return the pictures of a task's last evaluation by id as text; none of a task that writes no captions."""
    if not isinstance(task, CaptioningTask):
        return {}
    pictures = sorted(task.captioned().items())
    return {str(key): (p.caption, list(p.references), p.file_name) for key, p in pictures}
