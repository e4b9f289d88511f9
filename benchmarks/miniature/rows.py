"""The tables: what stands in each row, as jobs to be done for each seed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from miniature import settings
from miniature.chatters import NOVICE, PIVOT, SOURCES
from miniature.jobs import Job, Measured, Merged, School, Tuning
from miniature.settings import ALL, SFT, Changes

MAIN_SEEDS, OTHER_SEEDS = 5, 3
SCE = {"method": "sce", "select_topk": 1.0}
PAPER_SCE = {"method": "sce", "select_topk": 0.1}
Row = Callable[[int], Measured | Merged]  # of a seed


def targets(changes: Changes, seed: int, sources: list[str] = SOURCES) -> tuple[Tuning, ...]:
    return tuple(Tuning(source, changes, seed) for source in sources)


def fused(changes: Changes | None = None, config: dict[str, Any] = SCE, sources: list[str] = SOURCES) -> Row:
    return lambda seed: Merged(targets(changes or {}, seed, sources), config)


def tuned(target: str, changes: Changes | None = None) -> Row:
    return lambda seed: Measured(Tuning(target, changes or {}, seed))


def soup(changes: Changes | None = None, config: dict[str, Any] = SCE, size: int = len(SOURCES)) -> Row:
    """Plain fine-tuning as many times as there are sources, in other orders, merged: what merging does by itself."""
    return lambda seed: Merged(
        tuple(Tuning(SFT, {**(changes or {}), "order": 100 * (seed + 1) + number}, seed) for number in range(size)),
        config,
    )


def schooled(name: str) -> Row:
    return lambda seed: Measured(School(name))


PIVOT_ROW, SFT_ROW, SFT_LABEL = schooled(PIVOT), tuned(SFT), "SFT"


@dataclass(frozen=True)
class Table:
    """`rows`: by their label. `sft`: plain fine-tuning on the same conversations. `x`: what the labels are a scale of, where they
    are."""

    name: str
    title: str
    rows: Mapping[str, Row]
    seeds: int = OTHER_SEEDS
    sft: Row = SFT_ROW
    x: str = ""

    def beside(self, label: str) -> Row:
        """The plain fine-tuning that a row is compared with."""
        place, colon, _ = label.partition(": ")
        return self.rows[f"{place}: {SFT_LABEL}"] if self.x and colon else self.sft


# Every method with several settings: the table shows each at its best on the validation questions.
METHODS: dict[str, list[dict[str, Any]]] = {
    "SCE": [{"method": "sce", "select_topk": topk} for topk in (1.0, 0.5, 0.1)],
    "SCE, not normalised": [{"method": "sce", "select_topk": topk, "normalize": False} for topk in (1.0, 0.5, 0.1)],
    "linear": [{"method": "linear"}],
    "task arithmetic": [{"method": "task_arithmetic", "weight": weight} for weight in (0.05, 0.1, 0.2, 0.3, 0.4)],
    "TIES": [
        {"method": "ties", "weight": weight, "density": density} for weight in (0.5, 1.0) for density in (1.0, 0.5, 0.2)
    ],
    "DARE": [{"method": "dare_linear", "weight": weight, "density": 0.5} for weight in (0.1, 0.2, 0.3, 0.4)],
    "DARE, TIES": [{"method": "dare_ties", "weight": weight, "density": 0.5} for weight in (0.1, 0.2, 0.4)],
    "VaRM": [{"method": "varm"}],
}


def label(config: Mapping[str, Any]) -> str:
    """A method's settings in a few words."""
    words = {"select_topk": "τ", "weight": "weight", "density": "density"}
    return ", ".join(f"{word} {config[key]:g}" for key, word in words.items() if key in config)


def merged_rows(changes: Changes) -> dict[str, Row]:
    return {
        f"fused, {method}; {label(one)}": fused(changes, one) for method, several in METHODS.items() for one in several
    }


def soup_rows(changes: Changes) -> dict[str, Row]:
    return {
        f"SFT five times, {method}; {label(one)}": soup(changes, one)
        for method in ("SCE", "linear", "task arithmetic")
        for one in METHODS[method]
    }


def main_rows() -> dict[str, Row]:
    rows = {f"source {name}": schooled(name) for name in SOURCES}
    rows |= {"pivot": schooled(PIVOT), "SFT": tuned(SFT), "many-to-one": tuned(ALL)}
    rows |= {f"target {name}": tuned(name) for name in SOURCES}
    rows |= merged_rows({})
    rows |= soup_rows({})
    rows["fused, the paper's settings"] = fused(PAPER, PAPER_SCE)
    return rows


def clean_rows() -> dict[str, Row]:
    """The same where all training answers are right."""
    rows = {"pivot": schooled(PIVOT), "SFT": tuned(SFT, CLEAN), "many-to-one": tuned(ALL, CLEAN)}
    rows |= {f"target {name}": tuned(name, CLEAN) for name in SOURCES}
    rows |= merged_rows(CLEAN)
    rows |= soup_rows(CLEAN)
    rows["fused, the paper's settings"] = fused({**PAPER, **CLEAN}, PAPER_SCE)
    return rows


CLEAN: Changes = {"conversations": {"wrong": 0.0}}
ALIGNMENTS: dict[str, Changes] = {
    "exact": {"vocabulary": "exact", "unaligned": "label"},
    "edit distance": {"sequence": "dtw", "vocabulary": "edit", "unaligned": "label"},
    "statistics (paper)": {
        "sequence": "dtw",
        "vocabulary": "statistics",
        "top_1": True,
        "unaligned": "label",
        "look_ahead": False,
    },
    "ours": {},
}
FUNCTIONS: dict[str, Changes] = {
    "MinCE by conversation": {},
    "MinCE by token (paper)": {"unit": "token"},
    "MinCE by response": {"level": "response"},
    "MinCE by position": {"level": "position"},
    "AvgCE": {"function": "avgce"},
    "source always": {"function": "source"},
    "against the student": {"against": "student"},
    "student, by position": {"against": "student", "level": "position"},
}
LOSSES: dict[str, Changes] = {
    "cross-entropy": {},
    "tail as an outcome": {"tail": "bucket"},
    "temperature 2": {"temperature": 2.0},
    "reverse KL": {"loss": "reverse_kl"},
}
WEIGHTS = (0.0, 0.3, 0.6, 0.9)
# The paper's choices of `preset: paper`, but for the training, which is that of all rows.
PAPER: Changes = {"align": ALIGNMENTS["statistics (paper)"], "fuse": {"unit": "token", "sft_weight": 0.9}}


def with_fuse(**fuse: Any) -> Changes:
    return {"fuse": fuse} if fuse else {}


def tables() -> list[Table]:
    five = [SOURCES[: count + 1] for count in range(len(SOURCES))]
    half = {"method": "sce", "select_topk": 0.5}
    steps = {
        f"τ {topk:g}{' (nothing selected)' * (topk == 1)}": {"method": "sce", "select_topk": topk}
        for topk in (1.0, 0.5, 0.1)
    }
    steps |= {f"τ 0.5, without {step}": {**half, "without": [step]} for step in ("calculate", "erase")}
    steps["τ 0.5, select alone"] = {**half, "without": ["calculate", "erase"]}
    return [
        Table("main", "The paper's rows, one training answer in five wrong", main_rows(), MAIN_SEEDS),
        Table("clean", "The same, all training answers right", clean_rows(), MAIN_SEEDS, tuned(SFT, CLEAN)),
        Table(
            "alignment", "Alignment", {name: fused({"align": one} if one else {}) for name, one in ALIGNMENTS.items()}
        ),
        Table("function", "Fusion function", {name: fused(with_fuse(**one)) for name, one in FUNCTIONS.items()}),
        Table("loss", "Fusion loss", {name: fused(with_fuse(**one)) for name, one in LOSSES.items()}),
        Table(
            "weight",
            "λ, the weight of the gold tokens",
            {
                **{f"{weight:g}": fused(with_fuse(sft_weight=weight)) for weight in WEIGHTS},
                "0 to 1": fused(with_fuse(sft_weight=0.0, sft_weight_end=1.0)),
                "1 (SFT five times)": soup(),
            },
        ),
        Table(
            "k", "k, tokens kept", {f"{k}": fused({"capture": {"top_k": k}} if k != 10 else {}) for k in (1, 3, 10, 50)}
        ),
        Table("steps", "SCE's steps", {name: fused(config=config) for name, config in steps.items()}, MAIN_SEEDS),
        Table("sources", "Sources one by one", {f"{len(some)}": fused(sources=some) for some in five}, MAIN_SEEDS),
        Table(
            "bad",
            "A bad source among good ones",
            {
                "five good, SCE": fused(),
                "and a bad one, SCE": fused(_with_novice(), sources=[*SOURCES, NOVICE]),
                "and a bad one, source always": fused(_with_novice(function="source"), sources=[*SOURCES, NOVICE]),
                "five good, many-to-one": tuned(ALL),
                "and a bad one, many-to-one": tuned(ALL, _with_novice()),
                "the bad one's own target": tuned(NOVICE, _with_novice()),
            },
        ),
        *maps(),
        choices(),
    ]


def choices() -> Table:
    """The settings that the tables before speak for, together, where answers are right and where they are wrong."""
    rows: dict[str, Row] = {}
    for place, changes in {"all answers right": CLEAN, "one in five wrong": {}}.items():
        rows[f"{place}: {SFT_LABEL}"] = tuned(SFT, changes)
        rows[f"{place}: the paper's"] = fused({**PAPER, **changes}, PAPER_SCE)
        for way, fuse in CHOICES.items():
            rows[f"{place}: {way}"] = fused({**with_fuse(**fuse), **changes}, {"method": "sce", "select_topk": 0.5})
    return Table("choices", "Settings together", rows, x="Training answers")


CHOICES: dict[str, Changes] = {
    "ours, λ 0.9": {"sft_weight": 0.9},
    "ours, λ 0.3": {},
    "ours, λ 0.3, reverse KL": {"loss": "reverse_kl"},
}


def quick_tables() -> list[Table]:
    """Two small ones, of all kinds of rows."""
    few: Changes = {"sources": ["solar", "mixtral"], "conversations": {"a_skill": 4}}
    main = {
        "source solar": schooled("solar"),
        "many-to-one": tuned(ALL, few),
        "target mixtral": tuned("mixtral", few),
        **{f"fused, SCE; {label(one)}": fused(few, one, few["sources"]) for one in METHODS["SCE"][:2]},
        "fused, without erase": fused(few, {"method": "sce", "select_topk": 0.5, "without": ["erase"]}, few["sources"]),
        "SFT twice, linear": soup(few, {"method": "linear"}, size=2),
    }
    curve = _map("wrong", "Share of wrong answers", {f"{share:g}": _wrong(few, share) for share in (0.0, 0.5)})
    return [Table("main", "A few of the paper's rows", main, 2, tuned(SFT, few)), replace(curve, seeds=2)]


def _wrong(changes: Changes, share: float) -> Changes:
    return {**changes, "conversations": {**changes["conversations"], "wrong": share}}


def _with_novice(**fuse: Any) -> Changes:
    return {**with_fuse(**fuse), "sources": [*SOURCES, NOVICE]}


def maps() -> list[Table]:
    """Where fusion pays: many-to-one beside SFT on the same conversations, one thing at a time."""
    found = []
    for name, title, values in (
        (
            "conversations",
            "Training conversations of each skill",
            [{"a_skill": count} for count in (50, 200, 400, 1600)],
        ),
        ("wrong", "Share of wrong answers", [{"wrong": share} for share in (0.0, 0.2, 0.4)]),
        (
            "rare",
            "Conversations of the rare skills, as a share of the others",
            [{"rare": share} for share in (0.05, 0.2, 1.0)],
        ),
    ):
        found.append(_map(name, title, {f"{next(iter(one.values())):g}": {"conversations": one} for one in values}))
    epochs = {f"{count}": {"fuse": {"training": {"num_train_epochs": count}}} for count in (1, 3, 10)}
    sources: dict[str, Changes] = {
        "the weakest": {"sources": ["internlm"]},
        "all five": {},
        "the best": {"sources": ["starling"]},
    }
    return [*found, _map("epochs", "Epochs", epochs), _map("capable", "Sources", sources)]


LEVELS = {"λ 0": {"sft_weight": 0.0}, "λ 0.3": {"sft_weight": 0.3}, "λ 0.9": {"sft_weight": 0.9}}


def _map(name: str, title: str, places: Mapping[str, Changes]) -> Table:
    rows: dict[str, Row] = {}
    for place, changes in places.items():
        rows[f"{place}: {SFT_LABEL}"] = tuned(SFT, changes)
        for level, fuse in LEVELS.items():
            own = {**changes.get("fuse", {}), **fuse}
            rows[f"{place}: {level}"] = tuned(ALL, {**changes, "fuse": own})
    return Table(name, title, rows, x=title)


def jobs_of(rows: Sequence[Measured | Merged]) -> dict[str, list[Job]]:
    """All jobs that these rest on, by phase, in the order of the phases."""
    needed = [one for job in rows for one in (job.tunings if isinstance(job, Merged) else [job.of])]
    tunings = [one for one in needed if isinstance(one, Tuning)]
    bases: list[Job] = [one.base for one in tunings if one.target != SFT]
    names = {name for one in tunings if one.target != SFT for name in settings.sources(one.changes)}
    names |= {one.name for one in needed if isinstance(one, School)}
    return {
        "pivot": [School(PIVOT)],
        "sources": [School(name) for name in sorted(names - {PIVOT})],
        "captures and alignments": bases,
        "fine-tunings": list(tunings),
        "merges and measures": list(rows),
    }
