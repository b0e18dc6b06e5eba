"""The pages of docs/contributing work as written.

Their fenced blocks are taken in order, each page in an empty folder:

- an info string that ends in `file=NAME` writes the block to that file,
- `python run` and `sh run` execute it there, with exit code 0,
- `text output` is what the block run before it printed; a line `...` stands for any lines,
- a block with a language alone, or with nothing, is for reading; anything else is an error.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "contributing").glob("*.md"))
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = {"python run": [sys.executable, "-c"], "sh run": ["sh", "-e", "-c"]}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    info: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The file it is to be written to."""
        found = re.search(r"\bfile=(\S+)$", self.info)
        return found[1] if found else None


def blocks_of(page: str) -> list[Block]:
    assert len(re.findall(r"^```", page, re.MULTILINE)) % 2 == 0, "a fence is open"
    return [Block(m[1].strip(), m[2], page.count("\n", 0, m.start()) + 1) for m in FENCE.finditer(page)]


def run_page(page: str, folder: Path) -> int:
    """Do what the page says; returns how many blocks were executed."""
    executed, printed = 0, None
    for block in blocks_of(page):
        if block.file is not None:
            path = folder / block.file
            assert path.resolve().is_relative_to(folder.resolve()), f"line {block.line}: {block.file} leaves the folder"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        elif block.info in COMMANDS:
            printed = execute(block, folder)
            executed += 1
        elif block.info == "text output":
            assert printed is not None, f"line {block.line}: nothing was run before this output"
            assert matches(block.text, printed), f"line {block.line}: printed was\n{printed}"
        else:
            assert not re.search(r"\W", block.info), f"line {block.line}: {block.info!r} means nothing"
    return executed


def execute(block: Block, folder: Path) -> str:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join((str(ROOT), *inherited))}
    command = [*COMMANDS[block.info], block.text]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"line {block.line} ended with {result.returncode}:\n{result.stdout}{result.stderr}"
    return result.stdout


def matches(expected: str, printed: str) -> bool:
    """Compare by lines, without the spaces around them; a line `...` stands for any lines."""
    lines = [line.strip() for line in expected.strip().splitlines()]
    pattern = "".join(r"(?:.*\n)*" if line == "..." else re.escape(line) + r"\n" for line in lines)
    told = "".join(f"{line.strip()}\n" for line in printed.strip().splitlines())
    return re.fullmatch(pattern, told) is not None


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_works_as_written(page, tmp_path):
    assert run_page(page.read_text(encoding="utf-8"), tmp_path) >= 1


def test_every_page_is_linked_from_the_front():
    front = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert PAGES
    assert [page.name for page in PAGES if f"(docs/contributing/{page.name})" not in front] == []


@pytest.mark.parametrize(
    ("page", "told"),
    [
        ("```python run\nraise SystemExit(3)\n```\n", "line 1 ended with 3"),
        ("\n```sh run\nfalse\ntrue\n```\n", "line 2 ended with 1"),
        ("```python run\nprint(1)\n```\n```text output\n2\n```\n", "line 4: printed was\n  1"),
        ("```text output\n2\n```\n", "nothing was run"),
        ("```python file=../a.py\n```\n", "leaves the folder"),
        ("```python run\nprint(1)\n", "a fence is open"),
        ("```python runs\nprint(1)\n```\n", "'python runs' means nothing"),
    ],
    ids=[
        "error",
        "first line of a script",
        "other output",
        "output of nothing",
        "file outside",
        "open fence",
        "typing error",
    ],
)
def test_a_page_that_does_not_work_fails(page, told, tmp_path):
    with pytest.raises(AssertionError, match=told):
        run_page(page, tmp_path)
    assert not (tmp_path.parent / "a.py").exists()


def test_blocks_of_a_page_share_a_folder_and_output_may_leave_lines_out(tmp_path):
    page = (
        "```python file=pack/a.py\nx = 5\n```\n```text\nfor reading\n```\n```sh run\npython -c 'import pack.a as a\n"
        "for i in range(a.x): print(i)'\n```\n```text output\n0\n...\n4\n```\n"
    )
    assert run_page(page, tmp_path) == 1
