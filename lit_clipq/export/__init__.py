"""Quantized towers as ONNX files whose products are integer, proved equal to the fake-quantized network.

`export_clip` and `export_artefact` need packages that the rest does not; they are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lit_clipq.export.folder import check_target
from lit_clipq.export.options import ExportOptions
from lit_clipq.export.samples import Reference, Samples, embeddings
from lit_clipq.runtime.packages import need

if TYPE_CHECKING:
    from lit_clipq.export.package import ExportReport, export_artefact, export_clip, told

__all__ = [
    "ExportOptions",
    "ExportReport",
    "Reference",
    "Samples",
    "check_target",
    "embeddings",
    "export_artefact",
    "export_clip",
    "told",
]
_PACKAGES = ("onnx", "onnxruntime", "tokenizers")


def __getattr__(name: str) -> Any:
    """Load what needs `onnx` when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'lit_clipq.export' has no attribute {name!r}")
    for package in _PACKAGES:
        need(package, package, "export")
    return getattr(import_module("lit_clipq.export.package"), name)
