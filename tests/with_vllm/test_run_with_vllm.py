"""A run whose capture is made by vLLM has the artifacts that one by Transformers has."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm installs and tests it", exc_type=ImportError)

from vllm_process import vllm_serving

import runs
from fusechat.data.distributions import open_distributions
from vllm_like import differences


def recipe(directory: Path, wide: dict[str, Path], **capture: Any) -> Path:
    """A pivot and one source, on the same conversations."""
    directory.mkdir()
    path = runs.write_recipe(directory, wide | {"gemma": wide["mistral"]})
    content = yaml.safe_load(path.read_text())
    content["sources"] = {"mistral": {"model": str(wide["mistral"]), "capture": capture.pop("source", {})}}
    content["capture"] |= capture
    path.write_text(yaml.safe_dump(content))
    return path


def captured(path: Path) -> dict[str, Any]:
    """All distributions of a run, by the name of their store and the conversation's id."""
    workdir = path.parent / "work"
    done = runs.fusechat("run", path, "--workdir", workdir, "--until", "capture")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") < 3, done.stdout  # what vLLM has to say is not for stdout
    stores = [file.parent for file in sorted((workdir / "capture").rglob("store.json"))]
    assert len(stores) >= 2
    sets = {str(store.relative_to(workdir)): open_distributions(store) for store in stores}
    return {f"{name} {identity}": found[identity] for name, found in sets.items() for identity in found.index}


@pytest.fixture(scope="module")
def expected(wide: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return captured(recipe(tmp_path_factory.mktemp("transformers") / "run", wide))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    apart = np.array([differences(found[key], expected[key]) for key in expected])
    print(f"greatest differences by place, of nll, by token: {apart.max(axis=0)}")
    assert apart.max() < 0.01  # of values that float16 holds


def test_a_run_with_vllm_in_this_process(wide: dict[str, Path], expected: dict[str, Any], tmp_path: Path) -> None:
    assert_same(captured(recipe(tmp_path / "run", wide, backend="vllm")), expected)


def test_a_run_with_a_server_for_one_of_the_models(
    wide: dict[str, Path], expected: dict[str, Any], tmp_path: Path
) -> None:
    with vllm_serving(wide["mistral"], tmp_path / "log", "--max-model-len", "512") as url:
        path = recipe(tmp_path / "run", wide, source={"backend": "vllm", "url": url})
        assert_same(captured(path), expected)
