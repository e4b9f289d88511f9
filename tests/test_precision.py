"""`auto` in a recipe: what it becomes, where, and for whom."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import runs
from fusechat.errors import ModelError
from fusechat.models import load as core_models
from fusechat.pipeline import load_recipe
from fusechat.recipe.load import save_recipe
from fusechat.recipe.precision import with_dtypes

EXAMPLES = Path(__file__).parents[1] / "examples"
CPU = torch.device("cpu")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "name": "automatic",
                "pivot": "some/pivot",
                "sources": {"one": {"model": "some/one", "capture": {"dtype": "auto"}}, "two": "some/two"},
                "data": {"train": str(EXAMPLES / "data" / "arithmetic.train.jsonl")},
                "capture": {"dtype": "auto"},
                "evaluate": {"dtype": "auto"},
                "fuse": {"training": {"bf16": "auto"}},
            }
        )
    )
    return recipe


def dtypes(recipe: Path, *changes: str, dtype: str | None = None) -> tuple[Any, ...]:
    found = load_recipe(recipe, list(changes), dtype=dtype)
    captures = [found.capture_for(name).dtype for name in ("pivot", "one", "two")]
    return (*captures, found.evaluate.dtype, found.fuse.training["bf16"])


@pytest.mark.parametrize(("has", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_every_auto_becomes_what_the_device_computes_in(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: bool, expected: str
) -> None:
    monkeypatch.setattr(core_models, "computes_bfloat16", lambda device: has)
    assert dtypes(written) == (expected, expected, expected, expected, has)
    assert dtypes(written, dtype="bfloat16") == ("bfloat16",) * 4 + (True,)  # another device is meant
    mixed = dtypes(written, "capture.dtype=float16", "fuse.training.bf16=false")
    assert mixed == ("float16", expected, "float16", expected, False)
    saved = tmp_path / "saved.yaml"
    save_recipe(load_recipe(written), saved)
    assert "auto" not in saved.read_text().replace("automatic", "")  # wherever it is read again, it says the same
    assert load_recipe(saved) == load_recipe(written)


def test_this_cpu_has_it_if_the_kernel_says_so() -> None:
    """PyTorch's library needs the byte and word, doubleword and vector length extensions of AVX-512."""
    known = Path("/proc/cpuinfo")
    flags = known.read_text().partition("flags")[2].partition("\n")[0].split() if known.is_file() else []
    if "sse2" not in flags:
        pytest.skip("no x86 processor whose flags could be read")
    assert core_models.computes_bfloat16(CPU) == {"avx512bw", "avx512vl", "avx512dq"}.issubset(flags)


def test_a_device_that_is_not_here_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str | None) -> Any:
        raise ModelError(f"device: {name!r} is unavailable")

    monkeypatch.setattr(core_models, "computes_bfloat16", lambda device: False)
    assert core_models.fast_dtype("cpu") == "float32"
    monkeypatch.setattr(core_models, "choose_device", absent)
    assert core_models.fast_dtype("cuda") == "bfloat16"


def test_of_apples_devices_nothing_is_claimed() -> None:
    apple = torch.device("mps")
    assert not core_models.computes_bfloat16(apple)
    assert not core_models.is_slow("bfloat16", apple)


@pytest.mark.parametrize(
    "raw",
    [None, [], "auto", {}, {"capture": "auto", "sources": ["auto"]}, {"sources": {"one": "auto", "two": {"capture": 1}}}],
)  # fmt: skip
def test_what_has_another_form_is_left_alone(raw: Any) -> None:
    assert with_dtypes(raw) is raw


def test_what_a_recipe_shares_by_anchors_is_not_changed_beneath_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = {"dtype": "auto"}
    raw = {"capture": shared, "sources": {"one": {"capture": shared}}}
    assert with_dtypes(raw, "float16") == {
        "capture": {"dtype": "float16"},
        "sources": {"one": {"capture": {"dtype": "float16"}}},
    }
    assert shared == {"dtype": "auto"}


def test_without_auto_pytorch_is_not_asked(written: Path) -> None:
    text = written.read_text().replace("dtype: auto", "dtype: float32").replace("bf16: auto", "bf16: false")
    written.write_text(text)
    asks = "import sys\nfrom pathlib import Path\nfrom fusechat.pipeline import load_recipe\n"
    asks += "load_recipe(Path(sys.argv[1]))\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asks, str(written)], check=False).returncode == 0


def test_elsewhere_auto_is_refused(written: Path) -> None:
    ended = runs.here("run", written, "--set", "merge.dtype=auto")
    assert ended.returncode == 2
    assert "merge.dtype" in ended.stderr


@pytest.mark.parametrize("name", ["quickstart.yaml", "laptop.yaml"])
def test_examples_for_a_cpu_suit_every_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for has, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(core_models, "computes_bfloat16", lambda device, has=has: has)
        recipe = load_recipe(EXAMPLES / name)
        assert (recipe.capture.dtype, recipe.evaluate.dtype) == (expected, expected)
        assert recipe.fuse.training["bf16"] is has


def test_a_slow_choice_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    line = "this CPU has no arithmetic for bfloat16: float32 is several times faster (dtype: auto chooses)"
    for has, dtype, said in ((True, "bfloat16", 0), (False, "float32", 0), (False, "bfloat16", 1)):
        core_models._say_slow.cache_clear()
        caplog.clear()
        monkeypatch.setattr(core_models, "computes_bfloat16", lambda device, has=has: has)
        with caplog.at_level(logging.INFO, "fusechat"):
            for _ in range(2):
                core_models.load_model(tmp_path / "model", dtype=dtype, device=CPU)
        assert [record.getMessage() for record in caplog.records].count(line) == said


def test_a_plan_takes_what_suits_the_planned_device(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_models, "computes_bfloat16", lambda device: False)
    recipe = runs.write_recipe(tmp_path, models)

    def plan(device: str, dtype: str) -> tuple[list[int], list[str]]:
        changes = [f"--set=capture.dtype={dtype}", f"--set=evaluate.dtype={dtype}"]
        found = json.loads(runs.here("plan", recipe, "--device", device, "--json", *changes).stdout)
        captures = [step["memory"] for step in found["steps"] if step["stage"] == "capture"]
        return captures, [note for note in found["notes"] if "bfloat16" in note]

    for device, same, other in (("h100", "bfloat16", "float32"), ("cpu", "float32", "bfloat16")):
        (automatic, silent), (named, _), (different, told) = (plan(device, dtype) for dtype in ("auto", same, other))
        assert automatic == named != different
        assert silent == []
        slow = "capture.dtype, evaluate.dtype: cpu has no arithmetic for bfloat16; `auto` takes float32, several times faster here"
        assert told == ([slow] if device == "cpu" else [])
