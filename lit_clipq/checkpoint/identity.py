"""Which float model an artefact was made from."""

import hashlib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_clipq.contracts import LoadedModel
from lit_clipq.errors import ModelError
from lit_clipq.models.configs import ModelConfig
from lit_clipq.models.hashing import state_hash
from lit_clipq.nn.modules import QModule

VOCABULARY_FILE = "vocabulary.txt.gz"


@dataclass(frozen=True)
class ModelIdentity:
    """A float CLIP: its name, the configuration that rebuilds it and a hash of its weights."""

    name: str
    """Name or path it was loaded by."""
    pretrained: str | None
    """Tag or file of the float weights; `None` for random ones."""
    precision: str
    """As in `load_clip`."""
    config: dict[str, Any]
    """open_clip configuration; a vocabulary of its own is called `VOCABULARY_FILE` there."""
    preprocess: dict[str, Any]
    """Overrides of open_clip's default preprocessing."""
    vocabulary_hash: str | None
    """SHA-256 of that vocabulary."""
    weights_hash: str
    """`state_hash` of the float network; empty where it was not asked for."""
    vocabulary: Path | None = None
    """Where that vocabulary lies now."""

    def model_config(self) -> ModelConfig:
        """Return the configuration that rebuilds the model."""
        config = deepcopy(self.config)
        if self.vocabulary is not None:
            config["text_cfg"]["tokenizer_kwargs"]["bpe_path"] = str(self.vocabulary.resolve())
        return ModelConfig(self.name, None, config, self.preprocess)

    def to_json(self) -> dict[str, Any]:
        """Return what is the same wherever the artefact lies."""
        return {name: value for name, value in vars(self).items() if name != "vocabulary"}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], folder: Path) -> "ModelIdentity":
        """Undo `to_json` for an artefact in `folder`."""
        return cls(**content, vocabulary=folder / VOCABULARY_FILE if content["vocabulary_hash"] else None)

    def check_serves(self, run: "ModelIdentity", folder: Path) -> None:
        """Check that a model quantized from this one can take the place of the run's.

        Configuration files may lie elsewhere than before. Weights are compared where both hashes are there.

        Raises:
            ModelError: For another model or other float weights; names both.
        """
        moved = self.name.endswith(".json") and run.name.endswith(".json") and self.config == run.config
        if self.name != run.name and not moved:
            raise ModelError(
                f"the artefact {folder} holds model {self.name!r}, but the run has {run.name!r}; "
                f"give --model.name {self.name} or another artefact"
            )
        if (self.config, self.vocabulary_hash, self.precision) != (run.config, run.vocabulary_hash, run.precision):
            raise ModelError(
                f"the artefact {folder} was made from another configuration, vocabulary or precision of model "
                f"{self.name!r} than the run's; quantize again"
            )
        if self.weights_hash and run.weights_hash and self.weights_hash != run.weights_hash:
            raise ModelError(
                f"the artefact {folder} was made from {_weights(self.pretrained)} of {self.name}, but the run's model "
                f"has other values from {_weights(run.pretrained)}; load the weights it was made from "
                "(--model.pretrained) or quantize again"
            )


def identify(loaded: LoadedModel, *, with_weights: bool = True) -> ModelIdentity:
    """Take the identity of a float CLIP, for `save_quantized`; call it before `quantize`.

    Args:
        loaded: From `load_clip`.
        with_weights: Whether the weights are hashed.

    Raises:
        ModelError: If the model is quantized already, or did not come from `load_clip`.
    """
    if any(isinstance(module, QModule) for module in loaded.model.modules()):
        raise ModelError(f"model {loaded.name!r} is quantized already; call `identify` before `quantize`")
    if loaded.config is None:
        raise ModelError(f"model {loaded.name!r} has no configuration to rebuild it from; load it with `load_clip`")
    config = deepcopy(loaded.config.model)
    tokenizer = config["text_cfg"].get("tokenizer_kwargs") or {}
    vocabulary = Path(tokenizer["bpe_path"]) if "bpe_path" in tokenizer else None
    if vocabulary is not None:
        tokenizer["bpe_path"] = VOCABULARY_FILE
    return ModelIdentity(
        name=loaded.name,
        pretrained=loaded.pretrained,
        precision=loaded.precision,
        config=config,
        preprocess=loaded.config.preprocess,
        vocabulary_hash=None if vocabulary is None else hashlib.sha256(vocabulary.read_bytes()).hexdigest(),
        weights_hash=state_hash(loaded.model) if with_weights else "",
        vocabulary=vocabulary,
    )


def _weights(pretrained: str | None) -> str:
    return "random weights" if pretrained is None else f"the weights {pretrained!r}"
