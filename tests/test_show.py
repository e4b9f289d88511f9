"""Two tokenizations one above the other: what is drawn, on what, and what is said where nothing can be drawn."""

import unicodedata
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

import tiny
from cases import FEW, each
from fusechat.align import align_starts, token_spans
from fusechat.show.columns import lines, segments
from fusechat.show.glyphs import Glyph, glyphs_of, visible
from fusechat.show.passages import AlignedText, Token
from fusechat.show.terminal import drawing
from showing import GUTTER, PAIRS, hand_made, passage_of, read_back, texts

# -- the layout's law -----------------------------------------------------------------------------------------------------


@each("pivot, source", PAIRS)
def test_every_boundary_stands_in_one_column_of_both_rows(
    pivot: str, source: str, tokenizer: Callable[[str], Any]
) -> None:
    """What can be read off the drawing by its marks is every token once, in order, and every shared start."""
    both = tokenizer(pivot), tokenizer(source)

    @FEW
    @given(texts, st.integers(12, 90))
    def law(text: str, width: int) -> None:
        passage = passage_of(*both, text)
        drawn = [line.plain for line in drawing(passage, width=width)]
        upper, lower, shared = read_back(drawn)
        assert upper == ["".join(glyph.text for glyph in token.glyphs) for token in passage.pivot]
        assert lower == ["".join(glyph.text for glyph in token.glyphs) for token in passage.source]
        aligned = align_starts(token_spans(both[0], text), token_spans(both[1], text))
        assert shared == (aligned >= 0).sum()
        room = width - GUTTER
        for line in lines(passage.columns(limit=room), width=room, breaks=passage.breaks):
            assert sum(column.width for column in line) <= room or len(line) == 1
            for column in line:  # cut up as far as it goes
                glyphs = {glyph.begin for row in column.glyphs for glyph in row}
                assert column.width <= room or len(glyphs) == 1

    law()


@each("pivot, source", PAIRS)
def test_text_is_drawn_as_it_is(pivot: str, source: str, tokenizer: Callable[[str], Any]) -> None:
    for text in tiny.LINES:
        passage = passage_of(tokenizer(pivot), tokenizer(source), text)
        wide = [token for token in passage.source if token.end > token.begin]
        assert b"".join(text.encode()[token.begin : token.end] for token in wide) == text.encode()
        assert [(token.begin, token.end) for token in passage.pivot] == list(
            map(tuple, token_spans(tokenizer(pivot), text).tolist())
        )
        covered = [(part.begin, part.end) for part in passage.segments if part.end > part.begin]
        assert covered[0][0] == 0
        assert covered[-1][1] == len(text.encode())
        assert all(before[1] == after[0] for before, after in pairwise(covered))


def test_an_expected_drawing() -> None:
    passage = AlignedText(
        "日ab é\nz",
        hand_made("日", "ab", " ", "é\n", "z"),
        hand_made(b"\xe6", b"\x97", b"\xa5", "a", "b ", "é", "\n", "z"),
    )
    assert [line.plain.rstrip() for line in drawing(passage, width=80)] == [
        "pivot   日          ab·é⏎",
        "     0  ┃   ╷   ╷   ┃╷╵┃╷",
        "source  <E6><97><A5>ab·é⏎",
        "",
        "pivot   z",
        "     9  ┃",
        "source  z",
        "",
    ]


def test_lines_end_at_shared_starts_where_that_wastes_little() -> None:
    passage = AlignedText("abcdefghij", hand_made("abc", "defg", "hij"), hand_made("abc", "de", "fg", "hi", "j"))
    drawn = [line.plain for line in drawing(passage, width=GUTTER + 9)]
    assert [line[GUTTER:] for line in drawn if line.startswith("pivot")] == ["abcdefg", "hij"]
    tight = [line.plain for line in drawing(passage, width=GUTTER + 6)]
    assert [line[GUTTER:] for line in tight if line.startswith("pivot")] == ["abcde", "fghij"]


def test_a_token_without_width_has_a_column_of_its_own() -> None:
    dummy = Token(9, "▁", b" ", 0, 0, False, (Glyph("·", 0, True),))
    passage = AlignedText("ab", (dummy, *hand_made("ab")), hand_made("a", "b"))
    drawn = [line.plain for line in drawing(passage, width=40)]
    assert [line[GUTTER:] for line in drawn[:3]] == ["·ab", "╵┃╷", " ab"]
    assert passage.partner == [-1, 0]
    assert [segment.tokens for segment in segments([(0, 2)], [(0, 1), (1, 1), (1, 2)])] == [(0, 0), (0, 1), (0, 2)]


@each("data, shown", [
    (b" a\tb\r\n\x00\x7f", "·a→b␍⏎␀␡"),
    ("\u200d\u200b\ufe0f\u202e\u2069\ufeff\u00a0\u0085".encode(), "<ZWJ><ZWSP><VS16><RLO><PDI><BOM><NBSP><U+0085>"),
    ("👍🏽🇩🏿".encode(), "👍<TONE-4><RI-D><TONE-6>"),
    ("e\u0301".encode(), "e\u0301"),
    ("\u0301".encode(), "◌\u0301"),
    (" \u0301".encode(), "·◌\u0301"),
    ("京".encode()[:2] + "ä".encode(), "<E4><BA>ä"),
    (b"\xff\xed\xa0\x80", "<FF><ED><A0><80>"),
    (b"", "∅"),
])  # fmt: skip
def test_nothing_is_invisible(data: bytes, shown: str) -> None:
    assert visible(data) == shown
    assert all(glyph.width >= 1 for glyph in glyphs_of(data))


def test_every_character_has_a_glyph_that_keeps_its_place() -> None:
    """No escape code, no character that a terminal takes for a command, and none of no width."""
    for code in (*range(0x3000), *range(0xFE00, 0x10000), *range(0x1F000, 0x1FB00), 0xE0001, 0x10FFFF):
        (glyph,) = glyphs_of(chr(code).encode(errors="surrogateescape") if not 0xD800 <= code < 0xE000 else b"?")
        assert glyph.width >= 1
        assert all(unicodedata.category(character) not in ("Cc", "Cf", "Zl", "Zp", "Zs") for character in glyph.text)


def test_special_tokens_are_bracketed(tokenizer: Callable[[str], Any]) -> None:
    passage = passage_of(tokenizer("llama"), tokenizer("mistral"), "a<|im_end|></s>")
    pivot, source = ([visible_of(token) for token in row if token.special] for row in (passage.pivot, passage.source))
    assert pivot == ["⟦<|im_end|>⟧"]
    assert source == ["⟦</s>⟧"]


def visible_of(token: Token) -> str:
    return "".join(glyph.text for glyph in token.glyphs)
