"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real pictures and captions; the test skips where it is absent."""
    path = Path(os.environ.get("LIT_CLIPQ_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"real data not found at {path}; set LIT_CLIPQ_DATA")
    return path
