"""Who may import whom: the table of docs/decisions.md, read off the source with `ast`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ANYWHERE = {"lit_clipq.errors", "lit_clipq.paths", "lit_clipq.contracts", "lit_clipq"}
# package -> the parts of this project it may import beside itself
ALLOWED = {
    "lit_clipq.errors": set(),
    "lit_clipq.paths": set(),
    "lit_clipq.contracts": set(),
    "lit_clipq.functional": set(),
    "lit_clipq.distributed": set(),
    "lit_clipq.nn": {"lit_clipq.functional"},
    "lit_clipq.mini": set(),
    "lit_clipq.inputs": {"lit_clipq.nn"},
    "lit_clipq.models": {"lit_clipq.nn.matmul", "lit_clipq.nn.attention", "lit_clipq.mini"},
    "lit_clipq.zerocap": {"lit_clipq.models", "lit_clipq.nn", "lit_clipq.mini"},
    "lit_clipq.calibration": {"lit_clipq.functional", "lit_clipq.nn", "lit_clipq.distributed", "lit_clipq.search"},
    "lit_clipq.search": {"lit_clipq.functional", "lit_clipq.nn", "lit_clipq.calibration", "lit_clipq.distributed"},
    "lit_clipq.recipes": {
        "lit_clipq.functional",
        "lit_clipq.nn",
        "lit_clipq.calibration",
        "lit_clipq.search",
        "lit_clipq.models",
        "lit_clipq.distributed",
    },
    "lit_clipq.api": {
        "lit_clipq.models",
        "lit_clipq.nn",
        "lit_clipq.calibration",
        "lit_clipq.search",
        "lit_clipq.recipes",
        "lit_clipq.distributed",
    },
    "lit_clipq.checkpoint": {
        "lit_clipq.functional",
        "lit_clipq.nn",
        "lit_clipq.models",
        "lit_clipq.recipes",
        "lit_clipq.api",
    },
    "lit_clipq.metrics": set(),
    "lit_clipq.features": {"lit_clipq.models", "lit_clipq.distributed"},
    "lit_clipq.tasks": {
        "lit_clipq.models",
        "lit_clipq.zerocap",
        "lit_clipq.metrics",
        "lit_clipq.features",
        "lit_clipq.mini",
    },
    "lit_clipq.analysis": {
        "lit_clipq.metrics.functional",
        "lit_clipq.nn",
        "lit_clipq.recipes",
        "lit_clipq.calibration",
        "lit_clipq.models",
    },
    "lit_clipq.trainer": {
        "lit_clipq.analysis",
        "lit_clipq.api",
        "lit_clipq.checkpoint",
        "lit_clipq.metrics.functional",
        "lit_clipq.nn",
        "lit_clipq.recipes",
    },
    "lit_clipq.cli": {"lit_clipq", "callbacks", "datamodules"},
    "datamodules": {"lit_clipq.models", "lit_clipq.mini", "lit_clipq.metrics.functional"},
    "callbacks": {
        "lit_clipq.api",
        "lit_clipq.calibration",
        "lit_clipq.checkpoint",
        "lit_clipq.recipes",
        "lit_clipq.nn",
        "lit_clipq.analysis",
    },
}
WITHOUT_LIGHTNING = ("lit_clipq.tasks", "lit_clipq.trainer", "lit_clipq.cli", "datamodules", "callbacks")


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def sources() -> dict[str, Path]:
    found = {}
    for top in ("lit_clipq", "datamodules", "callbacks"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            names.add(node.module or "")
    return names


SOURCES = sources()


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_point_one_way(module):
    if module == "lit_clipq":
        return
    owner = max((package for package in ALLOWED if inside(module, package)), key=len, default=None)
    assert owner is not None, f"{module} is in no package of the table"
    for name in imports(SOURCES[module]):
        if not any(inside(name, top) for top in ("lit_clipq", "datamodules", "callbacks")) or name in ANYWHERE:
            continue
        allowed = inside(name, owner) or any(inside(name, package) for package in ALLOWED[owner])
        assert allowed, f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_only_the_shells_know_lightning(module):
    if not any(inside(module, package) for package in WITHOUT_LIGHTNING):
        assert not any(inside(name, "lightning") for name in imports(SOURCES[module]))


def test_the_library_loads_without_lightning_or_data_libraries():
    code = "import lit_clipq, sys; print([m for m in ('lightning', 'transformers', 'pycocotools') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
