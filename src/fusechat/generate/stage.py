"""generate/models/<author>/answers/: `answers-*.json`; generate/models/<model>/scores/<author>/: `scores-*.json`;
generate/chosen/: `conversations.jsonl`, the chosen answers, an ordinary data set, and `candidates.jsonl`, all of them.

One step for each author, and one for each model and author that it scores, so that a new source answers, scores and is scored, and
no more. A model that is listed twice answers and scores once.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fusechat.data.conversations import DataSet
from fusechat.errors import DataError
from fusechat.generate.prompts import Prompts, read_prompts
from fusechat.generate.shards import Shards, slices
from fusechat.models.chat_model import ChatModel
from fusechat.recipe.schema import PIVOT, Recipe
from fusechat.run import ranks
from fusechat.run.files import PARTIAL, digest_json
from fusechat.run.manifests import which_device
from fusechat.run.progress import log, progress
from fusechat.run.steps import Step

FORMAT = 1
_TALLIES = (
    "answers",
    "candidates",
    "tokens",
    "scored",
)  # counts that are summed over processes, `left_out` by its keys


@dataclass(frozen=True)
class Authors:
    """`answers`: the step of each author, a model that is listed twice once; `scores`: of each model and author; `scorer_of`: by
    which name an author scores, of those that can."""

    answers: dict[str, Step]
    scores: dict[tuple[str, str], Step]
    scorer_of: dict[str, str]


def authors(recipe: Recipe, workdir: Path) -> Authors:
    answers: dict[str, Step] = {}
    seen: set[str] = set()
    for name in recipe.answering:
        step = answers_step(recipe, workdir, name)
        if (key := digest_json(step.settings)) not in seen:
            answers[name] = step
            seen.add(key)
    by_key: dict[str, str] = {}
    scorers = {name: by_key.setdefault(digest_json(_scoring(recipe, name)), name) for name in (PIVOT, *recipe.models)}
    scorer_of = {name: scorers[name] for name in answers if name in scorers}
    assert recipe.generate is not None
    scores = {}
    for name, step in answers.items():
        every = (
            dict.fromkeys(scorers.values())
            if recipe.generate.scored_by_all
            else [scorer_of[name]]
            if name in scorer_of
            else []
        )
        for scorer in every:
            scores[scorer, name] = scores_step(recipe, workdir, scorer, name, step)
    return Authors(answers, scores, scorer_of)


def answers_step(recipe: Recipe, workdir: Path, name: str) -> Step:
    """One model, or server, answers its prompts."""
    sets, how = recipe.read_sets(name), recipe.generate
    assert how is not None
    settings = {
        "prompts": [data.identity() for data in sets],
        "on_error": recipe.data.on_error,
        "join_turns": recipe.data.join_turns,
        "shard_prompts": recipe.capture.shard_conversations,
        **how.model_dump(include={"samples", "temperature", "top_p", "max_new_tokens"}),
        **({"seed": recipe.seed} if how.temperature else {}),
        **_answering(recipe, name),
    }

    def work(directory: Path) -> dict[str, Any]:
        return _answer(directory, recipe, name, sets)

    directory = workdir / "generate" / "models" / name / "answers"
    return _step(f"{name}/answers", directory, settings, work)


def _answering(recipe: Recipe, name: str) -> dict[str, Any]:
    """Settings of who answers."""
    chat_model, capture = recipe.chat_model(name), recipe.capture_for(name)
    return {
        "model": chat_model.tokenizer_identity,
        "stop": list(chat_model.stop),
        "device": recipe.device,
        "dtype": capture.dtype,
        "backend": capture.backend,
    }


def scores_step(recipe: Recipe, workdir: Path, scorer: str, author: str, answers: Step) -> Step:
    """One model scores the answers of one author."""

    def work(directory: Path) -> dict[str, Any]:
        return _score(directory, recipe, scorer, author, Shards(answers.directory, "answers"))

    directory = workdir / "generate" / "models" / scorer / "scores" / author
    return _step(f"{scorer}/scores/{author}", directory, _scoring(recipe, scorer), work, {"answers": answers})


def _scoring(recipe: Recipe, name: str) -> dict[str, Any]:
    """Settings of who scores."""
    capture = recipe.capture_for(name)
    return {
        "model": recipe.chat_model(name).tokenizer_identity,
        "max_length": recipe.data.max_length,
        "device": recipe.device,
        "dtype": capture.dtype,
        "backend": capture.backend,
    }


def _step(
    name: str, directory: Path, settings: dict[str, Any], work: Any, upstream: Mapping[str, Step] | None = None
) -> Step:
    """A step that all processes share, shard by shard."""
    whole: dict[str, Any] = {"whole_files": True, "join": lambda counts: ranks.from_first(lambda: _join(counts))}
    return Step("generate", name, directory, settings, work, upstream or {}, FORMAT, _counted, **whole)


def _counted(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings, **which_device(settings)}


def _join(counts: list[dict[str, Any]]) -> dict[str, Any]:
    """One of the counts of all processes."""
    joined = dict(counts[0])
    joined |= {key: sum(one[key] for one in counts) for key in _TALLIES if key in joined}
    joined["left_out"] = dict(sum((Counter(one["left_out"]) for one in counts), Counter[str]()))
    return joined


def chosen_step(recipe: Recipe, workdir: Path) -> Step:
    """Chooses one answer for each prompt."""
    how, found = recipe.generate, authors(recipe, workdir)
    assert how is not None
    upstream = {step.name: step for step in (*found.answers.values(), *found.scores.values())}
    settings = {
        "authors": list(found.answers),
        "scorer_of": found.scorer_of,
        "choose": how.choose.model_dump(),
        "keep": how.keep,
        **({"seed": recipe.seed} if how.choose.way == "random" else {}),
    }

    def work(directory: Path) -> dict[str, Any]:
        return _choose(directory, recipe, found)

    return Step("generate", "chosen", workdir / "generate" / "chosen", settings, work, upstream, FORMAT)


def _answer(directory: Path, recipe: Recipe, name: str, sets: list[DataSet]) -> dict[str, Any]:
    from fusechat.generate.answer import ask, counts

    how = recipe.generate
    assert how is not None
    prompts = read_prompts(sets)
    every = slices(prompts.conversations, recipe.capture.shard_conversations)
    shards, mine = Shards(directory, "answers"), _share(recipe, name, len(every))
    missing, notes = shards.missing(mine), {}
    if missing:
        with (
            _open_author(directory, recipe, name) as author,
            progress(
                f"answers of {name}", sum(len(every[number]) for number in missing) * how.samples, "answers"
            ) as advance,
        ):
            for number in missing:
                shards.write(number, ask(author, every[number], how, advance))
            notes = author.notes
    return {**prompts.counts, **counts(row for number in mine for row in shards.read(number)), **notes}


def _share(recipe: Recipe, name: str, count: int) -> list[int]:
    """The shards of this process."""
    capture = recipe.capture_for(name)
    return ranks.share(count, one_a_machine=capture.backend == "transformers" and capture.device_map is not None)


@contextmanager
def _loading(directory: Path, recipe: Recipe, name: str) -> Iterator[dict[str, Any]]:
    """How a model is loaded, while there is room for what of it does not fit in memory."""
    capture = recipe.capture_for(name)
    with TemporaryDirectory(dir=directory, prefix=".", suffix=PARTIAL) as room:
        yield {"dtype": capture.dtype, "device": recipe.device, "device_map": capture.device_map, "offload": Path(room)}


@contextmanager
def _open_author(directory: Path, recipe: Recipe, name: str) -> Iterator[Any]:
    from fusechat.generate.answer import Local

    with (
        _loading(directory, recipe, name) as loading,
        closing(Local(recipe.chat_model(name), seed=recipe.seed, **loading)) as one,
    ):
        yield one


def _score(directory: Path, recipe: Recipe, scorer: str, author: str, answers: Shards) -> dict[str, Any]:
    from fusechat.generate.score import score

    prompts = {one.id: one for one in read_prompts(recipe.read_sets(author)).conversations}
    shards, mine = (
        Shards(directory, "scores"),
        _share(recipe, scorer, len(list(answers.directory.glob("answers-*.json")))),
    )
    missing = shards.missing(mine)
    if missing:
        chat_model = recipe.chat_model(scorer)
        template = chat_model.template()
        with (
            _open_scorer(directory, recipe, chat_model) as nll,
            progress(f"scores of {author} by {scorer}", len(missing), "shards") as advance,
        ):
            for number in missing:
                rows = score(answers.read(number), prompts, template, nll, max_length=recipe.data.max_length)
                shards.write(number, rows)
                advance(1)
    rows = [row for number in mine for row in shards.read(number)]
    left_out = Counter(row["why"] for row in rows if row["nll"] is None)
    return {"candidates": len(rows), "scored": sum(row["nll"] is not None for row in rows), "left_out": dict(left_out)}


@contextmanager
def _open_scorer(directory: Path, recipe: Recipe, chat_model: ChatModel) -> Iterator[Any]:
    from fusechat.models.load import choose_device
    from fusechat.models.memory import free_memory
    from fusechat.models.teacher_forcing import TeacherForcing

    name = f"{chat_model.name} ({chat_model.reference})"
    with _loading(directory, recipe, chat_model.name) as loading:
        loading["device"] = choose_device(loading["device"])
        keys, tokens = ("capture.batch_tokens", "data.max_length"), recipe.capture_for(chat_model.name).batch_tokens
        forced = TeacherForcing(chat_model.model(**loading), batch_tokens=tokens, name=name, keys=keys)
        try:
            yield forced.nll
        finally:
            del forced
            free_memory()


def _choose(directory: Path, recipe: Recipe, found: Authors) -> dict[str, Any]:
    from fusechat.generate.chosen import choose_all, gather

    how = recipe.generate
    assert how is not None
    read: Prompts = read_prompts(list(dict.fromkeys(data for name in found.answers for data in recipe.read_sets(name))))
    scores = {pair: step.directory for pair, step in found.scores.items()}
    answered = gather(read.conversations, {name: step.directory for name, step in found.answers.items()}, scores)
    counts = choose_all(answered, directory, how, scorer_of=found.scorer_of, judge=None, seed=recipe.seed)
    if not counts["chosen"]:
        why = [f"{reason} ({number})" for reason, number in counts["left_out"].items()]
        why += [
            f"{name}: {reason} ({n})"
            for name, reasons in counts["no_candidates"].items()
            for reason, n in reasons.items()
        ]
        raise DataError(f"generate: no prompt has an answer that could be learnt: {'; '.join(why)}")
    _tell(counts)
    return {**{key: value for key, value in read.counts.items() if key != "prompts"}, **counts}


def _tell(counts: Mapping[str, Any]) -> None:
    """What a user should know at once."""
    share = ", ".join(f"{name} {number}" for name, number in counts["authors"].items())
    log.info("generate: %d answers to %d prompts are chosen: %s", counts["chosen"], counts["prompts"], share)
    for reason, number in counts["left_out"].items():
        log.warning("generate: %d of %d prompts are left out: %s", number, counts["prompts"], reason)
    for author, reasons in counts["no_candidates"].items():
        said = "; ".join(f"{reason} ({number})" for reason, number in reasons.items())
        log.warning("generate: answers of %s that are no candidates: %s", author, said)
