"""Where the program keeps what it can make again."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache folder: `$LIT_CLIPQ_CACHE`, or `~/.cache/lit_clipq`. It is not created here."""
    return Path(os.environ.get("LIT_CLIPQ_CACHE") or Path.home() / ".cache" / "lit_clipq").expanduser()
