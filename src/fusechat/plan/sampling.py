"""What models make of data sets, by a sample of their conversations: tokens, response tokens, lengths, what is left out."""

import random
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fusechat.data.conversations import Conversation, DataSet, Malformed, read_records
from fusechat.data.prepared import FILE, Prepared, write_prepared
from fusechat.data.records import reference_of
from fusechat.models.tokenise import RejectedError, prepare_conversation

SAMPLE = 1000  # conversations of a set; of smaller ones all


@dataclass(frozen=True)
class Texts:
    """A data set, read once: how many different conversations it has, some of them, and what is wrong with records. Of prompts
    `beside`: the answers in the records of the sample, by the prompt's id; `unanswered`: where the records without one are."""

    data: DataSet
    conversations: float
    sample: tuple[Conversation, ...]
    malformed: tuple[str, ...] = ()
    repeated: int = 0
    beside: Mapping[str, str] = field(default_factory=dict)
    unanswered: tuple[str, ...] = ()


@dataclass(frozen=True)
class Counted:
    """A data set as one model sees it. `lengths`, `rows`: tokens and response tokens of each conversation of the sample that can be
    used, and each of them stands for `scale`; `rejected`: reason → how many of the whole set; `bytes`: of the prepared file;
    `kinds`: different tokens among the sample's response tokens; `greatest` of all its tokens, -1 of none; `seconds`: of preparing
    the whole set."""

    lengths: np.ndarray
    rows: np.ndarray
    responses: float
    scale: float
    bytes: int
    kinds: int
    seconds: float
    greatest: int = -1
    rejected: Mapping[str, int] = field(default_factory=dict)

    @property
    def conversations(self) -> float:
        return len(self.lengths) * self.scale

    @property
    def tokens(self) -> float:
        return float(self.lengths.sum()) * self.scale

    @property
    def response_tokens(self) -> float:
        return float(self.rows.sum()) * self.scale

    def times(self, weight: float) -> "Counted":
        """As an epoch sees it: `weight` times."""
        return replace(self, scale=self.scale * weight, responses=self.responses * weight)

    @property
    def length(self) -> float:
        """Tokens of the conversation that a token is in, on average."""
        return float((self.lengths.astype(float) ** 2).sum() / max(1, self.lengths.sum()))


def read_texts(data: DataSet, *, seed: int = 0, sample: int = SAMPLE) -> Texts:
    """Reads the whole set, and keeps a random sample of at most `sample` of its conversations, in their order."""
    chance, malformed = random.Random(seed), []
    kept: list[tuple[int, Conversation, str | None]] = []
    unanswered: list[str] = []
    seen: set[str] = set()
    repeated = 0
    for read in read_records(data):
        if isinstance(read, Malformed):
            malformed.append(f"{read.where}: {read.reason}")
            continue
        record, beside = read.conversation, reference_of(read.whole, read.record) if data.prompts else None
        beside = beside[0] if isinstance(beside, list) else beside
        if data.prompts and beside is None:
            unanswered.append(record.where)
        if record.id in seen:
            repeated += 1
        else:
            seen.add(record.id)
            place = len(seen) - 1
            if place < sample:
                kept.append((place, record, beside))
            elif (instead := chance.randrange(place + 1)) < sample:
                kept[instead] = (place, record, beside)
    kept.sort(key=lambda each: each[0])
    answers = {one.id: beside for _, one, beside in kept if beside is not None}
    chosen = tuple(one for _, one, _ in kept)
    return Texts(data, len(seen), chosen, tuple(malformed), repeated, answers, tuple(unanswered))


def count(texts: Texts, template: Any, *, times: float = 1.0, **rules: Any) -> Counted:
    """Prepares the sample for one model, by the `rules` of `prepare_conversation`. `times`: how often the set
    is to be thought of, for a plan of more data of its kind."""
    scale = times * texts.conversations / max(1, len(texts.sample))
    began, reasons = time.perf_counter(), Counter[str]()
    kept: list[Prepared] = []
    for conversation in texts.sample:
        try:
            kept.append(prepare_conversation(conversation, template, **rules)[0])
        except RejectedError as error:
            reasons[str(error)] += 1
    gold = [one.gold for one in kept]
    with tempfile.TemporaryDirectory() as room:
        write_prepared(Path(room) / FILE, iter(kept))
        size = (Path(room) / FILE).stat().st_size
    return Counted(
        lengths=np.array([len(one.input_ids) for one in kept], dtype=np.int64),
        rows=np.array([len(one) for one in kept], dtype=np.int64),
        responses=sum(len(one.content_bytes) for one in kept) * scale,
        scale=scale,
        bytes=round(size * scale),
        kinds=len(np.unique(np.concatenate(gold))) if gold else 0,
        seconds=(time.perf_counter() - began) * scale,
        greatest=max((int(one.input_ids.max()) for one in kept), default=-1),
        rejected={reason: round(number * scale) for reason, number in reasons.most_common()},
    )


def padded(lengths: np.ndarray, size: int, *, draws: int = 200, seed: int = 0) -> float:
    """Tokens of a random batch of `size` conversations, padding counted, over the tokens in it, on average."""
    if not len(lengths) or size == 1:
        return 1.0
    drawn = np.random.default_rng(seed).choice(lengths, size=(draws, size))
    return float(size * drawn.max(axis=1).sum() / drawn.sum())
