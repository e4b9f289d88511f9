"""The ways to align, any two of their settings together, on real vocabularies: laws that hold for each of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import paper
import texts
from cases import each, pairwise
from fusechat.align.aligner import Aligner, Pair, Side, Strategy, covered
from fusechat.align.back_off import BackOff
from fusechat.align.blocks import Blocks, Conversations
from fusechat.align.stats import AlignmentStats
from fusechat.align.vocabulary import VocabularyMap
from fusechat.data.conversations import Conversation, Message
from fusechat.data.distributions import SparseDistribution, write_distributions, write_store
from fusechat.data.prepared import FILE, Prepared, write_prepared
from fusechat.models.templates import ChatTemplate
from fusechat.models.token_bytes import token_bytes
from fusechat.models.tokenise import prepare_conversation

PAIRS = (("pivot", "qwen"), ("internlm", "mixtral"))  # pivot, source
CAPTURED, KEPT, PADDING = 6, 4, 16  # tokens of a captured and of a stored row; ids of a model past its tokenizer's
WAYS = pairwise(
    ("boundary", "dtw"),
    (("exact", False), ("edit", False), ("statistics", False), ("statistics", True)),  # and whether it looks ahead
    (False, True),
    ("label", "skip", "pivot", "condition"),
    (False, True),
)
STRATEGIES = [
    Strategy(sequence, vocabulary, top_1=top_1, unaligned=unaligned, look_ahead=look_ahead, chain_rule=chain_rule)
    for sequence, (vocabulary, look_ahead), top_1, unaligned, chain_rule in WAYS
]


@cache
def conversations() -> list[Conversation]:
    """Answers that are hard to cut, and a few plain ones."""
    few = [Conversation((Message("user", "Go on."), Message("assistant", text)), "here") for text in texts.ODD]
    few.append(Conversation((*few[0].messages, few[0].messages[0], Message("assistant", "Again: 你好 🙂.")), "here"))
    plain = [texts.conversations()[at] for at in (0, 1, 5, 9, 13, 17)]
    return few + [
        Conversation(tuple(Message(one["role"], one["content"]) for one in messages), "here") for messages in plain
    ]


def chat_model(name: str) -> ChatTemplate:
    source = paper.SOURCES[name]
    return ChatTemplate(source.tokenizer(), source.template, name)


def distributions(rows: Prepared, side: Side, seed: int) -> SparseDistribution:
    """Plausible next-token distributions: the gold token is mostly among them, next to tokens that begin alike, tokens that stand
    elsewhere, now and then a special one and one that only the model has."""
    chance = np.random.default_rng(seed)
    gold = rows.gold.tolist()
    pool = sorted(set(gold))
    alike: dict[bytes, list[int]] = {}
    for token in pool:
        alike.setdefault(side.tokens[token][:1], []).append(token)
    specials = [token for token in (side.roles.end_of_turn, side.roles.begin_of_sequence) if token is not None]
    ids = np.full((len(rows), CAPTURED), -1, dtype=np.int32)
    logprobs = np.full((len(rows), CAPTURED), -np.inf)
    nll = np.zeros(len(rows))
    for row, token in enumerate(gold):
        others = [*chance.choice(alike[side.tokens[token][:1]], 3), *chance.choice(pool, CAPTURED + 2)]
        others += [*chance.choice(specials, 1)] * (row % 3 == 0) + [len(side.tokens) + 1] * (row % 5 == 0)
        kept = [each for each in dict.fromkeys(int(other) for other in reversed(others)) if each != token]
        kept = kept[: CAPTURED - (row % 7 == 3)]  # some rows have a pad
        if row % 10:
            kept = [*kept[: CAPTURED - 1], token]
        share = np.sort(chance.dirichlet(np.full(len(kept) + 1, 0.5)))[::-1]
        order = chance.permutation(len(kept)) if row % 4 else np.arange(len(kept))[::-1]
        ids[row, : len(kept)] = [kept[at] for at in order]
        logprobs[row, : len(kept)] = np.log(np.maximum(share[: len(kept)], 1e-7))
        at = np.flatnonzero(ids[row] == token)
        nll[row] = -logprobs[row, at[0]] if len(at) else -np.log(max(share[-1] / 2, 1e-9))
    return SparseDistribution(ids, logprobs.astype(np.float16), nll.astype(np.float32))


class Room:
    """Two models and what they have of the conversations, stored in both orders."""

    def __init__(self, directory: Path, pivot: str, source: str) -> None:
        templates = chat_model(pivot), chat_model(source)
        sides = [Side.of(token_bytes(each.tokenizer), each.end_of_turn) for each in templates]
        self.pivot, self.source = sides
        self.back_off = BackOff(self.pivot.tokens)
        self.ours, self.theirs = (
            {one.id: prepare_conversation(one, each, max_length=2048)[0] for one in conversations()}
            for each in templates
        )
        rejected, self.lost = list(self.theirs)[1], list(self.theirs)[2]
        del self.theirs[rejected]
        self.captured, self.fill = (
            {identity: distributions(each, side, seed) for seed, (identity, each) in enumerate(rows.items())}
            for rows, side in ((self.theirs, self.source), (self.ours, self.pivot))
        )
        del self.captured[self.lost]
        self.data = [self._store(directory / order, (pivot, source), order) for order in ("there", "back")]
        self._outcomes: dict[Strategy, Outcome] = {}

    def _store(self, directory: Path, names: tuple[str, str], order: str) -> Conversations:
        step = 1 if order == "there" else -1
        for name in ("pivot", "source", "captured", "fill"):
            (directory / name).mkdir(parents=True)
        write_prepared(directory / "pivot" / FILE, list(self.ours.values())[::step])
        write_prepared(directory / "source" / FILE, list(self.theirs.values())[::step])
        for name, rows in (("captured", self.captured), ("fill", self.fill)):
            write_distributions(directory / name / "all.arrow", list(rows.items())[::step])
            write_store(directory / name, k=CAPTURED, files="all.arrow")
        places = ([directory / name] for name in ("pivot", "source", "captured"))
        sizes = len(self.pivot.tokens) + PADDING, len(self.source.tokens) + PADDING
        return Conversations(*places, names=names, sizes=sizes, fill=[directory / "fill"])

    def outcome(self, strategy: Strategy) -> "Outcome":
        self._outcomes[strategy] = self._outcomes.get(strategy) or self.align(strategy, 0)
        return self._outcomes[strategy]

    def align(self, strategy: Strategy, order: int) -> "Outcome":
        pair = Pair(self.pivot, self.source, strategy)
        blocks = Blocks(pair, self.data[order], processes=1)
        vocabulary_map, is_open = blocks.build_map(self.back_off, lambda _=1: None)
        figures = AlignmentStats()
        rows = dict(blocks.align(vocabulary_map, is_open, k=KEPT, advance=lambda _=1: None, figures=figures))
        return Outcome(pair, vocabulary_map, is_open, rows, figures)


@dataclass(frozen=True)
class Outcome:
    """What one strategy makes of all conversations."""

    pair: Pair
    map: VocabularyMap
    is_open: np.ndarray
    rows: dict[str, SparseDistribution]
    figures: AlignmentStats


@pytest.fixture(scope="module", params=PAIRS, ids="<-".join)
def room(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Room:
    return Room(tmp_path_factory.mktemp("room"), *request.param)


every = each("strategy", STRATEGIES)


def starts(rows: Prepared) -> dict[tuple[int, int | str], int]:
    """Which row starts at which byte of which response, or ends its turn; of several the first with a width."""
    found: dict[tuple[int, int | str], int] = {}
    for row, (response, begin, end, closing) in enumerate(
        zip(
            *(c.tolist() for c in (rows.response, rows.begin, np.where(rows.lead, 0, rows.end), rows.end_of_turn)),
            strict=True,
        )
    ):
        if closing or end > max(begin, 0):
            found.setdefault((response, "end" if closing else max(begin, 0)), row)
    return found


def transferred(room: Room, strategy: Strategy) -> Iterator[tuple[Prepared, Prepared, SparseDistribution, Any]]:
    """Conversations that both models have, with what is transferred in them before gaps are filled."""
    outcome = room.outcome(strategy)
    aligner = Aligner(outcome.pair, outcome.map, outcome.is_open)
    for identity, captured in room.captured.items():
        ours, theirs = room.ours[identity], room.theirs[identity]
        yield ours, theirs, captured, aligner.transferred(ours, theirs, captured, k=KEPT)


@every
def test_no_row_has_more_mass_than_one_and_the_tail_has_what_is_missing(room: Room, strategy: Strategy) -> None:
    for ours, _, captured, (alignment, candidates, result) in transferred(room, strategy):
        stored = room.outcome(strategy).rows[ours.id].probabilities.sum(axis=1)
        assert stored.max() <= 1 + 2e-3  # float16 logarithms
        here = result.rows.probabilities.sum(axis=1)
        assert here + result.rows.tail == pytest.approx(np.ones(len(here)), abs=2e-3)
        assert (here <= result.mapped + 2e-3).all()
        rows = np.flatnonzero(alignment.unclipped)
        given = captured.probabilities[alignment.source_row[rows]].sum(axis=1)
        seen = candidates.mass[rows].sum(axis=1)  # of the source's candidates none is lost and none counts twice
        if strategy.chain_rule:
            assert (seen >= given - 2e-3).all()
            assert (seen <= 1 + 2e-3).all()
        else:
            assert seen == pytest.approx(given, abs=2e-3)


@every
def test_ids_are_of_the_pivots_vocabulary_and_special_only_by_role_or_as_the_gold_token(
    room: Room, strategy: Strategy
) -> None:
    by_role = set(vars(room.pivot.roles).values())
    special = np.array(sorted(room.pivot.tokens.special - by_role), dtype=np.int32)
    for identity, rows in room.outcome(strategy).rows.items():
        assert rows.ids.shape == rows.logprobs.shape == (len(room.ours[identity]), KEPT)
        assert rows.ids.min() >= -1
        own = rows.ids if strategy.unaligned != "pivot" else np.where(rows.ids < len(room.pivot.tokens), rows.ids, -1)
        assert own.max() < len(room.pivot.tokens)
        if strategy.unaligned != "pivot":  # whose own distribution may hold anything
            assert not (np.isin(rows.ids, special) & (rows.ids != room.ours[identity].gold[:, None])).any()
        assert (np.isneginf(rows.logprobs) == (rows.ids < 0)).all()
        most = KEPT - strategy.chain_rule  # which may have put the gold token last
        assert (rows.logprobs[:, 1:most] <= rows.logprobs[:, : most - 1]).all()
        assert all(len(set(row)) == len(row) for row in ([t for t in row if t >= 0] for row in rows.ids.tolist()))


@every
def test_rows_that_the_source_says_nothing_about_are_filled_as_asked_and_no_others(
    room: Room, strategy: Strategy
) -> None:
    filled = 0
    for identity, rows in room.outcome(strategy).rows.items():
        ours = room.ours[identity]
        bare = np.ones(len(ours), dtype=bool)
        if identity in room.captured:
            theirs, captured = room.theirs[identity], room.captured[identity]
            outcome = room.outcome(strategy)
            aligner = Aligner(outcome.pair, outcome.map, outcome.is_open)
            alignment, _, result = aligner.transferred(ours, theirs, captured, k=KEPT)
            if strategy.sequence == "boundary":
                there, here = starts(theirs), starts(ours)
                naive = np.full(len(ours), -1)
                naive[list(here.values())] = [there.get(key, -1) for key in here]
                assert alignment.source_row[~ours.lead].tolist() == naive[~ours.lead].tolist()
            conditioned = (alignment.source_row < 0) & (result.mapped > 0)
            assert strategy.unaligned == "condition" or not conditioned.any()
            bare = (alignment.source_row < 0) & ~conditioned
            assert (bare == ~covered(alignment, result))[~ours.lead].all()
            bare |= ours.lead & (result.mapped == 0)
            assert rows.ids[~bare].tolist() == result.rows.ids[~bare].tolist()
        expected = SparseDistribution(np.full((len(ours), KEPT), -1), np.full((len(ours), KEPT), -np.inf), np.zeros(0))
        if strategy.unaligned in ("label", "condition"):
            expected.ids[:, 0], expected.logprobs[:, 0] = ours.gold, 0.0
        elif strategy.unaligned == "pivot":
            own = room.fill[identity]
            expected.ids[:], expected.logprobs[:] = own.ids[:, :KEPT], own.logprobs[:, :KEPT]
            expected.ids[ours.lead], expected.logprobs[ours.lead] = -1, -np.inf
            expected.ids[ours.lead, 0], expected.logprobs[ours.lead, 0] = ours.gold[ours.lead], 0.0
        assert rows.ids[bare].tolist() == expected.ids[bare].tolist()
        np.testing.assert_allclose(
            rows.logprobs[bare], expected.logprobs[bare], atol=1e-3
        )  # float16, scaled to the tail
        filled += int(bare.sum())
    lacking = sum(len(rows) for identity, rows in room.ours.items() if identity not in room.captured)
    assert filled >= lacking > 0


@each("strategy", [one for one in STRATEGIES if one.chain_rule])
def test_the_chain_rule_keeps_every_gold_token_that_whole_source_tokens_make_up(room: Room, strategy: Strategy) -> None:
    """With at least the product of their probabilities, where there are several; captured or not."""
    alone, several = 0, 0
    for ours, theirs, captured, (alignment, _, result) in transferred(room, strategy):
        ends = {(number, int(theirs.end[row])): row for (number, at), row in starts(theirs).items() if at != "end"}
        probability = np.where(result.rows.ids == ours.gold[:, None], result.rows.probabilities, 0.0).sum(axis=1)
        stored = (room.outcome(strategy).rows[ours.id].ids == ours.gold[:, None]).any(axis=1)
        for row in np.flatnonzero(alignment.unclipped & ~ours.end_of_turn).tolist():
            first, last = int(alignment.source_row[row]), ends.get((int(ours.response[row]), int(ours.end[row])), -1)
            if max(theirs.begin[first], 0) != ours.begin[row]:
                continue  # warped
            if last > first:
                product = np.exp(-captured.nll[first : last + 1].astype(np.float64).sum())
                assert 0.97 * product <= probability[row] <= 1 + 2e-3
                assert stored[row]
                several += 1
            elif last == first and (strategy.vocabulary, strategy.top_1) != ("statistics", True):
                assert stored[row]
                alone += 1
    assert several + alone > 100 or strategy.top_1
    assert several > 10 or room.data[0].names[0] == "pivot"  # whose tokens are shorter than Qwen's


@every
def test_the_order_of_conversations_changes_nothing(room: Room, strategy: Strategy, tmp_path: Path) -> None:
    one, other = room.outcome(strategy), room.align(strategy, 1)
    assert list(one.rows) == list(reversed(other.rows))
    for identity, rows in one.rows.items():
        assert rows.ids.tobytes() == other.rows[identity].ids.tobytes()
        assert rows.logprobs.tobytes() == other.rows[identity].logprobs.tobytes()
    one.map.save(tmp_path / "one.arrow")
    other.map.save(tmp_path / "other.arrow")
    assert (tmp_path / "one.arrow").read_bytes() == (tmp_path / "other.arrow").read_bytes()
    assert one.figures.summary() == other.figures.summary()
