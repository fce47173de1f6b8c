"""Where computed references are kept while tests run."""

import pytest


@pytest.fixture(autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep references where other tests of this run find them, and nobody else."""
    monkeypatch.setenv("PINNCURV_CACHE", str(tmp_path_factory.getbasetemp() / "references"))
