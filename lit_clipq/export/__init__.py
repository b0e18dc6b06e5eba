"""Quantized towers as ONNX files whose products are integer, proved equal to the fake-quantized network."""

from lit_clipq.export.folder import check_target
from lit_clipq.export.options import ExportOptions
from lit_clipq.export.package import ExportReport, embeddings, export_artefact, export_clip, told
from lit_clipq.export.samples import Samples

__all__ = [
    "ExportOptions",
    "ExportReport",
    "Samples",
    "check_target",
    "embeddings",
    "export_artefact",
    "export_clip",
    "told",
]
