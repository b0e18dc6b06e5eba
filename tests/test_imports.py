"""Who may import whom: the table of docs/decisions.md, read off the source with `ast`."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs/decisions.md"
TOP_LEVEL = ("datamodules", "callbacks")
ANYWHERE = {"lit_clipq.errors", "lit_clipq.paths", "lit_clipq.contracts", "lit_clipq"}


def full(name: str) -> str:
    return name if name in TOP_LEVEL else f"lit_clipq.{name}"


def read_table() -> dict[str, set[str]]:
    """Return package -> the parts of this project it may import beside itself, as the page has it."""
    page = TABLE.read_text(encoding="utf-8").partition("## Who may import whom")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    allowed = {}
    for packages, imports in rows:
        names = set(map(full, re.findall(r"`([\w.]+)`", imports)))
        if imports.strip() == "everything":
            names = {"lit_clipq", *TOP_LEVEL}
        allowed |= {full(package): names for package in re.findall(r"`([\w.]+)`", packages)}
    return allowed


ALLOWED = read_table()
WITHOUT_LIGHTNING = (
    "lit_clipq.tasks",
    "lit_clipq.trainer",
    "lit_clipq.cli",
    "datamodules",
    "callbacks",
)


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
    room = owner(module)
    assert room is not None, f"{module} is in no package of the table"
    for name in imports(SOURCES[module]):
        if not any(inside(name, top) for top in ("lit_clipq", "datamodules", "callbacks")) or name in ANYWHERE:
            continue
        allowed = inside(name, room) or any(inside(name, package) for package in ALLOWED[room])
        assert allowed, f"{module} imports {name}"


def test_the_table_names_every_room_and_has_no_circles():
    rooms = {name for name in SOURCES if name.count(".") <= 1 and name != "lit_clipq"} - {"lit_clipq.configs"}
    assert {name.split(".")[0] if name.split(".")[0] in TOP_LEVEL else name for name in rooms} == set(ALLOWED)
    done: list[str] = []
    while len(done) < len(ALLOWED):
        free = [p for p in ALLOWED if p not in done and all(owner(x) in (*done, p) for x in ALLOWED[p] if owner(x))]
        assert free, f"a circle among {sorted(set(ALLOWED) - set(done))}"
        done += free


def owner(module: str) -> str | None:
    return max((package for package in ALLOWED if inside(module, package)), key=len, default=None)


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_only_the_shells_know_lightning(module):
    if not any(inside(module, package) for package in WITHOUT_LIGHTNING):
        assert not any(inside(name, "lightning") for name in imports(SOURCES[module]))


def test_the_library_loads_without_lightning_or_data_libraries():
    code = "import lit_clipq, sys; print([m for m in ('lightning', 'transformers', 'pycocotools') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
