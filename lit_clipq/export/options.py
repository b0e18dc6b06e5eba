"""Options of an export."""

from dataclasses import dataclass
from pathlib import Path

from lit_clipq.errors import ConfigError

FORMATS = ("onnx",)
FALLBACKS = ("refuse", "float")


@dataclass(frozen=True)
class ExportOptions:
    """Where and how a quantized model is exported.

    Raises:
        ConfigError: For a format or fallback that does not exist.
    """

    target: str = "export"
    """Folder that is written."""
    format: str = "onnx"
    """Of the towers: `onnx`."""
    fallback: str = "refuse"
    """What becomes of a layer that no integer kernel computes: `refuse` names it, `float` keeps and lists it."""
    force: bool = False
    """Whether an export that is already in the folder is replaced."""

    def __post_init__(self) -> None:
        for name, choices in (("format", FORMATS), ("fallback", FALLBACKS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"--export.{name} must be {' or '.join(choices)}, got {getattr(self, name)!r}")

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.target)
