"""What is chosen of all answers, written to `conversations.jsonl` and `candidates.jsonl`.

A line of `conversations.jsonl` is a conversation of the usual form (messages, tools, chat_template_kwargs; earlier answers have
weight 0) and says of its last message: `author`, `prompt_id`, `chosen_by`, `score` by which it was chosen, `scores` of the models
(nats per byte; null where one cannot score it). A line of `candidates.jsonl` is a prompt: `data`, the sets that it stands in,
`messages`, `candidates` with all that is known of each, `chosen`, which of them that is (null for none), `kept`, and
`no_candidates`, why other answers are none.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusechat.data.conversations import Conversation
from fusechat.errors import DataError
from fusechat.generate.answered import Answered
from fusechat.generate.choose import Candidate, Choice, agreement, choose, surest
from fusechat.recipe.generate import Generate
from fusechat.run.files import write_text
from fusechat.run.progress import log

CONVERSATIONS, CANDIDATES = "conversations.jsonl", "candidates.jsonl"
NO_CANDIDATE, LESS_SURE = "no candidate", "less sure than those that are kept"
Every = Sequence[tuple[Answered, list[Candidate], Choice | None]]


def choose_all(
    answered: Sequence[Answered],
    directory: Path,
    how: Generate,
    *,
    data: Mapping[str, Sequence[str]],
    scorer_of: Mapping[str, str],
    seed: int,
) -> dict[str, Any]:
    """Writes the two files; returns the counts for the manifest. `data`: the sets of each prompt, by its key. Raises DataError
    where nothing is chosen."""
    way = how.choose.way
    candidates = [one.candidates(scorer_of) for one in answered]
    choices: list[Choice | None] = [
        choose(found, way, source=how.choose.source, seed=seed, prompt=one.prompt.id) if found else None
        for one, found in zip(answered, candidates, strict=True)
    ]
    places = [place for place, choice in enumerate(choices) if choice is not None]
    kept = {places[index] for index in surest([c for c in choices if c is not None], how.keep)} if places else set()
    every = list(zip(answered, candidates, choices, strict=True))
    counts = _counts(every, kept, how)
    _tell(counts)
    if not kept:
        raise DataError("generate: no prompt has an answer that could be learnt; what is wrong with them stands above")
    _write(directory / CANDIDATES, (_prompt(*one, data, kept=place in kept) for place, one in enumerate(every)))
    _write(directory / CONVERSATIONS, (_conversation(*every[place], way) for place in sorted(kept)))
    return counts


def read_candidates(directory: Path, scorer_of: Mapping[str, str]) -> Iterator[tuple[dict[str, Any], list[Candidate]]]:
    """The lines of `candidates.jsonl`, each with its candidates. `scorer_of`: by which name an author scores, of those that can."""
    with (directory / CANDIDATES).open(encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            one = Answered(Conversation((), ""), why=line["no_candidates"])
            for found in line["candidates"]:
                one.samples[found["text"]] = found["answers"]
                one.scores[found["text"]] = found["scores"]
                one.judged[found["text"]] = found.get("judged")
            yield line, one.candidates(scorer_of)


def _write(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    """Earlier answers as context, of which nothing is learnt."""
    return [
        {"role": one.role, "content": one.content, **one.more, **({} if one.taught else {"weight": 0})}
        for one in conversation.messages
    ]


def _conversation(one: Answered, candidates: list[Candidate], choice: Choice | None, way: str) -> dict[str, Any]:
    assert choice is not None
    chosen, prompt = candidates[choice.index], one.prompt
    return {
        "messages": [*_messages(prompt), {"role": "assistant", "content": chosen.text}],
        **({"tools": list(prompt.tools)} if prompt.tools else {}),
        **({"chat_template_kwargs": dict(prompt.variables)} if prompt.variables else {}),
        "prompt_id": prompt.id,
        "author": choice.author,
        "chosen_by": way,
        "score": choice.score,
        "scores": dict(chosen.scores),
    }


def _prompt(
    one: Answered, candidates: list[Candidate], choice: Choice | None, data: Mapping[str, Sequence[str]], *, kept: bool
) -> dict[str, Any]:
    return {
        "prompt_id": one.prompt.id,
        "data": data[one.prompt.id],
        "messages": _messages(one.prompt),
        "candidates": [
            {
                "text": candidate.text,
                "answers": dict(candidate.samples),
                "scores": dict(candidate.scores),
                **({"judged": candidate.judged} if candidate.judged is not None else {}),
            }
            for candidate in candidates
        ],
        "chosen": None if choice is None else choice.index,
        "author": None if choice is None else choice.author,
        "score": None if choice is None else choice.score,
        "kept": kept,
        "no_candidates": one.why,
    }


def _counts(every: Every, kept: set[int], how: Generate) -> dict[str, Any]:
    """`left_out`: prompts, by why; `no_candidates`: answers of each author, by why; `agreement`: see `choose.agreement`;
    `score`: the mean of those by which answers were chosen."""
    way = how.choose.way
    left_out = Counter[str]()
    for place, (_, candidates, choice) in enumerate(every):
        if choice is None:
            left_out[_why_none(how) if candidates else NO_CANDIDATE] += 1
        elif place not in kept:
            left_out[LESS_SURE] += 1
    chosen = [choice for place, (_, _, choice) in enumerate(every) if place in kept and choice is not None]
    scored = [choice.score for choice in chosen if choice.score is not None]
    why: dict[str, Counter[str]] = defaultdict(Counter)
    for one, _, _ in every:
        for author, reasons in one.why.items():
            why[author].update(reasons)
    return {
        "prompts": len(every),
        "answers": sum(sum(sum(one.samples.values()) for one in candidates) for _, candidates, _ in every),
        "candidates": sum(len(candidates) for _, candidates, _ in every),
        "chosen": len(chosen),
        "chosen_by": way,
        "authors": dict(Counter(choice.author for choice in chosen)),
        "agreement": agreement([candidates for _, candidates, _ in every]),
        "score": sum(scored) / len(scored) if scored else None,
        "without_score": len(chosen) - len(scored),
        "left_out": dict(left_out),
        "no_candidates": {author: dict(reasons) for author, reasons in why.items()},
    }


def _why_none(how: Generate) -> str:
    """Why none of some candidates is chosen."""
    if how.choose.source is not None:
        return f"no candidate of {how.choose.source}"
    return f"no candidate that the {how.choose.way} accepts"


def _tell(counts: Mapping[str, Any]) -> None:
    """What a user should know at once."""
    share = ", ".join(f"{name} {number}" for name, number in counts["authors"].items())
    log.info("generate: %d answers to %d prompts are chosen: %s", counts["chosen"], counts["prompts"], share)
    for reason, number in counts["left_out"].items():
        log.warning("generate: %d of %d prompts are left out: %s", number, counts["prompts"], reason)
    for author, reasons in counts["no_candidates"].items():
        said = "; ".join(f"{reason} ({number})" for reason, number in reasons.items())
        log.warning("generate: answers of %s that are no candidates: %s", author, said)
