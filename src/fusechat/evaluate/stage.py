"""evaluate/<model>/<data set>.json: nll and bytes of every held-out response.
evaluate/answers-<model>/answers.json: what it answers to some of the held-out questions, for the report; where a verifier judges,
`replies.json`: to all of them. evaluate/right.jsonl: these answers of all models, with what the verifier makes of them.
evaluate/results.json: the scores of all models, and what suites found that were run by themselves; see `records.py`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fusechat.data.conversations import DataSet
from fusechat.evaluate.records import ASKED, RECORDS, RESULTS
from fusechat.evaluate.right import judging
from fusechat.models.chat_model import ChatModel
from fusechat.recipe.evaluate import Evaluate
from fusechat.recipe.schema import PIVOT, Recipe
from fusechat.run.cache import known_digest
from fusechat.run.files import read_json, remove, scratch, write_json, write_text
from fusechat.run.manifests import versions, which_device
from fusechat.run.progress import log, progress
from fusechat.run.steps import Step

ANSWERS, REPLIES, JOURNALS = "answers.json", "replies.json", "journals"
VERIFIED = "right.jsonl"  # every answer that a verifier judged
ANSWER_BATCH = 4096  # tokens of a batch at most, with the room for answers


@dataclass(frozen=True)
class Measured:
    """A model that is measured: `role` is pivot, source, target or fused; `label` is what tables call it. `made_by`: the step that
    wrote it, None where the recipe names it."""

    role: str
    label: str
    step: Step
    chat_model: ChatModel
    made_by: Step | None


def model_step(
    recipe: Recipe, workdir: Path, name: str, chat_model: ChatModel, prepared: dict[str, Step], made_by: Step | None
) -> Step:
    """Measures a model: one that the recipe names, or the target or fused model that step `made_by` wrote. `prepared`: held-out
    data set → its prepare step for the tokens of this model. A further set leaves what was measured on the others."""
    settings = _settings(recipe)
    named = {} if made_by else {"model": chat_model.identity}
    device_map = _device_map(recipe, chat_model, made_by)

    def work(directory: Path) -> dict[str, Any]:
        return _score(directory, chat_model, prepared, settings, device_map, label=name)

    made = {"model": made_by} if made_by else {}
    parts = {_scores(data): [*made, data] for data in prepared}
    directory = workdir / "evaluate" / name
    upstream = {**made, **prepared}
    whole: dict[str, Any] = {"whole_files": True, "parts": parts, "counted": _counted}
    return Step("evaluate", name, directory, {**settings, **named}, work, upstream, format=2, **whole)


def _counted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without how many tokens a batch has, which changes no score but for rounding."""
    return {**{key: value for key, value in settings.items() if key != "batch_tokens"}, **which_device(settings)}


def _scores(data: str) -> str:
    """The file of what a model scored on a data set."""
    return f"{data}.json"


def has_suites(workdir: Path) -> bool:
    """Whether a suite that was run by itself has left results in the work directory."""
    return any((workdir / "evaluate").glob(f"*/{RECORDS}"))


@dataclass(frozen=True)
class Verified:
    """Held-out sets whose answers a verifier judges, by the recipe's section; `answers`: the answers step of each model."""

    sets: list[DataSet]
    how: Evaluate
    answers: dict[str, Step]


def results_step(
    workdir: Path, subjects: list[Measured], sets: list[str], sft: str | None, verified: Verified | None = None
) -> Step:
    """Joins the scores of all models on the data sets, which of their answers are right, and the records of suites in the same
    directory. `sft`: which model, by the name of its step, is plain fine-tuning."""
    suites = {file.parent.name: known_digest(file) for file in sorted((workdir / "evaluate").glob(f"*/{RECORDS}"))}
    named = [[subject.role, subject.label] for subject in subjects] if sets or verified else []
    settings: dict[str, Any] = {"subjects": named, "sets": sets, **({"suites": suites} if suites else {})}
    settings |= {"sft": sft} if sft and named else {}
    settings |= {"right": judging(verified.how)} if verified else {}
    upstream = {subject.step.name: subject.step for subject in subjects if sets}
    if suites:
        upstream |= {f"model {one.step.name}": one.made_by for one in subjects if one.made_by is not None}

    if verified:
        settings["held_out"] = {data.name: data.identity() for data in verified.sets}
        upstream |= {f"answers {name}": step for name, step in verified.answers.items()}

    def work(directory: Path) -> dict[str, Any]:
        return _results(directory, subjects, sets, sft, verified)

    return Step("evaluate", "results", workdir / "evaluate", settings, work, upstream, format=2)


def answers_step(recipe: Recipe, workdir: Path, subject: Measured, held_out: list[DataSet]) -> Step:
    """Answers to the first questions of the held-out conversations, greedily; where a verifier judges, to all of their prompts."""
    chat_model, made_by = subject.chat_model, subject.made_by
    settings = {
        "model": None if made_by else chat_model.identity,
        "template": chat_model.template_key,
        "data": {data.name: data.identity() for data in held_out},
        "answers": recipe.evaluate.answers,
        "tokens": recipe.evaluate.answer_tokens,
        **({"verified": recipe.evaluate.verifier_limit or "all"} if recipe.evaluate.verifier else {}),
        **({"stop": chat_model.stop} if chat_model.stop else {}),
        **_settings(recipe),
    }

    def work(directory: Path) -> dict[str, Any]:
        device_map = _device_map(recipe, chat_model, made_by)
        return _answer(directory, recipe, chat_model, held_out, device_map, label=subject.label)

    name = subject.step.name
    upstream = {"model": made_by} if made_by else {}
    directory = workdir / "evaluate" / f"answers-{name}"
    return Step("evaluate", f"answers {name}", directory, settings, work, upstream, ASKED, counted=_counted)


def _settings(recipe: Recipe) -> dict[str, Any]:
    return {"dtype": recipe.evaluate.dtype, "batch_tokens": recipe.evaluate.batch_tokens, "device": recipe.device}


def _device_map(recipe: Recipe, chat_model: ChatModel, made_by: Step | None) -> Any:
    """How a model that the recipe names is spread, as in its capture. Results do not depend on it."""
    return None if made_by else recipe.capture_for(chat_model.name).device_map


def _score(
    directory: Path,
    chat_model: ChatModel,
    prepared: dict[str, Step],
    settings: dict[str, Any],
    device_map: Any,
    *,
    label: str,
) -> dict[str, Any]:
    from fusechat.data.prepared import PreparedSet
    from fusechat.evaluate.bits_per_byte import score_responses
    from fusechat.models.load import choose_device

    files = {name: directory / _scores(name) for name in prepared}
    waiting = {name: PreparedSet(prepared[name].directory) for name, file in files.items() if not file.is_file()}
    if waiting:
        with (
            scratch(directory) as room,
            progress(f"evaluate {label}", sum(map(len, waiting.values())), "conversations") as advance,
        ):
            device = choose_device(settings["device"])
            model = chat_model.model(dtype=settings["dtype"], device=device, device_map=device_map, offload=room)
            for name, data in waiting.items():
                keys = ("evaluate.batch_tokens", "data.max_length")
                how: dict[str, Any] = {"batch_tokens": settings["batch_tokens"], "name": label, "keys": keys}
                scores = score_responses(model, data, advance=advance, **how)
                write_json(files[name], scores)
    return {name: len(read_json(file)) for name, file in files.items()}


def _answer(
    directory: Path, recipe: Recipe, chat_model: ChatModel, held_out: list[DataSet], device_map: Any, *, label: str
) -> dict[str, Any]:
    from fusechat.evaluate.answers import Answering
    from fusechat.evaluate.right import read_questions
    from fusechat.evaluate.subjects import Subject
    from fusechat.models.answers import Missing, Prompt

    evaluate = recipe.evaluate
    shown = questions(held_out, evaluate.answers)
    for one in shown:
        said = tuple((turn["role"], turn["content"]) for turn in one["prompt"])
        one["asked"] = Prompt(one["id"], said, 0.0, evaluate.answer_tokens)
    verified = read_questions(held_out, evaluate) if evaluate.verifier else []
    prompts = {one.prompt.id: one.asked(evaluate.answer_tokens) for one in verified}
    same = {prompt.messages: prompt.key for prompt in prompts.values() if not (prompt.about and prompt.about.variables)}
    prompts |= {one["id"]: one["asked"] for one in shown if one["asked"].messages not in same}
    with scratch(directory) as room:
        options: dict[str, Any] = {"dtype": evaluate.dtype, "device": recipe.device, "seed": recipe.seed}
        spread = {"device_map": device_map, "offload": room}
        answering = Answering(directory / JOURNALS, batch_tokens=ANSWER_BATCH, spread=spread, **options)
        with answering(Subject("", label, chat_model)) as ask:
            found = dict(zip(prompts, ask(list(prompts.values())), strict=True))

    def reply(key: str) -> dict[str, Any]:
        answer = found[key]
        if isinstance(answer, Missing):
            return {"text": "", "complete": False, "missing": answer.reason}
        return {"text": answer.text, "complete": answer.complete, "missing": None}

    for one in shown:
        one |= reply(same.get(one.pop("asked").messages, one["id"]))
    write_json(directory / ANSWERS, shown)
    if evaluate.verifier:
        write_json(directory / REPLIES, {one.prompt.id: reply(one.prompt.id) for one in verified})
    remove(directory / JOURNALS)
    return {"answers": len(prompts)}


def questions(held_out: list[DataSet], count: int) -> list[dict[str, Any]]:
    """The first questions of the first conversations of every data set, in turn, with the answers that the data has. Not of those
    with tools, which a question alone would not tell of."""
    from fusechat.data.conversations import Conversation, read_conversations

    every = []
    for number, data in enumerate(held_out):
        usable = (
            one for one in read_conversations(data) if isinstance(one, Conversation) and one.responses and not one.tools
        )
        every += [(place, number, data.name, one) for place, one in enumerate(islice(usable, count))]
    chosen = sorted(every, key=lambda one: one[:2])[:count]
    shown = []
    for _, _, name, one in sorted(chosen, key=lambda one: (one[1], one[0])):
        end = next(place for place, message in enumerate(one.messages) if message.is_response)
        asked = [{"role": message.role, "content": message.content} for message in one.messages[:end]]
        shown.append({"data": name, "id": one.id, "prompt": asked, "reference": one.messages[end].content})
    return shown


def _results(
    directory: Path, subjects: list[Measured], sets: list[str], sft: str | None, verified: Verified | None
) -> dict[str, Any]:
    from fusechat.evaluate.bits_per_byte import compare
    from fusechat.evaluate.records import About, records, write_results

    models = {
        one.step.name: About(one.role, one.label, one.chat_model.tokenizer_identity)
        for one in subjects
        if sets or verified
    }
    how: dict[str, Any] = {"models": models, "pivot": PIVOT, "sft": sft, "versions": versions()}
    found = _right(directory, verified, how) if verified else []
    for name in sets:
        scores = {subject.step.name: read_json(subject.step.directory / _scores(name)) for subject in subjects}
        compared = compare(scores)
        settings = {key: subjects[0].step.settings[key] for key in ("dtype", "batch_tokens", "device")}
        measured = {step: [score.measurement(name)] for step, score in compared.items()}
        found += records("bits-per-byte", measured, settings=settings, **how)
        if compared and compared[PIVOT].missing:
            log.warning(
                "evaluate %s: %d responses are left out, which some model does not have", name, compared[PIVOT].missing
            )
    write_results(directory / RESULTS, [*found, *_of_suites(directory, subjects)])
    return {"models": len(subjects), "sets": len(sets)}


def _right(directory: Path, verified: Verified, how: dict[str, Any]) -> list[dict[str, Any]]:
    """The shares of right answers, and in a file every answer with what the verifier makes of it."""
    from fusechat.evaluate.records import records
    from fusechat.evaluate.right import SUITE, judge, read_questions, shares

    asked = read_questions(verified.sets, verified.how)
    replies = {
        name: [found[one.prompt.id] for one in asked]
        for name, step in verified.answers.items()
        for found in [read_json(step.directory / REPLIES)]
    }
    judged = judge(asked, replies, verified.how)
    write_text(directory / VERIFIED, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in judged))
    settings = verified.how.model_dump(include={"verifier", "dtype", "answer_tokens"})
    return [one for _, measured in shares(judged) for one in records(SUITE, measured, settings=settings, **how)]


def _of_suites(directory: Path, subjects: list[Measured]) -> list[dict[str, Any]]:
    """The suites' records, without those of models that the run no longer has, and without differences to them."""
    from fusechat.evaluate.records import gather, without_sft

    every = gather(directory)
    now = {subject.chat_model.tokenizer_identity for subject in subjects} if every else set()
    kept = [record for record in every if not record["role"] or record["identity"] in now]
    for suite, role in dict.fromkeys((record["suite"], record["role"]) for record in every if record not in kept):
        log.warning("evaluate: %s measured a %s model that is another now; measure it again", suite, role)
    return [record if record.get("sft_identity") in {None, *now} else without_sft(record) for record in kept]
