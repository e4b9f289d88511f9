"""The same on two real models: SmolLM2-135M-Instruct taught by Gemma 3 270M, which first learns two specialities.

    python -m miniature.real DATA [--workdir DIR] [--docs DIR]

DATA has `gsm8k_train.jsonl`, `gsm8k_test.jsonl`, `mbpp.jsonl` and `oasst_threads.jsonl`, conversations in `messages` form. All is
done twice, as in the miniature: on the answers as they are, and with the last answer of every fifth conversation taken from another
one. Less than an hour on two cores; finished work is not repeated.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fusechat.commands.run import run
from fusechat.evaluate.bits_per_byte import compare
from fusechat.evaluate.statistics import Estimate, paired_difference, ratio
from fusechat.pipeline import load_recipe
from fusechat.report.intervals import half_width
from fusechat.run.files import write_json

# Conversations by file and lines: those that teach the source its speciality, those of the fusion, those held out.
SETS = {
    "mathematics": {
        "school": ("gsm8k_train", 0, 80),
        "train": ("gsm8k_train", 1000, 1050),
        "held-out": ("gsm8k_test", 0, 30),
    },
    "code": {"school": ("mbpp", 0, 80), "train": ("mbpp", 120, 170), "held-out": ("mbpp", 220, 250)},
    "dialogue": {"train": ("oasst_threads", 0, 20), "held-out": ("oasst_threads", 100, 115)},
}
GOLD = Path(__file__).parents[2] / "examples" / "gold.yaml"
TRAINING: dict[str, Any] = {
    "learning_rate": 3e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "per_device_train_batch_size": 4,
    "bf16": True,
    "save_strategy": "epoch",
    "save_total_limit": 1,
}
FUSION: dict[str, Any] = {"sft_weight": 0.3, "training": {**TRAINING, "num_train_epochs": 2}}
TOPKS = (1.0, 0.5, 0.1)  # of SCE
COMMON: dict[str, Any] = {"data": {"max_length": 512}, "evaluate": {"answers": 0, "batch_tokens": 1024}}
Rows = dict[str, dict[str, list[str]]]  # set → model → its three cells
PAGE = """\
# Two real models

This page has the figures of fusion on two real models: SmolLM2-135M-Instruct is the pivot, Gemma 3 270M the source.
[Results](../results.md) says what they show.

```
PYTHONPATH=benchmarks .venv/bin/python -m miniature.real DATA --docs docs
```

`DATA` is a directory with the files of this table, with conversations in `messages` form. The command took 30 minutes
on two cores. It does not repeat finished work.

{sets}

- **Source.** For mathematics and code, Gemma 3 is first fine-tuned for one epoch on other conversations (*first*). For
  dialogue it is used as it is.
- **Fusion.** {epochs} epochs on {conversations} conversations in all (*fusion*), each with at most {length} tokens,
  `fuse.sft_weight: {weight}`.
  Each part is one run, so the figures say nothing about other seeds.
- **Wrong answers.** In the second part, the last answer of every fifth training conversation is that of another one.
- **Figures.** Bits per byte of held-out responses, lower is better, with 95% intervals over conversations. "- pivot"
  and "- SFT" are the paired differences to the pivot and to `target-sft`.
- **Rows.** `target-sft` is plain fine-tuning on the conversations of all sources. All sources teach
  `target-many-to-one`. One source teaches each other target. "fused, τ N" merges these other targets by SCE with
  `merge.select_topk: N`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="miniature.real", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--workdir", type=Path, default=Path("runs/miniature/real"))
    parser.add_argument("--docs", type=Path, help="where the page goes, as results/real.md; it is printed too")
    given = parser.parse_args()
    work = given.workdir.resolve()
    sets = write_sets(given.data, work / "data")
    pivot, gemma = quickstart_models()
    sources = {}
    for name, files in sets.items():
        teacher = school(name, gemma, files["school"], work) if "school" in files else gemma
        sources[name] = {**teacher, "data": {"train": files["train"], "validation": files["held-out"]}}
    recipe = {"name": "right", "pivot": pivot, "sources": sources, "targets": {"many-to-one": list(sets), "sft": []}}
    recipe |= {**COMMON, "fuse": FUSION}
    fuse(recipe, work / "right")
    for one in sources.values():
        one["data"]["train"] = spoil(Path(one["data"]["train"]))
    fuse({**recipe, "name": "wrong"}, work / "wrong")
    text = page(*(rows(work / name, list(sets)) for name in ("right", "wrong")))
    print(text)
    if given.docs:
        (given.docs / "results").mkdir(parents=True, exist_ok=True)
        (given.docs / "results" / "real.md").write_text(text, encoding="utf-8")


def quickstart_models() -> tuple[dict[str, Any], dict[str, Any]]:
    """Pivot and source as the recipe names them."""
    recipe = yaml.safe_load(GOLD.read_text())
    gemma = next(iter(recipe["sources"].values()))
    return recipe["pivot"], {key: gemma[key] for key in ("wheel", "sha256", "chat_template")}


def write_sets(data: Path, out: Path) -> dict[str, dict[str, str]]:
    """The files of each set, by what they are for."""
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, str]] = {}
    for name, parts in SETS.items():
        for use, (file, first, last) in parts.items():
            lines = (data / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()[first:last]
            path = out / f"{name}.{use}.jsonl"
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            found.setdefault(name, {})[use] = str(path)
    return found


def spoil(conversations: Path) -> str:
    """A copy of the file in which every fifth conversation ends with the last answer of the next such one."""
    whole = [json.loads(line) for line in conversations.read_text(encoding="utf-8").splitlines()]
    chosen = whole[::5]
    answers = [one["messages"][-1]["content"] for one in chosen]
    for one, answer in zip(chosen, [*answers[1:], answers[0]], strict=True):
        one["messages"][-1]["content"] = answer
    path = conversations.with_name(f"{conversations.stem}.spoilt.jsonl")
    path.write_text("".join(json.dumps(one) + "\n" for one in whole), encoding="utf-8")
    return str(path)


def school(name: str, model: dict[str, Any], conversations: str, work: Path) -> dict[str, Any]:
    """The model, fine-tuned on its speciality: plain fine-tuning of a pivot."""
    recipe = {"name": f"school-{name}", "pivot": model, "sources": {"none": model}, "targets": {"sft": []}, **COMMON}
    recipe["data"] = {**COMMON["data"], "train": conversations}
    recipe["fuse"] = {"training": {**TRAINING, "num_train_epochs": 1}}
    taught = work / f"{name}-source"
    if not taught.is_dir():
        follow(recipe, work / f"school-{name}", until="fuse", only="sft")
        shutil.move(work / f"school-{name}" / "fuse" / "sft" / "model", taught)
        shutil.rmtree(work / f"school-{name}")
    return {"model": str(taught)}


def fuse(recipe: dict[str, Any], workdir: Path) -> None:
    """The whole recipe; then its targets merged once more for each other τ, of which only the scores are kept."""
    for topk in TOPKS:
        scores = workdir.with_name(f"{workdir.name}-{topk:g}.json")
        if not scores.is_file():
            follow({**recipe, "merge": {"method": "sce", "select_topk": topk}}, workdir)
            write_json(scores, _scores(workdir / "evaluate" / "fused"))


def follow(recipe: dict[str, Any], workdir: Path, **options: Any) -> None:
    path = workdir.with_name(f"{workdir.name}.yaml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    run(load_recipe(path), workdir, **options)


def rows(workdir: Path, sets: list[str]) -> Rows:
    """Bits per byte of held-out responses with 95% intervals, and paired differences to pivot and plain fine-tuning."""
    measured = sorted({path.parent for path in (workdir / "evaluate").glob("*/*-held-out.json")})
    scores = {directory.name: _scores(directory) for directory in measured}
    fused = {f"fused, τ {topk:g}": workdir.with_name(f"{workdir.name}-{topk:g}.json") for topk in TOPKS}
    scores |= {name: json.loads(path.read_text()) for name, path in fused.items()}
    sources, targets = ([f"{role}-{name}" for name in sets] for role in ("source", "target"))
    order = ["pivot", *sources, "target-sft", "target-many-to-one", *targets, *fused]
    by_set = {name: compare({model: found[f"{name}-held-out"] for model, found in scores.items()}) for name in sets}
    return {name: {model: _cells(model, by_set[name]) for model in order if model in scores} for name in sets}


def page(right: Rows, wrong: Rows) -> str:
    """The page: how it was measured, then a table for each set, with the answers as they are and with wrong ones."""
    uses = ("school", "train", "held-out")
    sets = ["| set | files | first | fusion | held out |", "| --- | --- | ---: | ---: | ---: |"]
    for name, parts in SETS.items():
        files = dict.fromkeys(f"`{file}.jsonl`" for file, _, _ in parts.values())
        counts = [str(parts[use][2] - parts[use][1]) if use in parts else "" for use in uses]
        sets.append(f"| {' | '.join([name, ', '.join(files), *counts])} |")
    text = PAGE.format(
        sets="\n".join(sets),
        epochs=FUSION["training"]["num_train_epochs"],
        conversations=sum(parts["train"][2] - parts["train"][1] for parts in SETS.values()),
        length=COMMON["data"]["max_length"],
        weight=FUSION["sft_weight"],
    )
    for title, found in (("Answers as they are", right), ("Every fifth answer wrong", wrong)):
        text += f"\n## {title}\n"
        for name, cells in found.items():
            lines = [f"| {name} | bits per byte | - pivot | - SFT |", "| --- | ---: | ---: | ---: |"]
            lines += [f"| {' | '.join([model, *each])} |" for model, each in cells.items()]
            text += "\n" + "\n".join(lines) + "\n"
    return text


def _scores(directory: Path) -> dict[str, Any]:
    """What a model scored, by data set."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*-held-out.json"))}


def _cells(model: str, compared: Mapping[str, Any]) -> list[str]:
    items = compared[model].items
    others = (compared[name].items for name in ("pivot", "target-sft"))
    differences = ("" if items == other else _text(paired_difference(items, other), "+") for other in others)
    return [_text(ratio(items)), *differences]


def _text(found: Estimate, sign: str = "") -> str:
    return f"{found.value:{sign}.4f} ± {half_width(found.n) * (found.standard_error or 0):.4f}"


if __name__ == "__main__":
    main()
