"""Where the program keeps what it can make again, and how it writes files."""

import os
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache folder: `$LIT_CLIPQ_CACHE`, or `~/.cache/lit_clipq`. It is not created here."""
    return Path(os.environ.get("LIT_CLIPQ_CACHE") or Path.home() / ".cache" / "lit_clipq").expanduser()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, so that `path` holds either its old content or all of the new one.

    Raises:
        OSError: If the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file it was
        raise
