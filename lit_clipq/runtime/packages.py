"""Packages that only the runtime and the export need, imported where they are used."""

from importlib import import_module
from typing import Any

from lit_clipq.errors import ConfigError


def need(module: str, package: str, extra: str = "runtime") -> Any:
    """Import an optional package.

    Args:
        module: Name to import.
        package: What pip calls it.
        extra: Of this project, which brings it.

    Raises:
        ConfigError: If it is not installed; names the pip line.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the package {package} is needed and not installed ({error}); run `pip install {package}`, or "
            f"`pip install lit-clipq[{extra}]`"
        ) from error
