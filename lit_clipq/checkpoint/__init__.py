"""Save and load quantized models: a folder with safetensors and JSON, never pickle.

An artefact holds everything a quantized CLIP is: integer codes packed to their width, grids, whatever stayed float,
the recipe, the map of what was quantized, the configuration that rebuilds the architecture and the vocabulary of a
tokenizer of its own. Loading needs neither calibration data nor the float weights and gives bit-identical outputs.
"""

from lit_clipq.checkpoint.artefact import Artefact, read_artefact
from lit_clipq.checkpoint.folder import check_target
from lit_clipq.checkpoint.identity import ModelIdentity, identify
from lit_clipq.checkpoint.saving import load_quantized, save_quantized
from lit_clipq.models.hashing import state_hash

__all__ = [
    "Artefact",
    "ModelIdentity",
    "check_target",
    "identify",
    "load_quantized",
    "read_artefact",
    "save_quantized",
    "state_hash",
]
