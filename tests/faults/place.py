"""Where faults are tried: tiny models and a recipe, an undisturbed run by each way to launch one, and what came of a fault."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import runs
import tiny
from faults.children import LIMIT, At, Run, start
from fusechat.recipe.schema import STAGES
from fusechat.run.files import digest

LAUNCHES = {"one process": 1, "two processes": 2}
SAME, NAMED, LOST = "same weights", "error that names it, then same weights", "LOST"
# Two processes make up for the accumulation, so that both launches take as many steps. What is checked at resume takes part.
TRAINING = runs.TRAINING | {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "bits_per_byte",
}
# Models that know nothing end no answer; drawn letters end most of theirs. All sources teach on the chosen answers.
GENERATE = {"max_new_tokens": 40, "temperature": 1.0, "samples": 2, "targets": "each"}
STOP = [*"aeioun", " "]
# One of the two targets has rounds; what models that know nothing answer is no alarm.
ROUNDS = {"count": 2, "max_new_tokens": 10, "teacher": {"source": "mistral"}, "stop_on_alarm": False}
MERGE = {"method": "sce", "select_topk": 0.5, "granularity": "layer"}


@dataclass
class Fault:
    """Something that was done to a run, and what came of it. `others`: files next to the models that came out different."""

    kind: str
    launch: str
    stage: str
    what: str
    outcome: str = ""
    why: str = ""
    others: list[str] = field(default_factory=list)


@dataclass
class Reference:
    """What an undisturbed run wrote, and how it got there."""

    workdir: Path
    digests: dict[str, str]
    operations: list[dict[str, int]]  # of each rank, by stage
    seconds: dict[str, float]


class Place:
    """A scratch directory, with all that is tried in it."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self.scratch, self.seed = scratch.resolve(), seed
        self.faults: list[Fault] = []
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        models = {kind: tiny.build(kind, self.scratch / "models" / kind) for kind in tiny.KINDS}
        fuse = {"sft_weight": 0.5, "training": TRAINING}
        sources = {
            "mistral": {"model": str(models["mistral"]), "stop": STOP},
            "gemma": {"model": str(models["gemma"]), "chat_template": tiny.TEMPLATE, "stop": STOP},
        }
        changes = {"fuse": fuse, "merge": MERGE, "generate": GENERATE, "rounds": ROUNDS, "sources": sources}
        self.recipe = runs.write_recipe(self.scratch, models, **changes)
        self.references = {launch: self._reference(launch) for launch in LAUNCHES}

    def chance(self, *what: object) -> random.Random:
        """A source of chance for one fault, the same in every run of one seed."""
        return random.Random(f"{self.seed}/{'/'.join(map(str, what))}")

    def begin(
        self, workdir: Path, launch: str, *, at: At | None = None, before: Callable[[], Any] | None = None
    ) -> Run:
        arguments: list[str | Path] = ["run", self.recipe, "--workdir", workdir]
        if LAUNCHES[launch] > 1:
            arguments += ["--set", "fuse.training.gradient_accumulation_steps=1"]
        said = workdir.parent / f"{workdir.name}.{len(list(workdir.parent.glob(f'{workdir.name}.*.said')))}.said"
        if workdir.parent != self.scratch:
            said = self.scratch / f"{workdir.parent.name}-{said.name}"
        return start(arguments, workdir, said, ranks=LAUNCHES[launch], at=at, before=before)

    def run(self, workdir: Path, launch: str, **options: Any) -> Run:
        """A run to its end."""
        run = self.begin(workdir, launch, **options)
        run.wait()
        return run

    def _reference(self, launch: str) -> Reference:
        workdir = self.scratch / f"reference-{LAUNCHES[launch]}"
        run = self.run(workdir, launch)
        if not run.done:
            raise SystemExit(f"an undisturbed run of {launch} {run.end()}")
        ends = [*(run.began[stage] for stage in STAGES[1:]), run.began[STAGES[-1]] + 0.2]
        seconds = {stage: end - run.began[stage] for stage, end in zip(STAGES, ends, strict=True)}
        return Reference(workdir, runs.digests(workdir), run.operations, seconds)

    def copy(self, launch: str, name: str) -> Path:
        """A copy of the undisturbed run, which may be harmed."""
        return Path(shutil.copytree(self.references[launch].workdir, self.scratch / name))

    def note(self, fault: Fault, outcome: str, why: str = "", others: list[str] | None = None) -> None:
        """Keeps what came of a fault, in a file too, as it comes."""
        fault.outcome, fault.why, fault.others = outcome, why, others or []
        self.faults.append(fault)
        with (self.scratch / "faults.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(fault)) + "\n")

    def differing(self, workdir: Path, launch: str) -> tuple[list[str], list[str]]:
        """Files that are not those of the undisturbed run: of models, and others."""
        expected, found = self.references[launch].digests, runs.digests(workdir)
        names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        models = [name for name in names if "/model/" in name]
        return models, [name for name in names if name not in models]

    def judge(self, fault: Fault, workdir: Path, launch: str, named: tuple[Path, ...] = ()) -> str:
        """The next run, after a fault: what comes of it. `named`: what an error has to name, one of them; it is then removed."""
        run = self.run(workdir, launch)
        errors = run.errors()
        if not run.done:
            told = [path for path in named if any(str(path) in line for line in errors)]
            if not told:
                self.note(fault, LOST, run.end())
                return LOST
            _remove(told[0])
            run = self.run(workdir, launch)
            if not run.done:
                self.note(fault, LOST, f"{errors}, and once that is removed {run.end()}")
                return LOST
        models, others = self.differing(workdir, launch)
        outcome = LOST if models else NAMED if errors else SAME
        self.note(fault, outcome, f"differs: {', '.join(models)}" if models else "; ".join(errors), others)
        return outcome


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fused(workdir: Path) -> str:
    """SHA-256 of the fused weights."""
    return digest(workdir / "merge" / "model" / "model.safetensors")


__all__ = ["LAUNCHES", "LIMIT", "LOST", "NAMED", "SAME", "Fault", "Place", "Reference", "fused"]
