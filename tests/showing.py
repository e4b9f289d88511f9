"""What the tests of `fusechat tokens` share: texts, the command in this process, drawings and pages read back."""

import sys
import unicodedata
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from rich.cells import cell_len

import paper
import tiny
from fusechat.commands import cli
from fusechat.models.spans import encode_with_spans
from fusechat.models.token_bytes import token_bytes
from fusechat.show.glyphs import glyphs_of
from fusechat.show.passages import AlignedText, Token, tokens_of

PAIRS = [("llama", "mistral"), ("gemma", "llama"), ("qwen1_5", "openchat_3_5"), ("internlm2", "nh2_solar")]
GUTTER = 8
# Of everything that does not stand still on a terminal: joiners, marks, flags, tones, controls, both directions, wide and wider.
AWKWARD = "aß 京𝔘\t\n\r\x00\x1b\x85\u00a0\u0301\u0e33\u093f\u200b\u200d\ufe0f👩👍🏽🇩🇪שע\u202eم한\u1100\u1161﷽▁·<|>é"
texts = st.text(st.one_of(st.sampled_from(AWKWARD), st.characters(exclude_categories=["Cs"])), max_size=40)


def passage_of(pivot: Any, source: Any, text: str) -> AlignedText:
    rows = []
    for tokenizer in (pivot, source):
        encoded = encode_with_spans(tokenizer, text)
        rows.append(tokens_of(token_bytes(tokenizer), text.encode(), ids=encoded.ids, spans=encoded.spans))
    return AlignedText(text, rows[0], rows[1])


def hand_made(*pieces: str | bytes, special: bool = False) -> tuple[Token, ...]:
    """Tokens that stand for these bytes, one after the other."""
    tokens, at = [], 0
    for number, piece in enumerate(pieces):
        data = piece.encode() if isinstance(piece, str) else piece
        glyphs = tuple(glyphs_of(data, at))
        tokens.append(Token(number, "", data, at, at + len(data), special, glyphs))
        at += len(data)
    return tuple(tokens)


def width_of(text: str) -> int:
    """Columns of a terminal: as Rich counts, and one for each spacing mark, which terminals do give a column."""
    return cell_len(text) + sum(unicodedata.category(c) == "Mc" and cell_len(c) == 0 for c in text)


def between(row: str, columns: list[int]) -> list[str]:
    """A drawn row cut at columns, which must not lie inside of a character; without the blanks that only fill up."""
    at, pieces = 0, [""]
    waiting = list(columns)
    for character in row:
        wide = width_of(character) > 0
        if waiting and wide and at >= waiting[0]:
            assert at == waiting.pop(0), "a mark stands under the middle of a character"
            pieces.append("")
        pieces[-1] += character
        at += width_of(character)
    return [piece.replace(" ", "") for piece in pieces + [""] * len(waiting)]


def read_back(drawn: list[str]) -> tuple[list[str], list[str], int]:
    """The tokens of both rows as they can be read off a drawing by its marks alone, and how many starts are shared."""
    rows: tuple[list[str], list[str]] = ([], [])
    shared = 0
    for upper, marks, lower in zip(drawn[0::4], drawn[1::4], drawn[2::4], strict=True):
        shared += marks[GUTTER:].count("┃")
        for found, line, own in ((rows[0], upper, "┃╵"), (rows[1], lower, "┃╷")):
            columns = [at for at, mark in enumerate(marks[GUTTER:]) if mark in own]
            goes_on, *begun = between(line[GUTTER:], columns)
            if goes_on:
                found[-1] += goes_on
            found += begun
    return rows[0], rows[1], shared


TEXT = "Die Straße 🙂 <|im_end|>\n\tif x < 3: 北京 é"


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """The command line in this process: exit status, stdout, stderr."""
    before, sys.argv = sys.argv, ["fusechat", "tokens", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


class Page(HTMLParser):
    """Reads a page strictly: every element that is opened is closed, in order. Keeps tips, tags and attributes."""

    VOID = ("meta", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.tips: list[str] = []
        self.rows: list[list[str]] = []
        self.classes: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        kind = dict(attrs).get("class") or ""
        self.classes.append(kind)
        if tag not in self.VOID:
            self.open.append((tag, kind))
        if kind == "tip":
            self.tips.append("")
        if kind.split()[:1] == ["row"]:
            self.rows.append([str(len(self.tips) - 1), kind, ""])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if any(kind == "tip" for _, kind in self.open):
            self.tips[-1] += data
        if any(kind.split()[:1] == ["row"] for _, kind in self.open):
            self.rows[-1][2] += data + "|"


@lru_cache
def load_once(kind: str) -> Any:
    return tiny.tokenizer_of(kind) if kind in tiny.KINDS else paper.vocabulary(kind)
