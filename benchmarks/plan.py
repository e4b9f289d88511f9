"""What `fusechat plan` predicts, compared with what happens; and its table of the paper's recipe.

    benchmarks/plan.py measure [RECIPE [KEY=VALUE …]]    # of the quickstart without RECIPE
    benchmarks/plan.py paper SHARED                      # SHARED: models.json, tokenizers/, data/oasst_threads.jsonl

`measure` runs the recipe twice, in directories of their own. `paper` plans
`examples/fusechat-7b.yaml` by the six models' true configurations, vocabularies and templates; dialogues of OpenAssistant stand for
those of the recipe.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast

from fusechat.plan.estimate import Estimate
from fusechat.plan.table import COLUMNS, rows

ROOT = Path(__file__).parents[1]
QUICKSTART, PAPER = ROOT / "examples" / "quickstart.yaml", ROOT / "examples" / "fusechat-7b.yaml"
STAGES = ("generate", "prepare", "capture", "align", "fuse", "merge", "evaluate", "report")
NAMES = {
    "pivot": "openchat/openchat_3.5",
    "sources.starling": "berkeley-nest/Starling-LM-7B-alpha",
    "sources.solar": "NousResearch/Nous-Hermes-2-SOLAR-10.7B",
    "sources.internlm": "internlm/internlm2-chat-20b (Llama form)",
    "sources.mixtral": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "sources.qwen": "Qwen/Qwen1.5-72B-Chat",
}


def main() -> None:
    what, *rest = sys.argv[1:] or ["measure"]
    if what == "paper":
        paper(Path(rest[0]))
    else:
        measure(Path(rest[0]) if rest else QUICKSTART, rest[1:])


def measure(recipe: Path, changes: list[str]) -> None:
    """Times are of a run as users start it, all in one process; memory is of a second one, each stage in a process of its own."""
    options = [part for change in changes for part in ("--set", change)]
    with tempfile.TemporaryDirectory(dir=ROOT) as room:
        whole, apart = Path(room) / "whole", Path(room) / "apart"
        began = time.perf_counter()
        plan = json.loads(command("plan", recipe, "--workdir", whole, "--json", *options))
        print(f"the plan took {time.perf_counter() - began:.0f} s\n")
        command("run", recipe, "--workdir", whole, *options)
        stages = [stage for stage in STAGES if any(step["stage"] == stage for step in plan["steps"])]
        for stage in stages:
            command("run", recipe, "--workdir", apart, "--until", stage, *options)
        table(("stage", "", "predicted", "measured", "predicted / measured"))
        for part in (*stages, None):
            for line in compare(plan, whole, apart, part):
                print("| " + " | ".join(line) + " |")


def compare(plan: dict[str, Any], whole: Path, apart: Path, stage: str | None) -> Iterator[tuple[str, ...]]:
    """Lines of one stage, or of all together."""
    planned = [step for step in plan["steps"] if stage in (None, step["stage"])]
    done, alone = manifests(whole, stage), manifests(apart, stage)
    counted = [found["counts"] for found in done.values()]
    label = stage or "all"
    pairs = [
        ("time, s", sum(step["seconds"] for step in planned), sum(one["timings"]["seconds"] for one in done.values())),
        ("disk, MB", sum(step["disk"] for step in planned) / 1e6, sum(map(written, done.items())) / 1e6),
        (
            "memory, GB",
            max(step["memory"] for step in planned) / 1e9,
            max(one["timings"].get("peak_memory_bytes", 0) for one in alone.values()) / 1e9,
        ),
    ]
    if stage == "prepare":
        for name, key in (("tokens", "tokens"), ("response tokens", "response_tokens")):
            pairs.append((name, sum(step[key] for step in planned), sum(one.get(key, 0) for one in counted)))
    for name, predicted, measured in pairs:
        yield (
            label,
            name,
            f"{predicted:,.3f}".rstrip("0").rstrip("."),
            f"{measured:,.3f}".rstrip("0").rstrip("."),
            (f"{predicted / measured:.3f}" if measured else ""),
        )


def manifests(work: Path, stage: str | None) -> dict[Path, dict[str, Any]]:
    every = {path: json.loads(path.read_text()) for path in sorted(work.rglob("manifest.json"))}
    return {path: found for path, found in every.items() if stage in (None, found["stage"])}


def written(entry: tuple[Path, dict[str, Any]]) -> int:
    """Bytes of what a step wrote, its manifest too."""
    path, manifest = entry
    return path.stat().st_size + sum(one["bytes"] for one in manifest["outputs"].values())


def paper(shared: Path) -> None:
    with tempfile.TemporaryDirectory() as room:
        changes = [f"data.train={(shared / 'data' / 'oasst_threads.jsonl').resolve()}"]
        for key, name in NAMES.items():
            model = key if key == "pivot" else f"{key}.model"
            changes.append(f"{model}={build(name, shared, Path(room) / name.split('/')[1].split()[0])}")
        options = [part for change in changes for part in ("--set", change)]
        for conversations, by_stage in ((95_000, False), (10_000_000, True)):
            shown = command("plan", PAPER, "--device", "8xh100", "--conversations", conversations, "--json", *options)
            plan = json.loads(shown)
            print(f"\n{conversations:,} conversations, 8 x h100; problems: {plan['problems'] or 'none'}\n", flush=True)
            table(COLUMNS)
            for line in rows([Estimate(**step) for step in plan["steps"]], by_stage=by_stage):
                print("| " + " | ".join(line) + " |")


def build(name: str, shared: Path, directory: Path) -> Path:
    """Configuration and tokenizer of a model, without weights."""
    known = json.loads((shared / "models.json").read_text())[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(shared / "tokenizers" / known["tokenizer"] / "tokenizer.json"),
        bos_token=known["bos_token"],
        eos_token=known["eos_token"],
    )
    tokenizer.chat_template = known["chat_template"]
    tokenizer.save_pretrained(directory)
    model_class = getattr(transformers, known["class"])
    config = model_class.config_class(**known["config"], architectures=[known["class"]], dtype="bfloat16")
    config.save_pretrained(directory)
    return directory


def command(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fusechat", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 2) or (not done.stdout and arguments[0] == "plan"):
        raise SystemExit(done.stderr)
    return done.stdout


def table(heads: tuple[str, ...]) -> None:
    print("| " + " | ".join(heads) + " |")
    print("| " + " | ".join(["---"] * len(heads)) + " |")


if __name__ == "__main__":
    main()
