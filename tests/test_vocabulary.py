"""The vocabulary map W: stochastic rows, strategies, special tokens by role, rows for bytes, and what is written to disk."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from aligning import rows_of
from cases import each
from fusechat.align.back_off import ORIGINS, SAME_TOKEN, SEEN, SPECIAL, TAIL, BackOff
from fusechat.align.counts import Seen, count_pairs
from fusechat.align.vocabulary import SpecialTokens, VocabularyMap, build_map, same_tokens, special_token_map
from fusechat.models.token_bytes import TokenBytes

Batches = list[list[tuple[int, int]]]
PAIRS = st.lists(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), max_size=12), max_size=5)


@pytest.fixture(scope="module")
def table(tokenizers: dict[str, Any]) -> dict[str, TokenBytes]:
    return {kind: TokenBytes(tokenizers[kind]) for kind in tiny.KINDS}


def seen(
    batches: Batches = (),  # type: ignore[assignment]
    *,
    tokens: Any = (),
    parts: dict[tuple[bytes, int], int] | None = None,
    rests: Any = (),
) -> Seen:
    pairs = count_pairs(
        (np.array([s for s, _ in batch], dtype=np.int32), np.array([t for _, t in batch], dtype=np.int32))
        for batch in batches
    )
    return Seen(pairs, Counter(parts or {}), np.array(sorted(tokens), dtype=np.int64), set(rests))


def origins(vocabulary_map: VocabularyMap) -> list[str]:
    return [ORIGINS[index] for index in vocabulary_map.origin.tolist()]


def letters(table: TokenBytes, text: str) -> list[int]:
    """Ids of tokens that a text names, one a character."""
    return [table.tokenizer.convert_tokens_to_ids(character) for character in text]


@given(batches=PAIRS, needed=st.sets(st.integers(0, 9)))
def test_rows_are_the_counts_over_their_sum(table: dict[str, TokenBytes], batches: Batches, needed: set[int]) -> None:
    """Ids are letters of both vocabularies, so that what is not seen corresponds by its bytes."""
    source, pivot = table["llama"], table["gemma"]
    ours, theirs = letters(source, "abcdefghij"), letters(pivot, "abcdefghij")
    named = [[(ours[s], theirs[t]) for s, t in batch] for batch in batches]
    everything = seen(named, tokens={ours[index] for index in needed})
    found = build_map(everything, source=source, back_off=BackOff(pivot), roles={})
    total = Counter(pair for batch in named for pair in batch)
    expected = {}
    for token in {s for s, _ in total} | {ours[index] for index in needed}:
        row = {t: count for (s, t), count in total.items() if s == token}
        expected[token] = {t: count / sum(row.values()) for t, count in row.items()} or {theirs[ours.index(token)]: 1.0}
    assert rows_of(found).keys() == expected.keys()
    assert all(row == pytest.approx(expected[token]) for token, row in rows_of(found).items())
    assert [sum(row.values()) for row in rows_of(found).values()] == pytest.approx([1.0] * len(expected))
    assert found.source.tolist() == sorted(expected)


def test_top_1_keeps_the_most_frequent_and_of_equals_the_lowest(table: dict[str, TokenBytes]) -> None:
    a, b = letters(table["llama"], "ab")
    t = sorted(letters(table["gemma"], "xyz"))
    batches = [[(a, t[2]), (a, t[0]), (a, t[2]), (b, t[1]), (b, t[0])]]
    common = {"source": table["llama"], "back_off": BackOff(table["gemma"]), "roles": {}}
    assert rows_of(build_map(seen(batches), top_1=True, **common)) == {a: {t[2]: 1.0}, b: {t[0]: 1.0}}
    assert rows_of(build_map(seen(batches), **common))[a] == pytest.approx({t[2]: 2 / 3, t[0]: 1 / 3})


def test_special_tokens_correspond_by_role_whatever_was_counted(table: dict[str, TokenBytes]) -> None:
    llama, mistral = table["llama"], table["mistral"]
    end, pad = (llama.tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>"))
    (wrong,) = letters(mistral, "x")
    eos = mistral.tokenizer.eos_token_id
    everything = seen([[(end, wrong), (pad, wrong)]], tokens=[end, pad])
    for vocabulary in ("statistics", "exact", "edit"):
        found = build_map(everything, source=llama, back_off=BackOff(mistral), roles={end: eos}, vocabulary=vocabulary)
        assert rows_of(found) == {end: {eos: 1.0}, pad: {}}  # a special token without a role goes to the tail
        assert found.rows_by_origin() == {"special": 1, "tail": 1}


@each("vocabulary", ["exact", "edit", "statistics"])
def test_of_one_tokenizer_every_token_is_itself_whatever_was_counted(
    table: dict[str, TokenBytes], tokenizers: dict[str, Any], vocabulary: str
) -> None:
    """Tokens of the same bytes, of which the lower id would be taken for both, and unknown ones too; but for a role of another."""
    llama, (a, b, c) = table["llama"], letters(table["llama"], "abc")
    double, unknown = len(llama), next(iter(llama.special))
    twin = copy.copy(TokenBytes(tokenizers["llama"]))
    llama, twin = (copy.copy(one) for one in (llama, twin))
    for one in (llama, twin):
        one.__dict__["pieces"] = [*one.pieces, b"a"]
    assert same_tokens(llama, twin)
    special = sorted(llama.special)
    everything = seen([[(a, b), (b, b), (c, a)]], tokens=[double, *special])
    how = {"roles": {unknown: b}, "vocabulary": vocabulary, "same_tokens": True}
    found = build_map(everything, source=twin, back_off=BackOff(llama), **how)
    tokens = sorted({a, b, c, double, *special})
    assert rows_of(found) == {token: {b if token == unknown else token: 1.0} for token in tokens}
    assert set(origins(found)) == {SAME_TOKEN, SPECIAL}
    few = build_map(everything, source=twin, back_off=BackOff(llama, double), roles={}, same_tokens=True)
    assert rows_of(few)[double] == {a: 1.0}, "one that the pivot has no embedding for is looked up"


def test_other_vocabularies_are_not_the_same(table: dict[str, TokenBytes], tokenizers: dict[str, Any]) -> None:
    assert not same_tokens(table["llama"], table["gemma"])
    for change in ({"special": frozenset()}, {"pieces": [*table["llama"].pieces[:-1], b"?"]}, {"added": {}}):
        other = TokenBytes(tokenizers["llama"])
        other.__dict__.update(change)
        assert same_tokens(table["llama"], other) == (not change), change


def test_roles_pair_what_tokens_do_and_end_of_turn_goes_last() -> None:
    both = special_token_map(SpecialTokens(11, 12, 13), SpecialTokens(21, 22, 23))
    assert both == {21: 11, 22: 12, 23: 13}
    assert special_token_map(SpecialTokens(11, 12, 13), SpecialTokens(22, 22, 23)) == {22: 11, 23: 13}
    assert special_token_map(SpecialTokens(11, 12, None), SpecialTokens(21, 22, 23)) == {21: 11, 22: 12, 23: TAIL}
    assert special_token_map(SpecialTokens(11, 12, 13), SpecialTokens(None, 22, None)) == {22: 12}


def test_an_unknown_token_is_an_error_not_another_tokens_row(table: dict[str, TokenBytes]) -> None:
    a, b, c = sorted(letters(table["llama"], "abc"))
    found = build_map(seen(tokens=[a, c]), source=table["llama"], back_off=BackOff(table["gemma"]), roles={})
    assert found.rows_of(np.array([c, a, c])).tolist() == [1, 0, 1]
    for unknown in (b, c + 1, c + 1000):
        with pytest.raises(KeyError):
            found.rows_of(np.array([unknown]))


def test_a_map_of_nothing_knows_no_token(table: dict[str, TokenBytes]) -> None:
    found = build_map(seen(), source=table["llama"], back_off=BackOff(table["gemma"]), roles={})
    assert rows_of(found) == {}
    assert found.entropy() == 0.0
    with pytest.raises(KeyError):
        found.rows_of(np.array([0]))


@each("vocabulary", ["statistics", "exact", "edit"])
def test_an_id_in_the_models_padding_goes_to_the_tail(table: dict[str, TokenBytes], vocabulary: str) -> None:
    padding = len(table["mistral"]) + 3
    common = {"source": table["mistral"], "back_off": BackOff(table["llama"]), "roles": {}}
    found = build_map(seen(tokens=[padding]), vocabulary=vocabulary, **common)
    assert rows_of(found) == {padding: {}}
    assert origins(found) == ["tail"]


def test_entropy_is_the_mean_over_counted_rows(table: dict[str, TokenBytes]) -> None:
    a, b, c, d = letters(table["llama"], "abcd")
    x, y, z = letters(table["gemma"], "xyz")
    common = {"source": table["llama"], "back_off": BackOff(table["gemma"]), "roles": {}}
    # One bit for a, none for b, one and a half for d; c was never seen.
    batches = [[(a, x), (a, y), (b, x), (d, x), (d, x), (d, y), (d, z)]]
    assert build_map(seen(batches, tokens=[c]), **common).entropy() == pytest.approx((1.0 + 0.0 + 1.5) / 3)
    assert build_map(seen(batches, tokens=[c]), top_1=True, **common).entropy() == 0.0
    assert build_map(seen(tokens=[c]), **common).entropy() == 0.0


# -- exact and edit -----------------------------------------------------------------------------------------------------


@each("pivot, source", [("gemma", "llama"), ("mistral", "gemma"), ("llama", "mistral")])
def test_exact_maps_to_a_token_of_the_same_bytes_and_all_else_to_the_tail(
    table: dict[str, TokenBytes], pivot: str, source: str
) -> None:
    ours, theirs = table[pivot], table[source]
    tokens = range(len(theirs))
    wrong = [[(token, 300) for token in tokens]]  # what was counted is not asked
    found = build_map(seen(wrong, tokens=tokens), source=theirs, back_off=BackOff(ours), roles={}, vocabulary="exact")
    spelt: dict[bytes, set[int]] = {}
    for token in range(len(ours)):
        if token not in ours.special:
            spelt.setdefault(ours[token], set()).add(token)
    mapped = 0
    for token, row in rows_of(found).items():
        same = spelt.get(theirs[token], set()) if token not in theirs.special else set()
        assert set(row.values()) <= {1.0}
        assert len(row) == min(1, len(same))
        assert row.keys() <= same
        mapped += len(row)
    assert 0 < mapped < len(theirs)


def test_edit_asks_no_counts(table: dict[str, TokenBytes]) -> None:
    (a, b), (x, y) = letters(table["llama"], "ab"), letters(table["gemma"], "ab")
    common = {"source": table["llama"], "back_off": BackOff(table["gemma"]), "roles": {}}
    found = build_map(seen([[(a, y), (a, y), (b, x)]], tokens=[a, b]), vocabulary="edit", **common)
    assert rows_of(found) == {a: {x: 1.0}, b: {y: 1.0}}


# -- rows for bytes -----------------------------------------------------------------------------------------------------


def test_bytes_have_rows_of_their_counts_or_of_their_back_off(table: dict[str, TokenBytes]) -> None:
    pivot = table["gemma"]
    a, x, y = letters(pivot, "axy")
    parts = {(b"a", x): 3, (b"a", y): 1, (b"qq", y): 2}
    common = {"source": table["llama"], "back_off": BackOff(pivot), "roles": {}}
    found = build_map(seen(parts=parts, rests=[b"a", b"x", b"\xff\xff"]), **common)
    byte = pivot.tokenizer.convert_tokens_to_ids("<0xFF>")
    assert rows_of(found) == {b"a": {x: 0.75, y: 0.25}, b"qq": {y: 1.0}, b"x": {x: 1.0}, b"\xff\xff": {byte: 1.0}}
    assert origins(found) == ["seen", "seen", "same bytes", "longest prefix"]
    assert found.remaining_bytes == sorted(found.remaining_bytes)
    assert rows_of(build_map(seen(parts=parts), top_1=True, **common))[b"a"] == {x: 1.0}
    for vocabulary in ("exact", "edit"):  # which count nothing
        uncounted = build_map(seen(parts=parts, rests=[b"a"]), vocabulary=vocabulary, **common)
        assert rows_of(uncounted) == {b"a": {a: 1.0}}


def test_rows_for_bytes_come_after_those_for_tokens(table: dict[str, TokenBytes]) -> None:
    a, b = sorted(letters(table["llama"], "ab"))
    x = letters(table["gemma"], "x")[0]
    everything = seen([[(b, x)]], tokens=[a], parts={(b"zz", x): 1}, rests=[b"a"])
    found = build_map(everything, source=table["llama"], back_off=BackOff(table["gemma"]), roles={})
    assert found.row_of_remainder == {b"a": 2, b"zz": 3}
    assert found.rows_of(np.array([a, b])).tolist() == [0, 1]
    assert len(found.offset) == 5
    assert origins(found) == ["same bytes", SEEN, "same bytes", SEEN]


@given(
    batches=PAIRS,
    parts=st.dictionaries(
        st.tuples(st.binary(min_size=1, max_size=3), st.integers(0, 300)), st.integers(1, 9), max_size=5
    ),
    rests=st.sets(st.binary(min_size=1, max_size=3), max_size=4),
    tokens=st.sets(st.integers(0, 410), max_size=9),
    strategy=st.sampled_from([("statistics", False), ("statistics", True), ("exact", False), ("edit", False)]),
)
def test_every_row_sums_to_one_or_is_empty(
    table: dict[str, TokenBytes], batches: Batches, parts: Any, rests: set[bytes], tokens: set[int], strategy: Any
) -> None:
    vocabulary, top_1 = strategy
    everything = seen(batches, tokens=tokens, parts=parts, rests=rests)
    common = {"source": table["llama"], "back_off": BackOff(table["gemma"]), "roles": {2: 1}}
    found = build_map(everything, vocabulary=vocabulary, top_1=top_1, **common)
    counted = vocabulary == "statistics"
    assert set(rows_of(found)) == {s for batch in batches for s, _ in batch if counted} | tokens | rests | (
        {rest for rest, _ in parts} if counted else set()
    )
    for row, origin in zip(rows_of(found).values(), origins(found), strict=True):
        assert sum(row.values()) == (0 if origin == "tail" else pytest.approx(1.0))
        assert all(weight > 0 for weight in row.values())
        assert len(row) <= 1 or (origin == SEEN and not top_1)


def test_what_is_saved_is_the_map(table: dict[str, TokenBytes], tmp_path: Path) -> None:
    a, b = letters(table["llama"], "ab")
    x, y = letters(table["gemma"], "xy")
    everything = seen(
        [[(a, x), (a, y), (a, y)]], tokens=[b, 1000], parts={(b"q", x): 1, (b"q", y): 3}, rests=[b"\xff", b"x"]
    )
    found = build_map(everything, source=table["llama"], back_off=BackOff(table["gemma"]), roles={})
    found.save(tmp_path / "map.arrow")
    stored = pa.ipc.open_file(pa.OSFile(str(tmp_path / "map.arrow"))).read_all()
    assert [str(field.type) for field in stored.schema] == ["int32", "binary", "int32", "float", "string"]
    rows: dict[Any, dict[int, float]] = {}
    names: dict[Any, str] = {}
    for entry in stored.to_pylist():
        assert (entry["source"] is None) != (entry["rest"] is None)
        name = entry["rest"] if entry["source"] is None else entry["source"]
        rows.setdefault(name, {})[entry["pivot"]] = entry["weight"]
        names[name] = entry["origin"]
    assert rows.pop(a) == pytest.approx({x: 1 / 3, y: 2 / 3})
    expected = rows_of(found)
    assert rows == {name: row for name, row in expected.items() if row and name != a}
    assert names == {name: how for name, how in zip(expected, origins(found), strict=True) if how != "tail"}


def test_a_map_without_rows_for_bytes_is_saved(table: dict[str, TokenBytes], tmp_path: Path) -> None:
    (a,), (x,) = letters(table["llama"], "a"), letters(table["gemma"], "x")
    found = build_map(seen([[(a, x)]]), source=table["llama"], back_off=BackOff(table["gemma"]), roles={})
    found.save(tmp_path / "map.arrow")
    read = pa.ipc.open_file(pa.OSFile(str(tmp_path / "map.arrow"))).read_all()
    assert read.to_pylist() == [{"source": a, "rest": None, "pivot": x, "weight": 1.0, "origin": "seen"}]
