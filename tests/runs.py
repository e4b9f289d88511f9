"""Recipes of tiny models, and what a finished work directory holds, for tests that run the whole pipeline."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

import tiny
from fusechat.recipe.schema import STAGES
from fusechat.run.progress import log

SOURCES = ("mistral", "gemma")
TRAINING = {
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
}


def write_conversations(path: Path, count: int, first: int = 0) -> Path:
    """Conversations of one and two turns, some with a system message, no two alike."""
    lines = []
    for number in range(first, first + count):
        messages = [{"role": "system", "content": "Be short."}] if number % 3 == 0 else []
        messages += [
            {"role": "user", "content": f"What is {number} + {number + 1}?"},
            {"role": "assistant", "content": f"The answer is {2 * number + 1}, größer als {number}. 🙂"},
        ]
        if number % 2:
            messages += [
                {"role": "user", "content": "And twice that?"},
                {"role": "assistant", "content": f"  Twice that is {4 * number + 2}: 你好, París!"},
            ]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_recipe(directory: Path, models: dict[str, Path], **changes: Any) -> Path:
    """A recipe of the llama pivot with two sources, one on data of its own; `changes` replace whole sections."""
    write_conversations(directory / "train.jsonl", 10)
    write_conversations(directory / "own.jsonl", 8, first=100)
    write_conversations(directory / "held-out.jsonl", 5, first=200)
    recipe = {
        "name": "tiny",
        "pivot": str(models["llama"]),
        "sources": {
            "mistral": str(models["mistral"]),
            "gemma": {
                "model": str(models["gemma"]),
                "chat_template": tiny.TEMPLATE,
                "data": {"train": "own.jsonl", "validation": "own-held-out.jsonl"},
            },
        },
        "data": {"train": "train.jsonl", "validation": "held-out.jsonl", "max_length": 256},
        "capture": {"top_k": 6, "dtype": "float32", "shard_conversations": 4, "batch_tokens": 300},
        "align": {"min_mass": 0.0},  # untrained models are sure of nothing
        "fuse": {"sft_weight": 0.5, "training": TRAINING},
        "merge": {"method": "sce", "select_topk": 0.5},
        "evaluate": {"dtype": "float32", "answers": 3, "answer_tokens": 12},
        "device": "cpu",
    }
    write_conversations(directory / "own-held-out.jsonl", 4, first=300)
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def finish(recipe: Path, steps: int) -> None:
    """A whole run of so many steps, in `work` next to the recipe, whose data get absolute paths: a copy of both is finished too."""
    from fusechat.commands.run import run
    from fusechat.pipeline import load_recipe

    recipe.write_text(re.sub(r"[\w-]+\.jsonl", rf"{recipe.parent}/\g<0>", recipe.read_text()))
    assert run(load_recipe(recipe), recipe.parent / "work") == steps


def cut(work: Path, after: str) -> Path:
    """A work directory as if the run had ended with the stage `after`."""
    for stage in STAGES[STAGES.index(after) + 1 :]:
        shutil.rmtree(work / stage, ignore_errors=True)
    return work


def digests(workdir: Path) -> dict[str, str]:
    """SHA-256 of every artifact, without the timings that manifests record and that the page's table of costs shows."""
    found = {}
    for file in sorted(workdir.rglob("*")):
        if file.is_file() and not file.name.endswith(".lock"):
            data = file.read_bytes()
            if file.name == "manifest.json":
                manifest = json.loads(data)
                del manifest["timings"]
                manifest.pop("checksum", None)  # which is of the timings too
                if manifest["stage"] == "report":  # the page's size and checksum change with the times in it
                    manifest["outputs"] = manifest["counts"] = sorted(manifest["outputs"])
                data = json.dumps(manifest, sort_keys=True).encode()
            if file == workdir / "report" / "index.html":
                data, costs = re.subn(rb'<section id="costs".*?</section>', b"", data, flags=re.DOTALL)
                assert costs == 1
            found[str(file.relative_to(workdir))] = hashlib.sha256(data).hexdigest()
    return found


def fusechat(*arguments: str | Path, stdin: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own that begins with nothing imported, which takes seconds."""
    return subprocess.run(
        [sys.executable, "-m", "fusechat", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        timeout=1800,
    )


def here(*arguments: str | Path, stdin: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line in this process, which has imported everything already."""
    from fusechat.commands.cli import main

    state = log.handlers[:], log.level, log.propagate
    out, err, status = io.StringIO(), io.StringIO(), 0
    try:
        with (
            mock.patch.object(sys, "argv", ["fusechat", *map(str, arguments)]),
            mock.patch.object(sys, "stdin", sys.stdin if stdin is None else io.StringIO(stdin)),
            mock.patch.dict(os.environ, {"COLUMNS": "80"} | environment),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        log.handlers[:], log.level, log.propagate = state
    return subprocess.CompletedProcess(list(arguments), status, out.getvalue(), err.getvalue())


def on_a_terminal(columns: int, *arguments: str | Path) -> str:
    """What the command line writes, stdout and stderr, to a terminal of so many columns. It ends with status 0."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "fusechat", *map(str, arguments)],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment | {"TERM": "xterm-256color"},
    )
    os.close(follower)
    written = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        written += chunk
    os.close(leader)
    assert process.wait(timeout=60) == 0, written
    return written.decode(errors="replace").replace("\r\n", "\n")
