"""Run an exported CLIP without torch: numpy, Pillow, tokenizers and ONNX Runtime are all it takes.

`load(folder)` reads what `lit-clipq export` wrote; `Index` searches pictures by text.
"""

from lit_clipq.runtime.index import Hit, Index
from lit_clipq.runtime.model import IntegerCLIP, load

__all__ = ["Hit", "Index", "IntegerCLIP", "load"]
