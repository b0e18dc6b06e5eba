"""What a run of captioning leaves beside its results: the captions of each pass, and a page of both."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from lit_clipq.analysis.caption_page import CaptionRow, write_caption_page
from lit_clipq.analysis.measurement import CaptionedRow, Measurement
from lit_clipq.contracts import CaptioningTask, MeasuredTask
from lit_clipq.errors import ConfigError
from lit_clipq.metrics.functional.caption_files import write_captions
from lit_clipq.paths import write_whole


def digest_of(parts: Mapping[str, object]) -> str:
    """Return a hash of plain values by name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class CaptionFiles:
    """`captions_float.json`, `captions_quantized.json` and `captions.html` in the folder of the results.

    Args:
        model: The task; one without captions leaves no files.
        folder: Where the results are written.
        resume: Whether to go on from what is there.
    """

    def __init__(self, model: MeasuredTask, folder: Path, *, resume: bool) -> None:
        self.model = model
        self.folder = folder
        self.resume = resume
        self._runs: dict[str, str] = {}

    @classmethod
    def of(cls, model: MeasuredTask, results: Path, *, resume: bool) -> "CaptionFiles":
        """Make the files of a run that writes `results`.

        Raises:
            ConfigError: `resume` for a task that writes no captions.
        """
        if resume and not isinstance(model, CaptioningTask):
            raise ConfigError(
                f"--resume goes on with captions, which {type(model).__name__} does not write; leave it out"
            )
        return cls(model, results.parent, resume=resume)

    def begin_pass(self, name: str, parts: Mapping[str, object] | None) -> None:
        """Tell the task where the captions of the next pass go, and what they depend on.

        Raises:
            ConfigError: `resume` where that is not known.
        """
        if not isinstance(self.model, CaptioningTask):
            return
        if parts is None and self.resume:
            raise ConfigError("--resume needs a data module that can tell its data apart; use one of `datamodules`")
        run = "" if parts is None else digest_of(parts)
        self._runs[name] = run
        self.model.begin_pass(self._path(name), run, resume=self.resume)

    def end_pass(self, name: str, rows: Mapping[str, CaptionedRow], *, write: bool) -> None:
        """Write the captions of a pass, which may have been remembered instead of run."""
        if rows and write:
            write_captions(self._path(name), {int(key): row[0] for key, row in rows.items()})
            write_whole(self._path(name).with_suffix(".run.json"), json.dumps({"run": self._runs[name]}) + "\n")

    def write_page(self, measured: Measurement, quantized: Measurement | None) -> Path | None:
        """Write the page of a float and, where there is one, a quantized measurement; return where."""
        if not measured.captioned:
            return None
        cider = [_scores(measured), {} if quantized is None else _scores(quantized)]
        rows = [
            CaptionRow(
                image_id=int(key),
                path=Path(file),
                references=tuple(references),
                float_caption=caption,
                quantized_caption=None if quantized is None else quantized.captioned[key][0],
                float_cider=cider[0].get(int(key)),
                quantized_cider=cider[1].get(int(key)),
            )
            for key, (caption, references, file) in measured.captioned.items()
        ]
        path = self.folder / "captions.html"
        variant = f"quantized ({self.model.variant})"
        passes = [("float", measured), *([] if quantized is None else [(variant, quantized)])]
        notes = [
            f"CIDEr {name}: {100 * pass_.metrics['cider']:.2f} % of {len(rows):,} pictures" for name, pass_ in passes
        ]
        write_caption_page(path, rows, f"Captions: {self.model.model_name}", notes)
        return path

    def _path(self, name: str) -> Path:
        return self.folder / f"captions_{name}.json"


def _scores(measurement: Measurement) -> dict[int, float]:
    scores = measurement.scores.get("cider")
    return {} if scores is None else dict(zip(scores.clusters, scores.values, strict=True))
