"""The memory of a merge does not grow with the models: a tensor of 200 MB in each of three, of values that differ and that tie."""

import json
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cases import each
from checkpoints import configuration

ELEMENTS = 50_000_000
BLOCK = 1 << 20
ROOM = 3 * 2**30  # bytes of disk
ALLOWED = 300 * 2**20  # bytes of memory beyond what a merge of next to nothing takes
NAME = "model.layers.0.mlp.up_proj.weight"
Values = Callable[[int, int], np.ndarray]  # (block number, model) → uint16 or float32 [BLOCK]

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


def write_model(directory: Path, elements: int, blocks: Callable[[int], np.ndarray]) -> Path:
    """A safetensors file written by hand, block by block, and the least of a configuration."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    first = blocks(0)
    kind = {"float32": "F32", "uint16": "BF16"}[first.dtype.name]
    entry = {"dtype": kind, "shape": [elements], "data_offsets": [0, elements * first.itemsize]}
    header = json.dumps({NAME: entry}).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for number in range(-(-elements // BLOCK)):
            file.write(blocks(number)[: elements - number * BLOCK].data)
    return directory


def different(number: int, model: int) -> np.ndarray:
    """Values of which hardly two updates are alike."""
    noise = np.random.default_rng([model, number % 4]).standard_normal(BLOCK, np.float32)
    return noise * np.float32(1 + number / 64)


def tied(number: int, model: int) -> np.ndarray:
    """bfloat16 of seven values: so many updates are alike that no threshold parts the largest from the rest."""
    whole = np.random.default_rng([model, number % 4]).integers(-3, 4, BLOCK).astype(np.float32)
    return (whole.view(np.uint32) >> 16).astype(np.uint16)


def models(root: Path, values: Values, elements: int) -> list[Path]:
    return [
        write_model(root / name, elements, lambda number, model=model: values(number, model))
        for model, name in enumerate(("base", "one", "two"))
    ]


def peak(config: dict[str, Any], root: Path) -> tuple[int, dict[str, Any]]:
    """The most anonymous memory, in bytes, that `fusechat merge` had in a process of its own; what it printed."""
    root.mkdir(exist_ok=True)
    (root / "merge.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "fusechat", "merge", root / "merge.yaml", root / "out", "--json", "--threads", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    most = 0
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                most = max(most, int(line.split()[1]) * 1024)
        time.sleep(0.005)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return most, json.loads(stdout)


@each("values, method, parameters", [
    (different, "sce", {"select_topk": 0.1}),
    (tied, "sce", {"select_topk": 0.1}),
    (tied, "ties", {"weight": 1, "density": 0.3, "rescale": True}),
])  # fmt: skip
def test_memory_does_not_grow_with_the_model(tmp_path: Path, values: Values, method: str, parameters: Any) -> None:
    if shutil.disk_usage(tmp_path).free < ROOM:
        pytest.skip("the disk has no 3 GiB to spare")
    small = configuration(method, models(tmp_path / "small", values, 1000), parameters)
    least, _ = peak(small, tmp_path / "of-small")
    large = configuration(method, models(tmp_path / "large", values, ELEMENTS), parameters)
    try:
        most, summary = peak(large, tmp_path / "of-large")
        assert summary["bytes_read"] == 3 * summary["bytes_written"] >= 3 * 2 * ELEMENTS
        assert 50 * 2**20 < least < most, "it was measured"
        assert most - least < ALLOWED, f"{(most - least) / 2**20:.0f} MiB more"
        print(
            f"{least / 2**20:.0f} MiB, {(most - least) / 2**20:.0f} MiB more for {summary['bytes_read'] / 1e6:.0f} MB"
        )
    finally:
        for directory in ("large", "of-large"):
            shutil.rmtree(tmp_path / directory, ignore_errors=True)
