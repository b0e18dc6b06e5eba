"""The embedded default: a procedural picture world, and tiny CLIPs trained on it."""

from lit_clipq.mini.assets import CONFIG_DIR, MINI_MODELS, config_path, head_path, weights_path
from lit_clipq.mini.world import CLASS_NAMES, PRESETS, WORLD_HASHES, WORLD_SEED, ensure_world, world_folder

__all__ = [
    "CLASS_NAMES",
    "CONFIG_DIR",
    "MINI_MODELS",
    "PRESETS",
    "WORLD_HASHES",
    "WORLD_SEED",
    "config_path",
    "ensure_world",
    "head_path",
    "weights_path",
    "world_folder",
]
