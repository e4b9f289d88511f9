"""Where compiled code can be kept nowhere, it is compiled all the same, and that is said once."""

from pathlib import Path

import pytest
from numba.core.caching import CacheImpl

from fusechat.run import compiled as module
from fusechat.run.compiled import compiled


def twice(x: float) -> float:
    return 2 * x


def test_without_a_place_to_write_to(monkeypatch: pytest.MonkeyPatch, heard: list[str]) -> None:
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    module._say.cache_clear()
    functions = [compiled()(twice), compiled(fastmath=True)(twice)]
    assert [function(1.5) for function in functions] == [3.0, 3.0]
    assert all(function.nopython_signatures for function in functions), "compiled, not interpreted"
    [said] = heard
    assert "NUMBA_CACHE_DIR" in said


def test_with_one_the_code_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, heard: list[str]) -> None:
    from numba import config

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    assert compiled()(twice)(1.5) == 3.0
    assert list(tmp_path.rglob("*.nbc"))
    assert heard == []
