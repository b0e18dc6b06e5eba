"""Stages: one file a step of a recipe. Every module of this folder is imported, so that a new file is all it takes."""

import importlib
import pkgutil

from lit_clipq.stages.stage import (
    STAGES,
    ChoosingStage,
    FloatStage,
    GridStage,
    LayerStage,
    LayerTask,
    Scope,
    Stage,
    stage,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["STAGES", "ChoosingStage", "FloatStage", "GridStage", "LayerStage", "LayerTask", "Scope", "Stage", "stage"]
