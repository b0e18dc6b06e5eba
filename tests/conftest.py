"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores; read when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real pictures and captions; the test skips where it is absent."""
    path = Path(os.environ.get("LIT_CLIPQ_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"real data not found at {path}; set LIT_CLIPQ_DATA")
    return path


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this test run alone: the mini world is drawn into it once."""
    before = os.environ.get("LIT_CLIPQ_CACHE")
    folder = tmp_path_factory.mktemp("cache")
    os.environ["LIT_CLIPQ_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["LIT_CLIPQ_CACHE"]
    else:
        os.environ["LIT_CLIPQ_CACHE"] = before
