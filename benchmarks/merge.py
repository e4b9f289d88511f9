"""Merging by mergekit and by FuseChat, the same generated models and configurations in one run: `make bench-merge`.

Prints the tables of docs/results/merging.md: time and peak memory of both commands, compared with reading all inputs and writing
the output once, and how far what they store is from a reference in float64. `--scale small` is a quick look: its times are those
of starting up, and of compiling where nothing was compiled before.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from merging.cases import CASES, Case, compare, sample
from merging.models import BASE, SCALES, WEIGHTS, make_models
from merging.running import Run, read_once, run, write_once
from merging.tables import FUSECHAT, MERGEKIT, Result, tables

OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> None:
    options = parse()
    cases = chosen(options.methods)
    shape, models = SCALES[options.scale], options.models / options.scale
    commands = {FUSECHAT: [sys.executable, "-m", "fusechat", "merge", "--json"]}
    if not options.without_mergekit:
        commands = {MERGEKIT: [str(mergekit_command(options.mergekit))], **commands}
    tensors = sample(shape, options.sample)
    make_models(models, shape)
    about = describe(options, tensors)
    print("\n".join(about), flush=True)
    results = []
    for case in cases:
        result = measure(case, options, commands, tensors)
        tools = ", ".join(f"{tool} {run.seconds:.1f} s" for tool, run in result.runs.items())
        print(f"{case.name}: {tools}", file=sys.stderr, flush=True)
        results.append(result)
        if options.json:  # after every method, as the next one may fail
            content = {"about": about, "results": [asdict(result) for result in results]}
            options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for table in tables(results, list(commands)):
        print(f"\n{table}", flush=True)


def parse() -> argparse.Namespace:
    room = Path(tempfile.gettempdir()) / "fusechat-merge-benchmark"
    parser = argparse.ArgumentParser(description="mergekit and FuseChat side by side.")
    parser.add_argument("--models", type=Path, default=room, help="where models are made and kept [%(default)s]")
    parser.add_argument("--scale", choices=SCALES, default="full", help="models of 0.51B parameters, or tiny ones")
    parser.add_argument("--methods", default="all", metavar="A,B", help="names of the table's first column, or methods")
    parser.add_argument("--mergekit", metavar="PATH", help="the command mergekit-yaml [next to Python, or on the PATH]")
    parser.add_argument("--without-mergekit", action="store_true", help="FuseChat alone")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="FuseChat's least of N runs [%(default)s]")
    parser.add_argument("--repeat-mergekit", type=int, default=1, metavar="N", help="mergekit's [%(default)s]")
    parser.add_argument("--sample", type=int, default=12, metavar="N", help="compare the embedding and N more tensors")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args()
    options.models = options.models.absolute()  # the tools need not agree on what a path is relative to
    return options


def mergekit_command(given: str | None) -> Path:
    """Raises SystemExit where there is none."""
    beside = Path(sys.executable).parent / "mergekit-yaml"
    found = shutil.which(given or str(beside)) or (None if given else shutil.which("mergekit-yaml"))
    if found is None:
        where = given or f"neither next to {sys.executable} nor on the PATH"
        raise SystemExit(f"mergekit-yaml: {where}; pip install 'fusechat[mergekit]', or say --without-mergekit")
    return Path(found).absolute()


def chosen(names: str) -> list[Case]:
    wanted = set(names.split(","))
    known = {each for case in CASES for each in (case.name, case.method)} | {"all"}
    if wanted - known:
        raise SystemExit(f"--methods: {', '.join(sorted(wanted - known))}; known are {', '.join(sorted(known))}")
    return [case for case in CASES if wanted & {case.name, case.method, "all"}]


def describe(options: argparse.Namespace, tensors: list[str]) -> list[str]:
    """What the figures below were measured on."""
    shape = SCALES[options.scale]
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "numba", "torch")]
    if not options.without_mergekit:
        python = mergekit_command(options.mergekit).parent / "python"
        code = "from importlib.metadata import version as v; print('mergekit', v('mergekit'), 'with torch', v('torch'))"
        versions.append(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    elements = shape.tensors()
    compared = sum(math.prod(elements[name]) for name in tensors)
    return [
        f"- six bfloat16 models of {shape.parameters / 1e9:.2g}B parameters; {os.cpu_count()} cores; {'; '.join(versions)}",
        f"- FuseChat's time is the least of {options.repeat}, mergekit's of {options.repeat_mergekit}",
        f"- compared with float64: {len(tensors)} of {len(elements)} tensors, {compared:,} elements "
        f"({compared / shape.parameters:.0%}): {', '.join(tensors)}",
    ]


def measure(case: Case, options: argparse.Namespace, commands: dict[str, list[str]], tensors: list[str]) -> Result:
    """Runs the tools by turns, then compares what they wrote, and removes it."""
    models = options.models / options.scale
    files = [model / WEIGHTS for model in case.inputs(models)]
    with tempfile.TemporaryDirectory(dir=options.models) as name:
        room = Path(name)
        config, environment, first = room / "config.yaml", dict(OFFLINE), None
        if options.scale != "small":
            environment["NUMBA_CACHE_DIR"] = str(room / "compiled")
            first = first_call(case, options.models / "small", room, commands[FUSECHAT], environment)
        case.write_configuration(config, models)
        read_once(files)  # from the disk
        reading = read_once(files)
        writing = write_once(room / "written", (models / BASE / WEIGHTS).stat().st_size)
        repeats = {MERGEKIT: options.repeat_mergekit if case.in_mergekit else 0, FUSECHAT: options.repeat}
        runs: dict[str, list[Run]] = {}
        inside: list[float] = []
        for turn in range(max(repeats.values())):
            for tool, command in commands.items():
                if turn < repeats[tool]:
                    output = room / tool
                    shutil.rmtree(output, ignore_errors=True)
                    done = run([*command, str(config), str(output)], environment, room / f"{tool}.json")
                    runs.setdefault(tool, []).append(done)
                    if tool == FUSECHAT:
                        inside.append(json.loads((room / f"{tool}.json").read_text(encoding="utf-8"))["seconds"])
        return Result(
            case=case.name,
            random=case.random,
            runs={tool: min(several, key=lambda each: each.seconds) for tool, several in runs.items()},
            inside=min(inside),
            reading=reading,
            writing=writing,
            differences=compare(case, models, {tool: room / tool for tool in runs}, tensors),
            first=first,
        )


def first_call(
    case: Case, models: Path, room: Path, command: list[str], environment: dict[str, str]
) -> tuple[float, float]:
    """Seconds of a merge of small models with nothing compiled before, and of the same once more."""
    make_models(models, SCALES["small"])
    config = room / "small.yaml"
    case.write_configuration(config, models)
    seconds = []
    for turn in ("first", "second"):
        done = run([*command, str(config), str(room / turn)], environment, room / f"{turn}.json")
        seconds.append(done.seconds)
    return seconds[0], seconds[1]


if __name__ == "__main__":
    main()
