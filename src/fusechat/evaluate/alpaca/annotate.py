"""Preferences of a judge model by AlpacaEval 2.0's annotator. The library makes the prompts, chooses which output comes first and
reads the log-probabilities; the requests are ours, so that they are kept, repeated and counted as everywhere."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fusechat.evaluate.alpaca.library import Library, library
from fusechat.models.answers import Missing
from fusechat.models.client import Reply, Request

ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
_BARE = "the judge's reply has no log-probabilities"
_UNDECIDED = "the judge's likeliest tokens name neither output"
# The order of the outputs is drawn from this and the instruction. Published annotations are made with 0.
_SEED = 0
# What the library's template engine would take for its own, wherever it stands: stands aside until the messages are cut.
_MARKS = {
    mark: f"\ue000{number}\ue001"
    for number, mark in enumerate(("<|im_start|>", "<|im_end|>", "{output_1}", "{output_2}"))
}

# All prompts, in the order of the pairs, and the annotator's settings → what the library's parser reads, one for each.
Complete = Callable[..., dict[str, list[Any]]]


@dataclass(frozen=True)
class Pair:
    """Two outputs for an instruction."""

    instruction: str
    baseline: str
    output: str


def judge_requests(pairs: Sequence[Pair]) -> list[Request]:
    """What the judge is asked, one request for each pair. The same pair gives the same request at any time."""
    requests: list[Request] = []

    def record(prompts: list[str], **settings: Any) -> dict[str, list[Any]]:
        for prompt in prompts:
            requests.append(
                Request(
                    messages=_messages(using, prompt),
                    temperature=float(settings["temperature"]),
                    max_tokens=int(settings["max_tokens"]),
                    top_logprobs=int(settings["top_logprobs"]),
                )
            )
        return {"completions_all": [_completion([]) for _ in prompts]}

    with library() as using:
        _annotate(using, pairs, record)
    return requests


def preferences(pairs: Sequence[Pair], replies: Sequence[Reply | Missing]) -> list[float | Missing]:
    """1 (the baseline is better) to 2 (the output is) for each pair: 1 + p, where the judge gives the tokens that name the
    outputs p for the output and 1 - p for the baseline. Missing where a reply does not tell."""
    telling = {index: token for index, reply in enumerate(replies) if (token := first_token(reply)) is not None}

    def give(prompts: list[str], **settings: Any) -> dict[str, list[Any]]:
        return {"completions_all": [_completion([token]) for token in telling.values()]}

    with library() as using:
        found = _annotate(using, [pairs[index] for index in telling], give)
    known = {index: found[row] for row, index in enumerate(telling) if row in found}
    return [known[index] if index in known else _why(reply) for index, reply in enumerate(replies)]


def first_token(reply: Reply | Missing) -> dict[str, Any] | None:
    """The first token of a reply with its alternatives' log-probabilities; None where the judge gives none."""
    if isinstance(reply, Missing) or not reply.logprobs or not reply.logprobs[0].get("top_logprobs"):
        return None
    return reply.logprobs[0]


def _why(reply: Reply | Missing) -> Missing:
    if isinstance(reply, Missing):
        return reply
    return Missing(_BARE if first_token(reply) is None else _UNDECIDED)


def _annotate(using: Library, pairs: Sequence[Pair], complete: Complete) -> dict[int, float]:
    """Row of a pair → its preference, where there is one."""
    if not pairs:
        return {}
    configs = using.utils.load_configs(ANNOTATOR, relative_to=using.constants.EVALUATORS_CONFIG_DIR)
    config = {**configs[ANNOTATOR], "fn_completions": complete}
    annotator = using.annotators.SinglePairwiseAnnotator(
        **config,
        seed=_SEED,
        is_shuffle=False,  # the library's would change the order of requests, not the requests
        packages_for_which_to_show_version=None,
    )
    rows = [
        {"instruction": _aside(pair.instruction), "output_1": _aside(pair.baseline), "output_2": _aside(pair.output)}
        for pair in pairs
    ]
    annotated = annotator(using.pandas.DataFrame(rows))
    return {int(row): float(value) for row, value in annotated["preference"].items()}


def _completion(content: list[dict[str, Any]]) -> dict[str, Any]:
    """A choice of a chat completion, as far as the library's parser reads it."""
    return {"logprobs": {"content": content}}


def _messages(using: Library, prompt: str) -> tuple[tuple[str, str], ...]:
    return tuple((one["role"], _back(one["content"])) for one in using.utils.prompt_to_chatml(prompt.strip()))


def _aside(text: str) -> str:
    for mark, name in _MARKS.items():
        text = text.replace(mark, name)
    return text


def _back(text: str) -> str:
    for mark, name in _MARKS.items():
        text = text.replace(name, mark)
    return text
