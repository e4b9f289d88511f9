"""prepare/<model>/<data set>/: `conversations.arrow`, `rejected.jsonl`. prepare/overlap/: `overlap.jsonl`, a `Hit` for each
evaluation conversation in the training data, each training set and each kind."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusechat.data.conversations import Conversation, DataSet, Malformed, Questions, read_conversations
from fusechat.data.prepared import FILE, Prepared, PreparedSet, write_prepared
from fusechat.data.rejected import BY_PIVOT, MALFORMED, REJECTED, REPEATED, advice
from fusechat.errors import DataError, ModelError
from fusechat.models.chat_model import ChatModel
from fusechat.recipe.schema import PIVOT, Recipe
from fusechat.run.files import write_text
from fusechat.run.progress import log, progress
from fusechat.run.steps import Step

FORMAT = 3  # 3: rows between the asked prompt and the content; 2: spans are exact in more tokenizers
_USUAL = {"join_turns": False, "truncate": "response"}  # defaults, not in fingerprints
OVERLAP, HITS = "overlap", "overlap.jsonl"


def step(recipe: Recipe, workdir: Path, chat_model: ChatModel, data: DataSet, made_by: Step | None = None) -> Step:
    """The step that renders and tokenises one data set for one model; for a source, only conversations that the pivot uses.
    `made_by`: the step that writes the set, if the run does."""
    how = rules(recipe, data)
    settings = {
        "model": chat_model.tokenizer_identity,
        "data": data.identity(),
        "on_error": data.on_error,
        **{key: value for key, value in how.items() if key == "max_length" or value != _USUAL[key]},
    }
    before = {}
    if chat_model.name != PIVOT:
        before[PIVOT] = step(recipe, workdir, recipe.chat_model(PIVOT), data, made_by)
    elif data.chosen and made_by is not None:
        before["chosen"] = made_by

    def work(directory: Path) -> dict[str, Any]:
        usable = set(PreparedSet(before[PIVOT].directory).ids) if PIVOT in before else None
        return _prepare(directory, chat_model, data.within(workdir), usable, how)

    directory = workdir / "prepare" / chat_model.name / data.name
    return Step("prepare", f"{chat_model.name}/{data.name}", directory, settings, work, before, format=FORMAT)


def rules(recipe: Recipe, data: DataSet) -> dict[str, Any]:
    """The arguments of `prepare_conversation`. A response for evaluation is whole for all models, or left out."""
    found = recipe.data.model_dump(include={"max_length", *_USUAL})
    return found if data not in recipe.validation_sets() else {**found, "truncate": _USUAL["truncate"]}


def _prepare(
    directory: Path, chat_model: ChatModel, data: DataSet, usable: set[str] | None, how: dict[str, Any]
) -> dict[str, Any]:
    """`usable`: ids of conversations that the pivot uses, None for the pivot itself."""
    from fusechat.models.load import without_embedding
    from fusechat.models.tokenise import RejectedError, prepare_conversation

    template, rows, positions = chat_model.template(), chat_model.vocabulary_size(), chat_model.positions()
    counts = Counter[str](dict.fromkeys(("responses", "response_bytes", "response_tokens", "tokens"), 0))
    reasons: Counter[str] = Counter()
    rejected: list[str] = []
    seen: set[str] = set()
    unused: dict[str, None] = {}

    def reject(where: str, reason: str) -> None:
        reasons[reason] += 1
        rejected.append(json.dumps({"where": where, "reason": reason}, ensure_ascii=False))

    def prepared() -> Iterator[Prepared]:
        with progress(f"prepare {chat_model.name}/{data.name}", None, "conversations") as advance:
            for conversation in read_conversations(data):
                advance()
                if isinstance(conversation, Malformed):
                    if data.on_error == "stop":
                        raise DataError(f"{conversation.where}: {conversation.reason}")
                    reject(conversation.where, f"{MALFORMED}{conversation.reason}")
                    continue
                unused.update(dict.fromkeys(conversation.unused))
                kept = one(conversation)
                if kept is not None:
                    yield kept

    def one(conversation: Conversation) -> Prepared | None:
        if conversation.id in seen:
            reject(conversation.where, REPEATED)
            return None
        seen.add(conversation.id)
        if usable is not None and conversation.id not in usable:
            reject(conversation.where, BY_PIVOT)
            return None
        try:
            result, marks = prepare_conversation(conversation, template, **how)
        except RejectedError as error:
            reject(conversation.where, str(error))
            return None
        wrong = without_embedding([int(result.input_ids.max())], rows, template.tokenizer)
        if wrong:
            raise ModelError(f"{chat_model.name} ({chat_model.reference}): {conversation.where} has {wrong}")
        counts.update({mark: 1 for mark, happened in marks.items() if happened})
        if positions is not None and len(result.input_ids) > positions:
            counts["past_positions"] += 1
        counts["tokens"] += len(result.input_ids)
        counts["response_tokens"] += len(result)
        counts["responses"] += len(result.content_bytes)
        counts["response_bytes"] += int(result.content_bytes.sum())
        return result

    kept = write_prepared(directory / FILE, prepared())
    if not kept and not (data.author and not reasons):  # none of this model's answers was chosen
        why = "; ".join(f"{reason} ({number})" for reason, number in reasons.most_common(3)) or "it holds no records"
        say = advice(reason for reason, _ in reasons.most_common())
        raise DataError(f"{data.path}: no usable conversation for {chat_model.name}: {why}{f'; {say}' if say else ''}")
    if counts["other_class"]:
        log.warning(
            "prepare %s/%s: the class that Transformers takes for this tokenizer would make other tokens of %d conversations; "
            "tokenizer.json decides",
            *(chat_model.name, data.name, counts["other_class"]),
        )
    if counts["past_positions"]:
        log.warning(
            "prepare %s/%s: %d of %d conversations have more than the %d tokens that the model is made for: set data.max_length to "
            "%d",
            *(chat_model.name, data.name, counts["past_positions"], kept, positions, positions),
        )
    write_text(directory / REJECTED, "".join(line + "\n" for line in rejected))
    more = {"unused_keys": sorted(unused)} if unused else {}
    return {"conversations": kept, "rejected": dict(sorted(reasons.items())), **more, **dict(sorted(counts.items()))}


def overlap_step(
    recipe: Recipe, workdir: Path, training: Sequence[DataSet], evaluation: Sequence[DataSet | Questions]
) -> Step:
    """The step that looks for evaluation texts in the training data, and reports them."""
    on_overlap = recipe.data.on_overlap
    settings = {
        "training": [[data.name, data.identity()] for data in training],
        "evaluation": [[data.name, data.identity()] for data in evaluation],
        "on_overlap": on_overlap,
    }

    def work(directory: Path) -> dict[str, Any]:
        return _overlap(directory, training, evaluation, stop=on_overlap == "stop")

    return Step("prepare", OVERLAP, workdir / "prepare" / OVERLAP, settings, work)


def _overlap(
    directory: Path, training: Sequence[DataSet], evaluation: Sequence[DataSet | Questions], *, stop: bool
) -> dict[str, Any]:
    from fusechat.prepare.overlap import find_overlap

    with progress(f"prepare {OVERLAP}", None, "conversations") as advance:
        found = find_overlap(training, evaluation, advance)
    lines = (json.dumps(asdict(hit), ensure_ascii=False) + "\n" for hit in found.hits)
    write_text(directory / HITS, "".join(lines))
    said = found.sentences()
    if said and stop:
        raise DataError(*(f"{line}: see {directory / HITS}; data.on_overlap: warn continues" for line in said))
    for line in said:
        log.warning("prepare %s: %s: see %s", OVERLAP, line, directory / HITS)
    if not said:
        log.info("prepare %s: no conversation of %s is in the training data", OVERLAP, ", ".join(found.sizes))
    return {"pairs": found.pairs()}
