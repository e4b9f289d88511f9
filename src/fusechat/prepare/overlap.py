"""Finds evaluation texts in the training data: identical ones, and near-duplicates.

Prompts are compared with prompts, and responses with responses. A *prompt* is the first user message, a *response* any assistant
message; system messages are ignored. Texts are identical up to case, white space and Unicode compatibility (NFKC). An evaluation
text is a near-duplicate of a training text if at least the share `NEAR` of its runs of `RUN` words is in the training text: its
*containment*, which is never less than the Jaccard similarity of both. A word is a run of letters and digits, or one character
of a script without spaces between words. Of texts with fewer than `FEWEST` words, only whole prompts are compared.

No training text is missed: a text with m of another's n runs has one of any n - m + 1 of them, so that candidates come from an
index of that many runs of each evaluation text, the rarest, and each candidate is counted exactly. Training data is read once.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from fusechat.data.conversations import Conversation, DataSet, Questions, read_conversations

RUN, NEAR, FEWEST = 3, Fraction(4, 5), 8
SAME, SAME_PROMPT, SAME_RESPONSE = "same conversation", "same prompt", "same response"
NEAR_PROMPT, NEAR_RESPONSE = "near-duplicate prompt", "near-duplicate response"
KINDS = (SAME, SAME_PROMPT, SAME_RESPONSE, NEAR_PROMPT, NEAR_RESPONSE)  # the strongest first
# Thai, Lao, Burmese, Khmer; kana; ideographs
_ALONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[{_ALONE}]|[^\\W_{_ALONE}]+")
Run = tuple[str, ...]


@dataclass(frozen=True)
class Hit:
    """An evaluation conversation that is in a set of training conversations. `kind`: how; `training`: the most similar one (file
    and line); `similarity`: its share of the evaluation text's runs of words; `times`: how many training conversations match."""

    evaluation: str
    evaluation_set: str
    training: str
    training_set: str
    kind: str
    similarity: float
    times: int


@dataclass(frozen=True)
class Overlap:
    """`hits`, sorted by evaluation set, conversation, training set and `KINDS`. `sizes`: conversations of each evaluation set.
    `training`: the names of the training sets."""

    hits: list[Hit]
    sizes: dict[str, int]
    training: list[str]

    def found(self, evaluation: str, *training: str) -> dict[str, int]:
        """Conversations of an evaluation set that are in these training sets (default: all), counted by their strongest kind."""
        kinds: dict[str, int] = {}
        for hit in self.hits:
            if hit.evaluation_set == evaluation and (hit.training_set in training or not training):
                kinds[hit.evaluation] = min(kinds.get(hit.evaluation, len(KINDS)), KINDS.index(hit.kind))
        counts = Counter(kinds.values())
        return {kind: counts[rank] for rank, kind in enumerate(KINDS) if counts[rank]}

    def pairs(self) -> list[dict[str, Any]]:
        """The same for each evaluation set and each training set."""
        return [
            {"evaluation": name, "training": other, "conversations": size, "found": self.found(name, other)}
            for name, size in self.sizes.items()
            for other in self.training
        ]

    def sentences(self) -> list[str]:
        """A line for each evaluation set with hits."""
        said = []
        for name, size in self.sizes.items():
            found = self.found(name)
            if found:
                kinds = ", ".join(f"{count} {kind}" for kind, count in found.items())
                said.append(
                    f"{sum(found.values())} of {size} conversations of {name} are in the training data ({kinds})"
                )
        return said


def find_overlap(
    training: Sequence[DataSet | Questions],
    evaluation: Sequence[DataSet | Questions],
    advance: Callable[[], object] = lambda: None,
) -> Overlap:
    """Reads all sets and compares them; skips malformed records. `advance` is called for each training conversation."""
    several = [(data.name, one) for data in evaluation for one in _conversations(data)]
    index = Index([one for _, one in several])
    best: dict[tuple[int, int, int], Hit] = {}
    for place, data in enumerate(training):
        for conversation in _conversations(data):
            advance()
            for number, kinds in index.look_up(conversation).items():
                name, one = several[number]
                for kind, similarity in kinds.items():
                    key = (number, place, KINDS.index(kind))
                    hit = Hit(one.where, name, conversation.where, data.name, kind, round(similarity, 4), 1)
                    known = best.get(key, replace(hit, similarity=-1.0, times=0))
                    best[key] = replace(max(known, hit, key=lambda each: each.similarity), times=known.times + 1)
    sizes = Counter(name for name, _ in several)
    names = {data.name: sizes[data.name] for data in evaluation}
    return Overlap([best[key] for key in sorted(best)], names, [data.name for data in training])


def _conversations(data: DataSet | Questions) -> Iterator[Conversation]:
    found: Iterable[object] = data.read() if isinstance(data, Questions) else read_conversations(data)
    return (one for one in found if isinstance(one, Conversation))


@dataclass(frozen=True)
class _Near:
    """A text of an evaluation conversation: the conversation's number, the kind of a near-duplicate of it, its runs of words."""

    owner: int
    kind: str
    runs: frozenset[Run]

    @property
    def needed(self) -> int:
        """How many of its runs a near-duplicate has."""
        return math.ceil(len(self.runs) * NEAR)


def normalised(text: str) -> str:
    """A text with NFKC, case folding, and single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def runs_of(text: str) -> frozenset[Run]:
    """The runs of words of a normalised text; empty if it has too few words."""
    words = _WORD.findall(text)
    return frozenset(zip(*(words[at:] for at in range(RUN)), strict=False)) if len(words) >= FEWEST else frozenset()


class _Texts:
    """The texts of a conversation to compare. `whole`: all of it; `parts`: its prompt and responses, each with its kinds as
    identical and as a near-duplicate, and its runs of words."""

    def __init__(self, conversation: Conversation) -> None:
        self.whole = tuple((m.role, normalised(m.content)) for m in conversation.messages if m.role != "system")
        prompts = [text for role, text in self.whole if role == "user"][:1]
        responses = dict.fromkeys(text for role, text in self.whole if role == "assistant")
        self.parts = [(SAME_PROMPT, NEAR_PROMPT, text, runs_of(text)) for text in prompts]
        self.parts += [(SAME_RESPONSE, NEAR_RESPONSE, text, runs_of(text)) for text in responses]

    def wholes(self) -> Iterator[tuple[str, object]]:
        """Keys that identical texts share, with their kinds."""
        if self.whole:
            yield SAME, self.whole
        for same, _, text, runs in self.parts:
            if runs or (same == SAME_PROMPT and text):
                yield same, text


class Index:
    """An index of evaluation conversations, to look up training conversations."""

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self._same: dict[tuple[str, object], set[int]] = defaultdict(set)
        near: list[_Near] = []
        for number, texts in enumerate(map(_Texts, conversations)):
            for key in texts.wholes():
                self._same[key].add(number)
            near += [_Near(number, kind, runs) for _, kind, _, runs in texts.parts if runs]
        self._by_run: dict[str, dict[Run, list[_Near]]] = {NEAR_PROMPT: {}, NEAR_RESPONSE: {}}
        frequency = Counter(run for one in near for run in one.runs)
        for one in near:
            rarest = sorted(one.runs, key=lambda run: (frequency[run], run))
            for run in rarest[: len(rarest) - one.needed + 1]:
                self._by_run[one.kind].setdefault(run, []).append(one)

    def look_up(self, training: Conversation) -> dict[int, dict[str, float]]:
        """Evaluation conversations that match a training conversation: number → kinds with their similarity."""
        texts, found = _Texts(training), defaultdict[int, dict[str, float]](dict)
        for key in texts.wholes():
            for number in self._same.get(key, ()):
                found[number][key[0]] = 1.0
        for _, kind, _, runs in texts.parts:
            for number, similarity in self._near(kind, runs):
                found[number][kind] = max(similarity, found[number].get(kind, 0.0))
        return {number: _telling(kinds) for number, kinds in found.items()}

    def _near(self, kind: str, runs: frozenset[Run]) -> Iterator[tuple[int, float]]:
        index = self._by_run[kind]
        for one in {id(one): one for run in runs & index.keys() for one in index[run]}.values():
            common = len(one.runs & runs)
            if common >= one.needed:
                yield one.owner, common / len(one.runs)


def _telling(kinds: dict[str, float]) -> dict[str, float]:
    """The kinds without those that others imply."""
    if SAME in kinds:
        return {SAME: 1.0}
    implied = {NEAR_PROMPT: SAME_PROMPT, NEAR_RESPONSE: SAME_RESPONSE}
    return {kind: similarity for kind, similarity in kinds.items() if implied.get(kind) not in kinds}
