"""Captions of a pass, kept on disk while it runs, so that an interrupted run can continue."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from lit_clipq.errors import ConfigError
from lit_clipq.metrics.functional.caption_files import read_captions, write_captions
from lit_clipq.paths import write_whole

logger = logging.getLogger(__name__)


class CaptionLog:
    """The captions of one pass in COCO results format, beside a record of the run that they belong to.

    Each process writes what it captioned into a file of its own; `close` joins them.

    Args:
        path: The captions of the pass, such as `captions_float.json`.
        run: Hash of everything that the captions depend on.
        resume: Whether to go on from what is there.
        rank: Number of this process.
    """

    def __init__(self, path: Path, run: str, *, resume: bool, rank: int = 0) -> None:
        self.path = path
        self.run = run
        self.resume = resume
        self.rank = rank
        self.captions: dict[int, str] = {}
        """What this process captioned or found."""

    @property
    def record(self) -> Path:
        """File that names the run."""
        return self.path.with_suffix(".run.json")

    def prepare(self) -> None:
        """Remove what another run left, and say whose captions follow; for the first process, before `open`.

        Raises:
            ConfigError: Where the run to continue is another one.
        """
        if self.resume and self._check():
            return
        for path in self._files():
            path.unlink()
        write_whole(self.record, json.dumps({"run": self.run}) + "\n")

    def open(self) -> Mapping[int, str]:
        """Return the captions that are there already, of all processes.

        Raises:
            ConfigError: Where the run to continue is another one.
            DataError: A damaged file.
        """
        found: dict[int, str] = {}
        if self.resume and self._check():
            for path in self._files():
                found.update(read_captions(path))
            logger.info("%d captions found in %s", len(found), self.path)
            self.captions.update(found)  # what this process writes next must not lose them
        return found

    def add(self, captions: Mapping[int, str]) -> None:
        """Keep further captions of this process."""
        self.captions.update(captions)
        write_captions(self._own(), self.captions)

    def close(self, captions: Mapping[int, str]) -> None:
        """Write the captions of all processes and remove the parts; for the first process."""
        write_captions(self.path, captions)
        for path in self._files():
            if path != self.path:
                path.unlink()

    def _own(self) -> Path:
        return self.path.with_suffix(f".rank{self.rank}.json")

    def _files(self) -> list[Path]:
        parts = sorted(self.path.parent.glob(f"{self.path.stem}.rank*.json"))
        return [*([self.path] if self.path.is_file() else []), *parts]

    def _check(self) -> bool:
        """Tell whether there is something to continue.

        Raises:
            ConfigError: Where it belongs to another run.
        """
        if not self._files():
            return False
        try:
            known = json.loads(self.record.read_text(encoding="utf-8"))["run"]
        except (OSError, ValueError, KeyError, TypeError):
            known = None
        if known != self.run:
            raise ConfigError(
                f"{self.path} holds captions of a run with another model, recipe, data or options; start without "
                "--resume, or write elsewhere with --results"
            )
        return True
