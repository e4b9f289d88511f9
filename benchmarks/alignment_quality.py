"""The quality of every strategy of alignment, on two real models in both directions: `make bench-alignment`.

Takes the directory of `gsm8k_train.jsonl`, `gsm8k_test.jsonl`, `mbpp.jsonl`, `oasst_threads.jsonl`. Maps are counted on the first
part of each set and measured on the other one. Prints the tables of docs/results/alignment.md; the figures are kept in
`runs/alignment/<direction>.json`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from fusechat.commands.compare_alignments import evaluate_alignment, strategy_name
from fusechat.pipeline import load_recipe
from fusechat.run.progress import setup_logging

ROOT = Path(__file__).parents[1]
ROOM = ROOT / "runs" / "alignment"
TOP_KS = [10, 50]
# Data set → file and lines to count on, file and lines to measure on.
SETS = {
    "mathematics": (("gsm8k_train.jsonl", slice(None)), ("gsm8k_test.jsonl", slice(100))),
    "code": (("mbpp.jsonl", slice(200)), ("mbpp.jsonl", slice(200, None))),
    "dialogue": (("oasst_threads.jsonl", slice(100)), ("oasst_threads.jsonl", slice(100, None))),
}
COLUMNS = {
    "coverage_of_positions": "rows",
    "coverage_of_mass": "mass",
    "common": "common",
    "transferred": "there",
    "own_there": "own",
    "ratio": "ratio",
    "ratio_to_kept": "to kept",
}


def main(data: Path) -> None:
    setup_logging()
    ROOM.mkdir(parents=True, exist_ok=True)
    for name, (train, held_out) in SETS.items():
        cut(data, train, ROOM / f"{name}.train.jsonl")
        cut(data, held_out, ROOM / f"{name}.held-out.jsonl")
    gold = yaml.safe_load((ROOT / "examples" / "gold.yaml").read_text(encoding="utf-8"))
    smollm2 = gold["pivot"]
    gemma = {key: value for key, value in next(iter(gold["sources"].values())).items() if key != "data"}
    for title, pivot, source in (("SmolLM2 ← Gemma 3", smollm2, gemma), ("Gemma 3 ← SmolLM2", gemma, smollm2)):
        records = direction(title.replace(" ", "").replace("←", "-from-").lower(), pivot, source)
        for name in SETS:
            print_table(f"{title}, {name}", [record for record in records if record["source"] == name])


def cut(data: Path, part: tuple[str, slice], target: Path) -> None:
    file, lines = part
    target.write_text("\n".join((data / file).read_text(encoding="utf-8").splitlines()[lines]) + "\n", encoding="utf-8")


def direction(name: str, pivot: dict[str, Any], source: dict[str, Any]) -> list[dict[str, Any]]:
    """All figures of one pivot and one source, each data set as a source of its own."""
    recipe = ROOM / f"{name}.yaml"
    sources = {
        each: {**source, "data": {"train": f"{each}.train.jsonl", "validation": f"{each}.held-out.jsonl"}}
        for each in SETS
    }
    raw = {"name": name, "pivot": pivot, "sources": sources, "align": {"min_mass": 0.0}}
    recipe.write_text(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True), encoding="utf-8")
    records = evaluate_alignment(load_recipe(recipe), ROOM / name, top_ks=TOP_KS)
    (ROOM / f"{name}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    return records


def print_table(title: str, records: list[dict[str, Any]]) -> None:
    print(f"\n**{title}**: the source's own {records[0]['own']:.3f} bits per byte\n")
    print("| strategy |" + "".join(f" k={k} {name} |" for k in TOP_KS for name in COLUMNS.values()))
    print("| --- |" + " ---: |" * (len(TOP_KS) * len(COLUMNS)))
    for name in dict.fromkeys(map(strategy_name, records)):
        rows = {record["k"]: record for record in records if strategy_name(record) == name}
        print(f"| {name} |" + "".join(f" {rows[k][key]:.3f} |" for k in TOP_KS for key in COLUMNS))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "data")
