"""Calibrate, quantize and evaluate CLIP after training.

`lit_clipq.quantize(model, batches, recipe)` is the one verb, `quantize_many` the same for several recipes at once;
`load_clip` and `recipes` are what it needs,
`save_quantized` and `load_quantized` keep what it made, with what `identify` said before. All are loaded on first use,
so that importing the package costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "analyze",
    "identify",
    "load_clip",
    "load_quantized",
    "quantize",
    "quantize_many",
    "recipes",
    "save_quantized",
]

_LAZY = {
    "analyze": "lit_clipq.sensitivity",
    "identify": "lit_clipq.checkpoint",
    "load_clip": "lit_clipq.models",
    "load_quantized": "lit_clipq.checkpoint",
    "quantize": "lit_clipq.api",
    "quantize_many": "lit_clipq.api",
    "save_quantized": "lit_clipq.checkpoint",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name == "recipes":
        return import_module("lit_clipq.recipes")
    raise AttributeError(f"module 'lit_clipq' has no attribute {name!r}")
