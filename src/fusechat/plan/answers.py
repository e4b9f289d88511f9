"""What is known of answers before they are there: how many, how long, and conversations that stand for them.

Answers that a run left on disk stand for all of their author. Else answers are taken to be those of the data file: the last
assistant message of each record, or its `reference`; a prompt without one gets another prompt's. Where the file holds none at all,
text of the prompts stands for answers of all lengths up to `max_new_tokens`, half of it on average.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fusechat.data.conversations import Conversation
from fusechat.data.prompts import answered
from fusechat.generate.backends import BEYOND_SERVERS, beyond_servers
from fusechat.generate.score import distinct
from fusechat.models.answers import Missing, Prompt
from fusechat.models.asking import Asking
from fusechat.plan.sampling import SAMPLE, Texts
from fusechat.recipe.generate import Generate
from fusechat.run.files import read_json
from fusechat.run.shards import Row, Shards

Origin = Literal["disk", "file", "assumed"]


@dataclass(frozen=True)
class Answers:
    """Of one author. `texts`: its candidates, conversations that end with the answer; `rows`: some of its answers as they are
    stored, each of which stands for `scale`; `lengths`: tokens that are generated for an answer, the one that ends it too, of each
    of a sample; `origin`: where all that is from; `have`: how many answers are on disk; `share`: of all prompts of the author,
    those that have a candidate."""

    texts: Texts
    rows: list[Row]
    scale: float
    lengths: np.ndarray
    origin: Origin
    have: int
    share: float

    @property
    def answers(self) -> float:
        return len(self.rows) * self.scale

    @property
    def tokens(self) -> float:
        """That are generated."""
        return float(self.lengths.mean()) * self.answers if len(self.lengths) else 0.0

    def longest(self, together: int) -> float:
        """Tokens of the longest of so many answers, on average."""
        return float(longest(self.lengths, together)) if len(self.lengths) else 0.0


def longest(lengths: np.ndarray, together: int) -> float:
    """The greatest of `together` draws from `lengths`, on average."""
    chance = (np.arange(len(lengths) + 1) / len(lengths)) ** together  # that all draws are among the first so many
    return float((np.sort(lengths) * np.diff(chance)).sum())


def join(sets: Sequence[Texts]) -> Texts:
    """Several data sets as one, each with a part of the sample."""
    if len(sets) == 1:
        return sets[0]
    total = sum(one.conversations for one in sets)
    room = min(SAMPLE, sum(len(one.sample) for one in sets))
    parts: list[Conversation] = []
    for one in sets:
        number = min(len(one.sample), round(room * one.conversations / max(1, total)) or 1)
        parts += [one.sample[place * len(one.sample) // number] for place in range(number)] if number else []
    beside = {key: text for one in sets for key, text in one.beside.items()}
    return Texts(sets[0].data, total, tuple(parts), beside=beside)


def stored(prompts: Texts, directory: Path, tokenizer: Any, how: Generate, times: float) -> Answers | None:
    """The answers of a step that is finished or begun; None where there are none. `tokenizer`: the author's."""
    shards = Shards(directory, "answers")
    every = [row for number in sorted(_numbers(directory)) for row in read_json(shards.path(number))["rows"]]
    by_id = {one.id: one for one in prompts.sample}
    rows = [row for row in every if row["id"] in by_id]
    whole_ones = [row for row in rows if row["text"] or row["complete"]]  # without prompts that could not be asked
    if not rows:
        return None
    scale = times * prompts.conversations * how.samples / len(rows)
    candidates = distinct(rows)
    texts = [answered(by_id[row["id"]], row["text"]) for row in candidates]
    ids = [row["tokens"] or tokenizer(row["text"], add_special_tokens=False)["input_ids"] for row in whole_ones]
    lengths = [min(len(one) + 1, how.max_new_tokens) for one in ids]  # a server tells no tokens
    whole = replace(prompts, conversations=len(texts) * scale, sample=tuple(texts))
    share = len({row["id"] for row in candidates}) / len({row["id"] for row in rows})
    return Answers(whole, rows, scale, np.array(lengths), "disk", len(every), share)


def _numbers(directory: Path) -> Iterator[int]:
    return (int(file.stem.rpartition("-")[2]) for file in directory.glob("answers-*.json"))


def expected(prompts: Texts, asked: "Asked", tokenizer: Any, how: Generate, times: float) -> Answers:
    """To those prompts that can be `asked`. `tokenizer`: the author's."""
    share = len(asked.able) / max(1, len(prompts.sample))
    prompts = replace(prompts, conversations=prompts.conversations * share, sample=asked.able)
    said = [prompts.beside.get(one.id, "") for one in prompts.sample]
    known = [text for text in said if text.strip()]
    if known:
        said = [text if text.strip() else known[place % len(known)] for place, text in enumerate(said)]
    else:
        said = _like_prompts(prompts, tokenizer, how.max_new_tokens)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][: how.max_new_tokens] for text in said]
    lengths = np.array([min(len(one) + 1, how.max_new_tokens) for one in ids])
    if known and len(lengths):  # a model's own lengths vary more than those of answers that somebody chose
        lengths = np.minimum(_exponential(len(lengths), float(lengths.mean())), how.max_new_tokens)
    texts = tuple(answered(one, text) for one, text in zip(prompts.sample, said, strict=True))
    rows = [
        {"id": one.id, "sample": 0, "text": text, "tokens": list(tokens), "complete": True, "why": ""}
        for one, text, tokens in zip(prompts.sample, said, ids, strict=True)
    ]
    number = times * prompts.conversations * how.samples
    whole = replace(prompts, conversations=number, sample=texts)
    scale = number / max(1, len(rows))
    return Answers(whole, rows, scale, lengths, "file" if known else "assumed", 0, share)


def _exponential(number: int, mean: float) -> np.ndarray:
    """Evenly spaced quantiles of an exponential distribution."""
    return -mean * np.log(1 - (np.arange(number) + 0.5) / number)


def _like_prompts(prompts: Texts, tokenizer: Any, most: int) -> list[str]:
    """Text of all lengths up to `most` tokens, in no order."""
    chance = random.Random(0)
    number = len(prompts.sample)
    lengths = [max(1, round((place + 0.5) / number * most)) for place in range(number)]
    chance.shuffle(lengths)
    source = "\n".join(message.content for one in prompts.sample for message in one.messages)
    ids = tokenizer(source, add_special_tokens=False)["input_ids"]
    ids *= -(-2 * most // len(ids)) if ids else 0
    found = []
    for length in lengths:
        begin = chance.randrange(max(1, len(ids) - length))
        found.append(str(tokenizer.decode(ids[begin : begin + length], skip_special_tokens=True)).strip() or "?")
    return found


@dataclass(frozen=True)
class Asked:
    """Prompts of a sample as an author is asked them: those that can be, their `lengths` in tokens, why others cannot be, and the
    tokens that the author takes, None where nobody knows."""

    able: tuple[Conversation, ...]
    lengths: np.ndarray
    refused: Counter[str]
    room: int | None


def ask(prompts: Texts, asking: Asking) -> Asked:
    encoded = [asking.encode(Prompt(one.id, (), 0.0, 1, about=one)) for one in prompts.sample]
    able = {place: ids for place, ids in enumerate(encoded) if not isinstance(ids, Missing)}
    refused = Counter(one.reason for one in encoded if isinstance(one, Missing))
    lengths = np.array([len(ids) for ids in able.values()], dtype=np.int64)
    return Asked(tuple(prompts.sample[place] for place in able), lengths, refused, asking.room)


def ask_server(prompts: Texts, tokenizer: Any) -> Asked:
    """`tokenizer`: of another model, for the server's own is not known."""
    able = tuple(one for one in prompts.sample if not beyond_servers(one))
    texts = ["\n".join(message.content for message in one.messages) for one in able]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    number = len(prompts.sample) - len(able)
    return Asked(able, np.array(lengths, dtype=np.int64), Counter({BEYOND_SERVERS: number} if number else {}), None)
