"""Several GGUF files are converted at once, as many as memory has room for; what a conversion that failed said is told."""

import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from fusechat.models import gguf_parallel as gguf_together
from fusechat.models.gguf import converted
from fusechat.models.gguf_header import weights
from fusechat.models.gguf_parallel import convert_together
from fusechat.models.reference import Reference
from fusechat.run.progress import log
from test_wheels import write_gguf


@pytest.fixture(scope="module")
def files(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("gguf")
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    return [
        write_gguf(directory / f"{name}.gguf", tiny.model_of("llama", tokenizer, seed=number), tokenizer)
        for number, name in enumerate(("one", "two"))
    ]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSECHAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_conversion_that_memory_has_no_room_for_waits(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large one and two small ones the small ones run together, and the large one by itself. Who waits says so."""
    sizes = {"small": 400_000_000, "other": 500_000_000, "large": 1_400_000_000}
    code = (
        "import json, sys, time; (name,), _ = json.loads(sys.argv[1]);"
        "print('a library says something');"
        f"print({sizes}[name.rpartition('/')[2][:5]], flush=True); sys.stdin.readline(); time.sleep(0.3)"
    )
    running: list[str] = []
    together: list[set[str]] = []
    go, tell = gguf_together._Conversion.go, gguf_together._Conversion.tell

    def counted_go(one: Any) -> None:
        running.append(one.reference.label)
        together.append(set(running))
        go(one)

    def counted_tell(one: Any) -> None:
        running.remove(one.reference.label)
        tell(one)

    for name in sizes:
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF" + name.encode())
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(gguf_together, "_CODE", code)
    monkeypatch.setattr(gguf_together, "free_bytes", lambda: 1_000_000_000)
    monkeypatch.setattr(gguf_together._Conversion, "go", counted_go)
    monkeypatch.setattr(gguf_together._Conversion, "tell", counted_tell)
    with caplog.at_level(logging.INFO, "fusechat"):
        convert_together([Reference((str(tmp_path / f"{name}.gguf"),)) for name in sizes])
    assert [names for names in together if "large" in names] == [{"large"}]
    assert len(together) == 3
    told = [record.getMessage() for record in caplog.records]
    assert any("waits for memory: converting it takes " in one and "1.0 GB were free" in one for one in told)


def test_a_conversion_of_its_own_asks_and_says_what_is_wrong(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    monkeypatch.setattr(sys, "argv", ["-c", json.dumps([[str(bad)], None])])
    for leave, status, said in (("\n", 2, f"{bad}: Transformers cannot read this GGUF file: "), ("", 1, "")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(leave))
        with pytest.raises(SystemExit) as ended:
            gguf_together.main()
        assert ended.value.code == status
        shown = capsys.readouterr()
        assert int(shown.out) == 1_000_000_000 + 104 + weights(bad)
        assert shown.err.startswith(said)


def test_what_a_conversion_said_before_it_was_ended_is_shown(
    files: list[Path], cache: Path, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = "import os, sys; print('going', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    monkeypatch.setattr(gguf_together, "_CODE", ends)
    convert_together([Reference((str(path),)) for path in files])
    said = "converting {} was ended by signal 9, and is tried again by itself: going"
    assert sorted(heard) == [said.format(name) for name in ("one", "two")]


def test_a_conversion_that_memory_has_no_room_for_by_itself_says_so(
    files: list[Path], cache: Path, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusechat.models.gguf.free_bytes", lambda: 900_000_000)
    assert (converted(Reference((str(files[0]),))) / "model.safetensors").is_file()
    [line] = heard
    assert line.startswith("one: converting it takes 1.0 GB of memory, and 900.0 MB are free")


def test_the_weights_of_a_file_are_counted_by_its_header(
    models: dict[str, Path], files: list[Path], tmp_path: Path
) -> None:
    """Against the model itself, whose output layer is its embedding."""
    model = AutoModelForCausalLM.from_pretrained(models["llama"])
    assert weights(files[0]) == 4 * sum(parameter.numel() for parameter in model.parameters())
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(files[0].read_bytes()[:1000])
    assert weights(cut) == 8000
