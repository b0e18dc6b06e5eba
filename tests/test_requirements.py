"""requirements/oldest.txt says what pyproject.toml says, so that the bounds are those that were run."""

import re
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
NOT_RUN_AT_THEIR_OLDEST = {"ruff", "mypy", "types-PyYAML", "pre-commit"}


def declared() -> list[Requirement]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # tomllib is not in Python 3.10
    blocks = re.findall(r"^(?:dependencies|dev|captioning) = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    return [Requirement(found) for block in blocks for found in re.findall(r'"([^"]+)"', block)]


def pinned() -> dict[str, str]:
    lines = (ROOT / "requirements" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_every_lower_bound_is_pinned_and_nothing_else():
    oldest = {}
    for requirement in declared():
        if requirement.name not in NOT_RUN_AT_THEIR_OLDEST:
            assert [bound.operator for bound in requirement.specifier] == [">="], f"{requirement} has no lower bound"
            (bound,) = requirement.specifier
            assert oldest.setdefault(requirement.name, release(bound.version)) == release(bound.version)
    assert oldest == {name: release(version) for name, version in pinned().items()}


def release(version: str) -> str:
    """`2.11` and `2.11.0` are one version."""
    return re.sub(r"(\.0)+$", "", version)
