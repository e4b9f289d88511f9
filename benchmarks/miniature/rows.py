"""The tables: what stands in each row, as jobs to be done for each seed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from miniature.chatters import PIVOT, SOURCES
from miniature.jobs import Measured, Merged, School, Tuning
from miniature.settings import ALL, SFT, Changes

MAIN_SEEDS, CONTESTED_SEEDS = 5, 3
BEST = "starling"  # the best single source
Row = Callable[[int], Measured | Merged]  # of a seed

WRONG: Changes = {"conversations": {"wrong": 0.2}}
CHOSEN: Changes = {"generate": {"choose": "likelihood"}}
EACH: Changes = {"generate": {"choose": "likelihood", "targets": "each"}}
EPOCHS: Changes = {"fuse": {"training": {"num_train_epochs": 15}}}
GOLD_LABEL, CHOSEN_LABEL = "gold", "chosen answers, their authors teach"


def fused(changes: Changes, config: dict[str, Any]) -> Row:
    return lambda seed: Merged(tuple(Tuning(source, changes, seed) for source in SOURCES), config)


def tuned(target: str, changes: Changes | None = None) -> Row:
    return lambda seed: Measured(Tuning(target, changes or {}, seed))


def schooled(name: str) -> Row:
    return lambda seed: Measured(School(name))


PIVOT_ROW, GOLD_ROW, CHOSEN_ROW = schooled(PIVOT), tuned(SFT), tuned(ALL, CHOSEN)


@dataclass(frozen=True)
class Table:
    """`rows`: by their label. `gold`: plain fine-tuning on right gold answers, which the others are compared with. `x`: what the
    labels are a scale of, where they are. `chosen`: changes of the rows of which it is shown what the choice was worth."""

    name: str
    title: str
    rows: Mapping[str, Row]
    seeds: int = 1
    gold: Row = GOLD_ROW
    x: str = ""
    chosen: Mapping[str, Changes] = field(default_factory=dict)

    def beside(self, label: str) -> Row:
        """What a row is compared with: on the same scale, at the same place."""
        place, colon, _ = label.partition(": ")
        return self.rows[f"{place}: {GOLD_LABEL}"] if self.x and colon else self.gold


def main_rows() -> dict[str, Row]:
    rows = {f"source {name}": schooled(name) for name in SOURCES}
    rows |= {"pivot": schooled(PIVOT)}
    rows |= {"gold, all right": GOLD_ROW, "gold, one in five wrong": tuned(SFT, WRONG)}
    rows |= {"chosen answers, plain fine-tuning": tuned(SFT, CHOSEN), CHOSEN_LABEL: CHOSEN_ROW}
    return rows


def long_rows() -> dict[str, Row]:
    """The same for more epochs."""
    return {
        "gold, all right": tuned(SFT, EPOCHS),
        "chosen answers, plain fine-tuning": tuned(SFT, {**EPOCHS, **CHOSEN}),
        CHOSEN_LABEL: tuned(ALL, {**EPOCHS, **CHOSEN}),
    }


# Ways to choose, each with its label.
SAMPLED: Changes = {"samples": 4, "temperature": 0.7}
FEWER: Changes = {"conversations": {"a_skill": 400}}  # for four samples
CHOICES: dict[str, Changes] = {
    "likelihood": {"choose": "likelihood"},
    "self": {"choose": "self"},
    "vote": {"choose": "vote"},
    "the best source": {"choose": {"source": BEST}, "sources": SOURCES},
    "random": {"choose": "random"},
    "oracle": {"choose": {"verifier": "exact"}},
}


def _choices() -> list[Table]:
    every: dict[str, Changes] = {name: {"generate": one} for name, one in CHOICES.items()}
    few = {"likelihood, one sample": {**FEWER, "generate": CHOICES["likelihood"]}}
    few |= {
        f"{name}, four samples": {**FEWER, "generate": {**CHOICES[name], **SAMPLED}}
        for name in ("likelihood", "self", "oracle")
    }
    return [
        Table(name, title, {way: tuned(ALL, changes) for way, changes in rows.items()}, chosen=rows)
        for name, title, rows in (
            ("choice", "How the answer is chosen", every),
            ("samples", "Four samples of each source, 400 prompts of each skill", few),
        )
    ]


# Every method with several settings: the table shows each at its best on the validation questions.
METHODS: dict[str, list[dict[str, Any]]] = {
    "SCE": [{"method": "sce", "select_topk": topk} for topk in (1.0, 0.5, 0.1)],
    "linear": [{"method": "linear"}],
    "task arithmetic": [{"method": "task_arithmetic", "weight": weight} for weight in (0.1, 0.3, 0.5)],
    "TIES": [{"method": "ties", "weight": 1.0, "density": density} for density in (1.0, 0.5, 0.2)],
    "DARE": [{"method": "dare_linear", "weight": weight, "density": 0.5} for weight in (0.2, 0.4)],
    "VaRM": [{"method": "varm"}],
}


def label(config: Mapping[str, Any]) -> str:
    """A method's settings in a few words."""
    words = {"select_topk": "τ", "weight": "weight", "density": "density"}
    return ", ".join(f"{word} {config[key]:g}" for key, word in words.items() if key in config)


def paper_rows(changes: Changes) -> dict[str, Row]:
    """One target for each source, each teaching on all conversations, and these merged."""
    rows = {f"target {name}": tuned(name, changes) for name in SOURCES}
    for method, several in METHODS.items():
        rows |= {f"fused, {method}; {label(one)}": fused(changes, one) for one in several}
    return rows


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


def _alignments() -> Table:
    rows = {name: tuned(ALL, {**CHOSEN, **({"align": one} if one else {})}) for name, one in ALIGNMENTS.items()}
    return Table("alignment", "Alignment, on chosen answers", rows)


def _contested() -> Table:
    """What the paper claims and one seed does not settle."""
    rows = {
        "gold, all right": GOLD_ROW,
        "gold, all right, many-to-one": tuned(ALL),
        "gold, one in five wrong": tuned(SFT, WRONG),
        "gold, one in five wrong, many-to-one": tuned(ALL, WRONG),
        "chosen answers, plain fine-tuning": tuned(SFT, CHOSEN),
        CHOSEN_LABEL: CHOSEN_ROW,
    }
    return Table("contested", "What distributions add", rows, CONTESTED_SEEDS)


LEARNERS: dict[str, tuple[str, Changes]] = {"gold": (SFT, {}), "chosen answers": (ALL, CHOSEN)}


def _curve(name: str, title: str, places: Mapping[str, Changes]) -> Table:
    """Gold and chosen answers over one thing."""
    rows = {
        f"{place}: {way}": tuned(target, {**changes, **own})
        for place, changes in places.items()
        for way, (target, own) in LEARNERS.items()
    }
    return Table(name, title, rows, x=title)


def _training(**arguments: Any) -> Changes:
    return {"fuse": {"training": arguments}}


def curves() -> list[Table]:
    return [
        _curve(
            "prompts",
            "Prompts of each skill",
            {
                f"{count}": {"conversations": {"a_skill": count}} if count != 1600 else {}
                for count in (50, 200, 400, 1600)
            },
        ),
        _curve(
            "epochs",
            "Epochs",
            {f"{count}": _training(num_train_epochs=count) if count != 6 else {} for count in (2, 6, 15)},
        ),
        _curve(
            "rate",
            "Learning rate",
            {f"{rate:g}": _training(learning_rate=rate) if rate != 1e-3 else {} for rate in (3e-4, 1e-3, 3e-3)},
        ),
    ]


def tables() -> list[Table]:
    return [
        Table("main", "Prompts alone, and gold answers", main_rows(), MAIN_SEEDS),
        *_choices(),
        Table("long", "Fifteen epochs", long_rows()),
        *curves(),
        Table("weight", "λ, the weight of the chosen tokens", {f"{one:g}": _weight(one) for one in (0.0, 0.3, 0.6)}),
        Table("pairs", "The paper's rows, on gold answers", paper_rows({})),
        Table("pairs-chosen", "The paper's rows, on chosen answers", paper_rows(EACH)),
        _contested(),
        _alignments(),
    ]


def _weight(weight: float) -> Row:
    return tuned(ALL, {**CHOSEN, **({"fuse": {"sft_weight": weight}} if weight != 0.3 else {})})


def quick_tables() -> list[Table]:
    """Small ones, of all kinds of rows."""
    some: Changes = {"sources": ["solar", "mixtral"], "conversations": {"a_skill": 4}}
    some["fuse"] = {"training": {"num_train_epochs": 1}}
    chosen: dict[str, Changes] = {name: {**some, "generate": {"choose": name}} for name in ("likelihood", "random")}
    each: Changes = {**some, "generate": {"targets": "each"}}
    targets, gold = some["sources"], tuned(SFT, some)
    main: dict[str, Row] = {
        "source solar": schooled("solar"),
        "gold, all right": gold,
        "many-to-one": tuned(ALL, some),
        "chosen answers, plain fine-tuning": tuned(SFT, chosen["likelihood"]),
        CHOSEN_LABEL: tuned(ALL, chosen["likelihood"]),
    }
    for one in METHODS["SCE"][:2]:
        main[f"fused, SCE; {label(one)}"] = lambda seed, one=one: Merged(  # type: ignore[misc]
            tuple(Tuning(source, each, seed) for source in targets), one
        )
    curve = {
        f"{count}: {way}": tuned(target, {**some, **own, "conversations": {"a_skill": count}})
        for count in (2, 4)
        for way, (target, own) in LEARNERS.items()
    }
    return [
        Table("main", "A few rows", main, 2, gold),
        Table("choice", "Two ways to choose", {k: tuned(ALL, v) for k, v in chosen.items()}, 1, gold, chosen=chosen),
        Table("prompts", "Prompts of each skill", curve, 1, gold, "Prompts of each skill"),
    ]
