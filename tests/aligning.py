"""Tokens, conversations and distributions made by hand, for the tests of alignment."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import strategies as st

from fusechat.align.vocabulary import VocabularyMap
from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared
from fusechat.models.token_bytes import TokenBytes

Spans = list[tuple[int, int]]
Response = tuple[Spans, bool]  # spans of its content tokens, and whether an end of turn follows


def toy(*pieces: bytes | str, special: Sequence[str] = ("</s>",)) -> TokenBytes:
    """A byte-level tokenizer: tokens 0, 1, … are the `pieces`, those after them `special`, of which the first ends sequences."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    spelt = [_written(piece.encode() if isinstance(piece, str) else piece) for piece in pieces]
    vocabulary = {piece: token for token, piece in enumerate([*spelt, *special])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name) for name in special])
    return TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0]))


def _written(data: bytes) -> str:
    """Bytes in the printable alphabet of byte-level BPE (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return "".join(chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in data)


def prepared(responses: Sequence[Response], gold: Sequence[int] | None = None) -> Prepared:
    """Rows with these spans, one token of a prompt before each response; `gold`: their tokens, else all are different."""
    position, response, begin, end, closing, sizes = [], [], [], [], [], []
    for number, (spans, ends_turn) in enumerate(responses):
        sizes.append(spans[-1][1])
        rows = [*spans, *([(sizes[-1], sizes[-1])] if ends_turn else [])]
        position += range(len(position) + number + 1, len(position) + number + 1 + len(rows))
        response += [number] * len(rows)
        begin += [first for first, _ in rows]
        end += [last for _, last in rows]
        closing += [False] * len(spans) + [True] * ends_turn
    input_ids = np.zeros(position[-1] + 1, dtype=np.int32)
    input_ids[position] = range(len(position)) if gold is None else gold
    columns = {"position": position, "response": response, "begin": begin, "end": end, "content_bytes": sizes}
    arrays = {name: np.array(values, dtype=np.int32) for name, values in columns.items()}
    return Prepared(id="x", input_ids=input_ids, end_of_turn=np.array(closing, dtype=bool), **arrays)


def conversation(
    tokens: TokenBytes, *responses: Sequence[int], ends: int | None = None, taken: Sequence[int] = ()
) -> Prepared:
    """Responses of these tokens, each followed by the token `ends`; `taken`: bytes of the template that each first token has."""
    spans: list[Response] = []
    gold: list[int] = []
    for number, response in enumerate(responses):
        before = taken[number] if number < len(taken) else 0
        edges = np.cumsum([-before, *(len(tokens[token]) for token in response)]).tolist()
        spans.append((list(itertools.pairwise(edges)), ends is not None))
        gold += [*response, *([] if ends is None else [ends])]
    return prepared(spans, gold)


def sparse(
    rows: Sequence[dict[int, float]], k: int | None = None, nll: Sequence[float] | None = None
) -> SparseDistribution:
    """Rows of token → probability, most likely first, padded to k."""
    k = max(map(len, rows)) if k is None else k
    ids, logprobs = np.full((len(rows), k), -1, dtype=np.int32), np.full((len(rows), k), -np.inf, dtype=np.float64)
    for index, row in enumerate(rows):
        for rank, (token, probability) in enumerate(sorted(row.items(), key=lambda item: -item[1])):
            ids[index, rank], logprobs[index, rank] = token, np.log(probability)
    return SparseDistribution(ids, logprobs, np.array([0.0] * len(rows) if nll is None else nll, dtype=np.float32))


def gold_nll_of(rows: Sequence[dict[int, float]], source: Prepared) -> list[float]:
    """`-log p` of each row's own token."""
    return [-float(np.log(row[token])) for row, token in zip(rows, source.gold.tolist(), strict=True)]


def dense(rows: SparseDistribution, size: int) -> np.ndarray:
    """Probabilities of all tokens, float64 [n, size]."""
    result = np.zeros((len(rows.ids), size))
    for index in range(len(rows.ids)):
        for token, logprob in zip(rows.ids[index].tolist(), rows.logprobs[index].tolist(), strict=True):
            if token >= 0:
                result[index, token] += np.exp(logprob)
    return result


def map_of(matrix: np.ndarray, rests: Sequence[bytes] = ()) -> VocabularyMap:
    """The sparse form of a dense W, the last rows of which are those of `rests`."""
    entries = [np.flatnonzero(row) for row in matrix]
    return VocabularyMap(
        source=np.arange(len(matrix) - len(rests)),
        remaining_bytes=list(rests),
        offset=np.concatenate([[0], np.cumsum([len(row) for row in entries])]).astype(np.int64),
        pivot=np.concatenate(entries).astype(np.int64),
        weight=np.concatenate([matrix[index, row] for index, row in enumerate(entries)]),
        origin=np.zeros(len(matrix), dtype=np.int8),
    )


def rows_of(vocabulary_map: VocabularyMap) -> dict[int | bytes, dict[int, float]]:
    """Every row of W, by its source token or its bytes."""
    rows = {}
    for index, name in enumerate([*vocabulary_map.source.tolist(), *vocabulary_map.remaining_bytes]):
        entries = slice(int(vocabulary_map.offset[index]), int(vocabulary_map.offset[index + 1]))
        pivot, weight = vocabulary_map.pivot[entries].tolist(), vocabulary_map.weight[entries].tolist()
        rows[name] = dict(zip(pivot, weight, strict=True))
    return rows


def edit_distance(one: str, other: str) -> int:
    """How many characters must be put in, taken out or replaced (Wagner and Fischer)."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, start=1):
        above, row[0] = row[0], i
        for j, right in enumerate(other, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
    return row[-1]


def array(spans: Spans) -> np.ndarray:
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


@st.composite
def tilings(draw: Callable, size: int, zero_width: bool = True) -> Spans:
    """Spans that tile `size` bytes, some of them empty."""
    cuts = draw(st.sets(st.integers(1, size - 1))) if size > 1 else set()
    edges = [0, *sorted(cuts), size] if size else [0]
    spans = []
    for begin, end in itertools.pairwise(edges):
        spans += [(begin, begin)] * (draw(st.integers(0, 2)) if zero_width else 0)
        spans.append((begin, end))
    return spans + [(size, size)] * (draw(st.integers(0, 1)) if zero_width else 0)


@st.composite
def conversations(draw: Callable, lost: bool = True) -> tuple[list[Response], list[Response]]:
    """One conversation as two models see it: either may clip its first token, end no turns, and (`lost`) lose later responses."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    sides = []
    for _ in range(2):
        kept = draw(st.integers(1, len(sizes))) if lost else len(sizes)
        ends_turn = draw(st.booleans())
        responses: list[Response] = []
        for size in sizes[:kept]:
            spans = draw(tilings(size))
            if draw(st.booleans()):
                spans = [(begin, end) for begin, end in spans if end > begin]
                spans[0] = (-draw(st.integers(1, 2)), spans[0][1])
            responses.append((spans, ends_turn))
        sides.append(responses)
    return sides[0], sides[1]
