"""Memory that a step takes: measured for each step again, and left out where it cannot be known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusechat.run import usage
from fusechat.run.steps import Step

SIZE = 256 << 20
linux = pytest.mark.skipif(not usage._reset(), reason="the kernel does not tell, or does not let us ask")


@linux
def test_the_peak_is_that_of_the_step_alone(tmp_path: Path) -> None:
    def measured(name: str, size: int) -> int:
        def work(directory: Path) -> dict[str, Any]:
            np.ones(size, dtype=np.uint8)
            return {}

        step = Step("test", name, tmp_path / name, {}, work)
        assert step.run()
        manifest = step.manifest()
        assert manifest
        assert set(manifest["timings"]) >= {"seconds", "peak_memory_bytes"}
        return int(manifest["timings"]["peak_memory_bytes"])

    before, large, after = measured("before", 1), measured("large", SIZE), measured("after", 1)
    assert large - before == pytest.approx(SIZE, rel=0.1)
    assert large - after == pytest.approx(SIZE, rel=0.1)


def test_what_cannot_be_known_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(usage, "_RESET", tmp_path / "nothing" / "here")
    monkeypatch.setattr(usage, "_cuda", lambda: None)
    assert usage.watch()() == {}


def test_the_fullest_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        reset: list[int] = []  # noqa: RUF012

        def device_count(self) -> int:
            return 2

        def reset_peak_memory_stats(self, device: int) -> None:
            self.reset.append(device)

        def max_memory_allocated(self, device: int) -> int:
            return [5, 7][device]

    monkeypatch.setattr(usage, "_cuda", Cuda)
    assert usage.watch()()["peak_gpu_bytes"] == 7
    assert Cuda.reset == [0, 1]
