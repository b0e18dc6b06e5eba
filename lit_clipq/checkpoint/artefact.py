"""A saved quantized model: what it says about itself, and how a network becomes it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_clipq.api import QuantizationReport
from lit_clipq.checkpoint.folder import check_files, read_content, read_tensors
from lit_clipq.checkpoint.identity import ModelIdentity
from lit_clipq.checkpoint.tensors import install, restore_tensors
from lit_clipq.errors import ConfigError, ModelError
from lit_clipq.models import fold_batchnorm, make_explicit
from lit_clipq.nn.size import stored_bytes
from lit_clipq.nn.swap import MapEntry, QuantizationMap
from lit_clipq.recipes import Recipe, recipe_from_json


@dataclass(frozen=True)
class Artefact:
    """An artefact whose JSON was read and checked; its tensors are read by `load_into`."""

    folder: Path
    identity: ModelIdentity
    recipe: Recipe
    content: Mapping[str, Any]
    """The JSON."""

    def check_files(self) -> None:
        """Compare the other files with their checksums.

        Raises:
            ModelError: If one is missing, cut short or edited.
        """
        check_files(self.folder, self.content["files"])

    def load_into(self, model: nn.Module | Mapping[str, nn.Module]) -> QuantizationReport:
        """Turn float networks of the same architecture into the quantized ones, in place.

        Args:
            model: As for `quantize`; the values of the weights do not matter.

        Returns:
            The report of the saved run; its `seconds` and `passes` are 0.

        Raises:
            ModelError: For damaged files, or networks that the artefact does not fit.
        """
        roots = dict(model) if isinstance(model, Mapping) else {"clip": model}
        self.check_files()
        state = restore_tensors(read_tensors(self.folder), self.content["tensors"])
        with torch.inference_mode(False), torch.no_grad():
            for root in roots.values():
                root.eval()
                fold_batchnorm(root)
                make_explicit(root)
            install(roots, self.content["modules"], self.content["structure"], state)
        return QuantizationReport(
            recipe=self.content["recipe"]["name"],
            map=QuantizationMap(tuple(MapEntry(**entry) for entry in self.content["map"])),
            seconds=0.0,
            float_bytes=self.content["size_bytes"]["float"],
            quantized_bytes=sum(stored_bytes(root) for root in roots.values()),
            passes=0,
            memory_bytes=0,
            samples=self.content["calibration"]["samples"],
            layers={},
            stages=self.content["stages"],
            structure=tuple(self.content["structure"]),
        )


def read_artefact(path: Path | str) -> Artefact:
    """Read what an artefact says about itself.

    Raises:
        ModelError: If the folder is no artefact, its JSON is damaged or edited, its format version unknown, or its
            recipe one that this version has not.
    """
    folder = Path(path)
    try:
        content = read_content(folder)
    except ConfigError as error:
        raise ModelError(f"the artefact {folder} was made by a recipe of another version: {error}") from error
    return Artefact(
        folder, ModelIdentity.from_json(content["model"], folder), _recipe(folder, content["recipe"]), content
    )


def _recipe(folder: Path, saved: Mapping[str, Any]) -> Recipe:
    try:
        return recipe_from_json(saved)
    except ConfigError as error:
        raise ModelError(f"the artefact {folder} was made by a recipe of another version: {error}") from error
