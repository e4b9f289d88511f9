"""Recipes of tiny models, and what a finished work directory holds, for tests that run the whole pipeline."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import yaml

import tiny

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
    """Runs the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fusechat", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        timeout=900,
    )


def here(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """As `fusechat`, in this process, which has imported already what takes seconds to import."""
    from fusechat.commands.cli import main

    before, out, err = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = ["fusechat", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        status: Any = 0
    except SystemExit as ended:
        status = ended.code
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(list(arguments), status or 0, out.getvalue(), err.getvalue())


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
