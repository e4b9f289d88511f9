"""One alignment strategy, conversation by conversation. `Survey` collects what the vocabulary map needs; `Aligner` aligns each
conversation with the finished map. Both can be sent to other processes; the map is built in one."""

from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from fusechat.align.back_off import BackOff
from fusechat.align.boundary_bias import RARE_BOUNDARY, boundary_probability
from fusechat.align.candidates import Candidates, Remainders, gather, remainders_clipped, remainders_inside
from fusechat.align.chain import with_own_token
from fusechat.align.counts import Counts, Seen, count_pairs
from fusechat.align.dtw import dtw_rows
from fusechat.align.lead import align_leads
from fusechat.align.lookahead import Ahead, bytes_ahead, extendable_tokens, next_candidates, rows_ahead, with_ahead
from fusechat.align.sequence import Alignment, align_rows
from fusechat.align.spelling import Spelling
from fusechat.align.stats import AlignmentStats
from fusechat.align.transfer import Transfer, Transferred
from fusechat.align.vocabulary import SpecialTokens, VocabularyMap, build_map, special_token_map
from fusechat.data.distributions import SparseDistribution, nothing
from fusechat.data.prepared import Prepared
from fusechat.models.token_bytes import TokenBytes


@dataclass(frozen=True)
class Strategy:
    """How to align: the keys of a recipe's `align` section. `gold`: whether the gold token stands in where the source says nothing;
    else the row has no targets."""

    sequence: Literal["boundary", "dtw"] = "boundary"
    vocabulary: Literal["exact", "edit", "statistics"] = "statistics"
    top_1: bool = False
    unaligned: Literal["label", "skip", "pivot", "condition"] = "label"
    look_ahead: bool = False
    chain_rule: bool = False
    min_mass: float = 0.0
    gold: bool = True

    @classmethod
    def of(cls, section: Any) -> "Strategy":
        """The strategy of a recipe's `align` section."""
        own = {field.name: getattr(section, field.name) for field in fields(cls) if field.name != "gold"}
        return cls(**{**own, "look_ahead": section.looks_ahead})


@dataclass(frozen=True)
class Side:
    """One model's tokens: their bytes, and its special tokens by role."""

    tokens: TokenBytes
    roles: SpecialTokens
    spelling: Spelling

    @classmethod
    def of(cls, tokens: TokenBytes, end_of_turn: int | None, *, rows: int | None = None) -> "Side":
        """Builds a side. `end_of_turn`: the token that ends a turn in the model's template. `rows`: the size of the model's
        embedding, if its tokenizer may have more tokens."""
        tokenizer: Any = tokens.tokenizer
        ids = (end_of_turn, tokenizer.eos_token_id, tokenizer.bos_token_id)
        known = [token if token is None or rows is None or token < rows else None for token in ids]
        return cls(tokens, SpecialTokens(*known), Spelling.of(tokens))


@dataclass(frozen=True)
class Pair:
    """A pivot, a source and the strategy that aligns them. `same_tokens`: both have the same tokenizer."""

    pivot: Side
    source: Side
    strategy: Strategy
    same_tokens: bool = False

    def align(self, pivot: Prepared, source: Prepared) -> Alignment:
        """Finds the source row that corresponds to each pivot row."""
        spell = (self.pivot.tokens, self.source.tokens)
        own = dtw_rows(pivot, source, spell) if self.strategy.sequence == "dtw" else None
        return align_leads(align_rows(pivot, source, own), pivot, source, spell)

    def remainders(
        self, alignment: Alignment, pivot: Prepared, source: Prepared, captured: SparseDistribution
    ) -> list[Remainders]:
        """The bytes that remain of candidates where they are not whole source tokens."""
        spell = (self.pivot.tokens, self.source.tokens)
        several = [remainders_clipped(alignment, pivot, source, captured, spell=spell)]
        if self.strategy.unaligned == "condition" and alignment.inside.any():
            inside = remainders_inside(
                alignment, source, captured, tokens=self.source.tokens, spelling=self.source.spelling
            )
            several.append(inside)
        return several

    def ahead(self, alignment: Alignment, source: Prepared, is_open: np.ndarray) -> Ahead:
        """The rows at which to look one source token ahead."""
        inside = self.strategy.unaligned == "condition"
        return rows_ahead(alignment, source, is_open, self.source.tokens, inside=inside)

    def extendable_tokens(self, counts: Counts) -> np.ndarray:
        """bool [source tokens]: tokens that longer pivot tokens start with."""
        if self.same_tokens:
            return np.zeros(len(self.source.tokens), dtype=bool)
        return extendable_tokens(counts, self.pivot.tokens, self.source.tokens)

    def build_map(self, seen: Seen, back_off: BackOff) -> VocabularyMap:
        """The vocabulary map W for what a survey has `seen`."""
        return build_map(
            seen,
            source=self.source.tokens,
            back_off=back_off,
            roles=special_token_map(self.pivot.roles, self.source.roles),
            vocabulary=self.strategy.vocabulary,
            top_1=self.strategy.top_1,
            same_tokens=self.same_tokens,
        )


class Survey:
    """Collects what the vocabulary map needs: `count` all conversations first, then call `need` for each."""

    def __init__(self, pair: Pair, is_open: np.ndarray | None = None) -> None:
        self.pair = pair
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self._parts: Counter[tuple[bytes, int]] = Counter()
        self._tokens: list[np.ndarray] = []
        self._remaining_bytes: set[bytes] = set()
        self._open = is_open if pair.strategy.look_ahead else None

    def count(self, pivot: Prepared, source: Prepared) -> None:
        """Counts the pairs of tokens that start at the same byte of the conversation."""
        alignment = self.pair.align(pivot, source)
        rows = np.flatnonzero(alignment.unclipped & ~pivot.end_of_turn)
        self._pairs.append((source.gold[alignment.source_row[rows]], pivot.gold[rows]))

    def counts(self) -> Counts:
        """The counted pairs so far."""
        return count_pairs(self._pairs)

    def need(self, pivot: Prepared, source: Prepared, captured: SparseDistribution | None) -> None:
        """Collects the tokens and bytes that the map needs a row for, and how bytes continue in this conversation. Without
        `captured` distributions only the latter."""
        pair, spell = self.pair, self.pair.source.tokens
        alignment = pair.align(pivot, source)
        if pair.strategy.unaligned == "condition":
            rows = np.flatnonzero(alignment.inside)
            tokens, given = source.gold[alignment.inside_row[rows]].tolist(), alignment.given[rows].tolist()
            self._continue([spell[token][first:] for token, first in zip(tokens, given, strict=True)], pivot.gold[rows])
        if captured is not None:
            self._tokens += [np.unique(captured.ids[captured.ids >= 0]), np.unique(source.gold)]
            for remainders in pair.remainders(alignment, pivot, source, captured):
                self._remaining_bytes.update(remainders.data)
        if self._open is not None:
            ahead = pair.ahead(alignment, source, self._open)
            different, which = bytes_ahead(ahead, source.gold[ahead.source_row + 1][:, None], spell)
            self._continue([different[at] for at in which[:, 0].tolist()], pivot.gold[ahead.pivot_row])
            if captured is not None:
                self._remaining_bytes.update(bytes_ahead(ahead, next_candidates(ahead, captured)[0], spell)[0])

    def _continue(self, remaining_bytes: list[bytes], tokens: np.ndarray) -> None:
        """Counts the pivot tokens that start where these bytes follow."""
        self._parts.update((rest, token) for rest, token in zip(remaining_bytes, tokens.tolist(), strict=True) if rest)

    def seen(self) -> Seen:
        """All that was collected so far."""
        tokens = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *self._tokens]))
        return Seen(self.counts(), self._parts, tokens, self._remaining_bytes - {b""})


class Aligner:
    """Aligns a source's distributions to the pivot's tokens with a finished map. `figures` counts what happened."""

    def __init__(self, pair: Pair, vocabulary_map: VocabularyMap, is_open: np.ndarray) -> None:
        self.pair, self.map, self.is_open = pair, vocabulary_map, is_open
        self.transfer = Transfer(vocabulary_map, len(pair.pivot.tokens))
        self.figures = AlignmentStats()

    def align(
        self,
        pivot: Prepared,
        source: Prepared,
        captured: SparseDistribution,
        *,
        k: int,
        fill: SparseDistribution | None = None,
    ) -> SparseDistribution:
        """Targets [n_pivot, k] for the pivot's rows of one conversation, or of several joined. `fill` [n_pivot, k]: the pivot's
        own distributions, for `unaligned: pivot`."""
        alignment, candidates, result = self.transferred(pivot, source, captured, k=k)
        has_source, little = self.taught(alignment, result)
        self.figures.add(alignment, candidates, result, self.map, little=little)
        share = boundary_probability(source, captured, self.pair.source.spelling)[alignment.source_row]
        self.figures.improbable_boundaries += int((alignment.aligned & (share < RARE_BOUNDARY)).sum())
        nothing_left = little | (pivot.lead & ~has_source)
        result.rows.ids[nothing_left], result.rows.logprobs[nothing_left] = -1, -np.inf
        result.rows.tail[nothing_left] = 1.0
        return self._fill(pivot, has_source | little, result.rows, fill)

    def taught(self, alignment: Alignment, result: Transferred) -> tuple[np.ndarray, np.ndarray]:
        """bool [n_pivot] each: rows that receive enough of the source's mass, and content rows that receive less than
        `min_mass`, which have no target. Lead rows are never among the latter: the gold token takes their place."""
        enough = result.mapped >= self.pair.strategy.min_mass
        content = covered(alignment, result)
        return (content | _covered_leads(alignment, result)) & enough, content & ~enough

    def transferred(
        self, pivot: Prepared, source: Prepared, captured: SparseDistribution, *, k: int
    ) -> tuple[Alignment, Candidates, Transferred]:
        """The alignment, the source's candidates at the pivot's rows, and these candidates mapped by W."""
        alignment = self.pair.align(pivot, source)
        candidates = gather(alignment, captured, self.map, self.pair.remainders(alignment, pivot, source, captured))
        if self.pair.strategy.chain_rule:
            candidates = with_own_token(candidates, alignment, pivot, source, captured, self.map)
        if self.pair.strategy.look_ahead:
            ahead = self.pair.ahead(alignment, source, self.is_open)
            candidates = with_ahead(candidates, ahead, source, captured, self.map, self.pair.source.tokens)
        return alignment, candidates, self.transfer(candidates, pivot.gold, k=k)

    def unaligned(self, pivot: Prepared, *, k: int, fill: SparseDistribution | None = None) -> SparseDistribution:
        """Targets [n_pivot, k] for a conversation that the source does not have."""
        n = len(pivot)
        self.figures.add_without_source(int((~pivot.lead).sum()), int(pivot.lead.sum()))
        return self._fill(pivot, np.zeros(n, dtype=bool), nothing(n, k), fill)

    def _fill(
        self, pivot: Prepared, covered: np.ndarray, rows: SparseDistribution, fill: SparseDistribution | None
    ) -> SparseDistribution:
        """Fills rows without a source: the gold token, the pivot's own distribution, or nothing. Lead rows get the gold token,
        or nothing: a model that is not taught to write them forgets to."""
        kind, content = self.pair.strategy.unaligned, ~covered & ~pivot.lead
        gold = ~covered if kind in ("label", "condition") else ~covered & pivot.lead
        if kind == "pivot" and fill is not None:
            rows.ids[content], rows.logprobs[content] = fill.ids[content], fill.logprobs[content]
            rows.tail[content] = fill.tail[content]
        if kind != "skip" and self.pair.strategy.gold:
            rows.ids[gold], rows.logprobs[gold] = -1, -np.inf
            rows.ids[gold, 0] = pivot.gold[gold]
            rows.logprobs[gold, 0] = rows.tail[gold] = 0.0
        return rows


def covered(alignment: Alignment, result: Transferred) -> np.ndarray:
    """bool [n_pivot]: aligned rows, and rows inside a source token that received mass. Lead rows are not included."""
    return alignment.aligned | (alignment.inside & (result.mapped > 0))


def _covered_leads(alignment: Alignment, result: Transferred) -> np.ndarray:
    """bool [n_pivot]: lead rows that received mass."""
    return alignment.lead & (alignment.source_row >= 0) & (result.mapped > 0)


def with_strategy(pair: Pair, strategy: Strategy) -> Pair:
    """The same two models with another strategy."""
    return replace(pair, strategy=strategy)
