"""Docstrings say what is there: an entry of `Args:` or `Attributes:` names one parameter or attribute.

A formatter that reflows a section runs its entries together or breaks one in the middle of a sentence; then a name is
missing, unknown or inside the text of another.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Example|Note):$")
ENTRY = re.compile(r"    (\*{0,2}\w+):(?: \S|$)")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def sources():
    return {
        path.relative_to(ROOT).as_posix(): path
        for top in ("lit_clipq", "datamodules", "callbacks")
        for path in sorted((ROOT / top).rglob("*.py"))
    }


def section(doc, title):
    """Lines of a section, indentation kept; none where there is no such section."""
    lines, inside = [], False
    for line in doc.splitlines():
        if line and not line.startswith(" "):
            inside = line == f"{title}:"
        elif inside and line.strip():
            lines.append(line)
    return lines


def parameters(node):
    """Names of a function's parameters as a docstring writes them, `*args` and `**kwargs` with their stars."""
    a = node.args
    plain = [argument.arg for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    starred = [f"*{a.vararg.arg}"] if a.vararg else []
    starred += [f"**{a.kwarg.arg}"] if a.kwarg else []
    return {name for name in (*plain, *starred) if name not in ("self", "cls")}


def attributes(node):
    """Names that a class binds: in its body, or on `self` in its methods."""
    bound = set()
    for part in ast.walk(node):
        if (
            isinstance(part, ast.Attribute)
            and isinstance(part.ctx, ast.Store)
            and getattr(part.value, "id", "") == "self"
        ):
            bound.add(part.attr)
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            bound.add(part.id)
        elif isinstance(part, ast.Call) and getattr(part.func, "attr", "") == "register_buffer":
            bound.add(part.args[0].value)
    return bound


def constructor(node):
    """Names that making an instance takes: those of `__init__`, else the fields of a dataclass."""
    init = next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)
    if init is not None:
        return parameters(init)
    return {
        part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }


def problems(source):
    """What is wrong with the sections of a file's docstrings, one sentence each."""
    found = []
    for node in ast.walk(ast.parse(source)):
        doc = ast.get_docstring(node) if isinstance(node, Definition | ast.Module) else None
        if doc is None:
            continue
        name = getattr(node, "name", "the module")
        found += [f"{name}: {line.strip()!r} is not alone" for line in doc.splitlines() if glued_title(line)]
        allowed = {"Attributes": attributes(node)} if isinstance(node, ast.ClassDef) else {}
        if not isinstance(node, ast.Module):
            allowed["Args"] = constructor(node) if isinstance(node, ast.ClassDef) else parameters(node)
        for title in ("Args", "Attributes"):
            found += [f"{name}: {told}" for told in wrong_entries(section(doc, title), allowed.get(title, set()))]
        found += [f"{name}: {told}" for told in broken_entries(section(doc, "Raises"))]
    return found


def glued_title(line):
    """A section title with text behind it, or one that is indented as if it were an entry."""
    return re.match(r"\s*(Args|Attributes|Raises|Returns|Yields): +\S", line) or re.match(
        r"\s+(Args|Raises|Returns):$", line
    )


def broken_entries(lines):
    """Lines where an entry should begin and none does, or that are indented neither as entry nor as continuation."""
    at_entry = [line for line in lines if not line.startswith("     ")]
    told = [f"{line.strip()!r} begins no entry" for line in at_entry if not ENTRY.match(line)]
    told += [f"{line.strip()!r} is indented oddly" for line in lines if len(line) - len(line.lstrip()) not in (4, 8)]
    return told


def wrong_entries(lines, allowed):
    """What is wrong with a section whose entries have to be among the allowed names, each once."""
    told = broken_entries(lines)
    named = [match[1] for line in lines if (match := ENTRY.match(line))]
    told += [f"{name} is no parameter or attribute" for name in named if name not in allowed]
    told += [f"{name} is there twice" for name in set(named) if named.count(name) > 1]
    inside = {name for line in lines for name in re.findall(r"(?:^ {8,}|[.;)] )(\*{0,2}\w+): ", ENTRY.sub("", line))}
    return told + [f"{name} is inside another entry" for name in inside & allowed]


SOURCES = sources()


@pytest.mark.parametrize("name", SOURCES)
def test_sections_name_what_is_there(name):
    assert problems(SOURCES[name].read_text(encoding="utf-8")) == []


GOOD = '''
def f(a, *rest, b=1, **more):
    """Do.

    Args:
        a: One, of (3, H): text.
        *rest: Others.
        b: Two, which is
            explained at length.
        **more: Rest.

    Raises:
        ValueError: Where b: is bad.
    """
'''


def test_a_sound_docstring_passes():
    assert problems(GOOD) == []


@pytest.mark.parametrize(
    ("sound", "mangled", "told"),
    [
        ("        a: One", "        c: One", "c is no parameter"),
        ("        *rest: Others", "        rest: Others", "rest is no parameter"),
        ("text.\n        *rest: Others.", "text. *rest: Others.", r"\*rest is inside another entry"),
        ("            explained", "        explained", "'explained at length.' begins no entry"),
        ("            explained", "          explained", "indented oddly"),
        ("        b: Two", "        a: Two", "a is there twice"),
        ("Args:\n        a:", "Args: a:", "is not alone"),
        ("    Raises:\n", "        Raises:\n", "'Raises:' is not alone"),
        ("Where b: is bad.", "Where\n        b is bad.", "'b is bad.' begins no entry"),
    ],
)
def test_a_mangled_docstring_is_found(sound, mangled, told):
    assert sound in GOOD
    assert re.search(told, "; ".join(problems(GOOD.replace(sound, mangled))))


def test_attributes_are_those_of_the_class():
    source = 'class C:\n    """Hold.\n\n    Attributes:\n        x: One.\n        y: Two.\n    """\n    x: int\n'
    assert problems(source) == ["C: y is no parameter or attribute"]
    assert problems(source + "    def __init__(self):\n        self.y = 1\n") == []
