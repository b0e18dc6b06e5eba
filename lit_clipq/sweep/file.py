"""The file of a sweep: one line a point, appended when it is measured, kept whole whatever happens."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from lit_clipq.analysis.records import FORMAT, Identity, PointRecord, read_records
from lit_clipq.errors import ConfigError
from lit_clipq.paths import write_whole

BEGINNING = f'{{"format":{FORMAT},"id":"'.encode()
"""What every line begins with; a file of something else is never cut."""


class ResultsFile:
    """A `results.jsonl` that this process alone writes, as a context.

    Entering locks it, takes off a last line that was cut short, and reads what is there.

    Args:
        path: The file; its folder is made.
        identity: What all of its points must share.
        mix: Whether points of another identity may stand beside.

    Raises:
        ConfigError: Another sweep writes it, it cannot be written, it is no file of a sweep, or (unless `mix`) it holds
            points of other code, model, data or settings.
        DataError: A damaged line in the middle.
    """

    def __init__(self, path: Path, identity: Identity, *, mix: bool = False) -> None:
        self.path = path
        self.identity = identity
        self.mix = mix
        self._records: dict[str, PointRecord] = {}
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))

    def __enter__(self) -> "ResultsFile":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"another sweep is writing {self.path}; wait for it, or give another --results"
            ) from error
        except OSError as error:
            raise ConfigError(f"results cannot be written to {self.path}: {error}; give another --results") from error
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    @property
    def baseline(self) -> PointRecord | None:
        """The float point of this identity, if it is measured."""
        own = (record for record in self._records.values() if record.identity == self.identity)
        return next((record for record in own if record.kind == "float" and record.error is None), None)

    def has(self, point: str) -> bool:
        """Whether a point is measured; one that failed counts as not measured."""
        return point in self._records and self._records[point].error is None

    def records(self, points: Iterable[str]) -> list[PointRecord]:
        """Return the lines of some points, in order, as far as there are any."""
        return [self._records[point] for point in points if point in self._records]

    def append(self, record: PointRecord) -> None:
        """Add a line, and return once it is on the disk.

        Raises:
            ConfigError: If it cannot be written, as on a full disk. What was written before stays as it was.
        """
        line = record.to_line().encode() + b"\n"
        handle = None
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            before = os.fstat(handle).st_size
            try:
                _write(handle, line)
                os.fsync(handle)
            except BaseException:
                os.ftruncate(handle, before)
                raise
        except OSError as error:
            raise ConfigError(
                f"a point cannot be added to {self.path}: {error.strerror or error}; the {len(self._records)} points "
                "before it are kept, free some space and start the same sweep again"
            ) from error
        finally:
            if handle is not None:
                os.close(handle)
        self._records[record.id] = record

    def put_in_order(self, order: Mapping[str, int]) -> None:
        """Write the lines anew: those of other sweeps first, then in the order of this one, each point once.

        Nothing is written where they stand like that already.

        Args:
            order: Place of a point by its id.
        """
        wanted = sorted(self._records.values(), key=lambda record: order.get(record.id, -1))
        content = "".join(f"{record.to_line()}\n" for record in wanted)
        if self.path.is_file() and self.path.read_text(encoding="utf-8") != content:
            try:
                write_whole(self.path, content)
            except OSError as error:
                raise ConfigError(
                    f"{self.path} is complete, but cannot be put in order: {error}; free some space and start the same "
                    "sweep again"
                ) from error

    def _open(self) -> None:
        if not self.path.exists():
            return
        try:
            self._take_off_torn_line()
        except OSError as error:
            raise ConfigError(f"results cannot be written to {self.path}: {error}; give another --results") from error
        self._records = {record.id: record for record in read_records(self.path)}
        others = [record.identity for record in self._records.values() if record.identity != self.identity]
        if others and not self.mix:
            differing = " and ".join(f"other {name}" for name in self.identity.differing(others[0]))
            raise ConfigError(
                f"{self.path} holds points of {differing}; give another --results, or --sweep.mix true to put points "
                "that cannot be compared into one file"
            )

    def _take_off_torn_line(self) -> None:
        """Cut the file behind its last whole line.

        Raises:
            ConfigError: If what would be cut off is not the beginning of a line.
        """
        with self.path.open("r+b") as file:
            content = file.read()
            whole = content.rpartition(b"\n")[0]
            torn = content[len(whole) + 1 :] if whole else content.removeprefix(b"\n")
            if not torn:
                return
            if not (torn.startswith(BEGINNING) or BEGINNING.startswith(torn)):
                raise ConfigError(f"{self.path} is no results file of a sweep; give another --results")
            file.truncate(len(content) - len(torn))
            os.fsync(file.fileno())


def _write(handle: int, line: bytes) -> None:
    """Write all of a line; `os.write` may take a part of it."""
    while line:
        line = line[os.write(handle, line) :]
