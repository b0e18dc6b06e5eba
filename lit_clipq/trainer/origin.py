"""What records say of where their numbers come from."""

import importlib.metadata
import shlex
import sys
from pathlib import Path

_PACKAGES = ("lit-clipq", "torch", "torchvision", "lightning", "open_clip_torch", "torchmetrics", "timm")


def command_line() -> str:
    """Return the command line of this process, the program by its name alone."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Return the versions of this package and of those its numbers depend on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}
