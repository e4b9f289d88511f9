"""Two tokenizations one above the other: what is drawn, on what, and what is said where nothing can be drawn."""

import json
import re
import sys
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser
from io import BytesIO, TextIOWrapper
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

import runs
import tiny
from fusechat import cli
from fusechat.align import align_starts, token_spans
from fusechat.core.distributions import open_distributions
from fusechat.core.prepared import PreparedSet
from fusechat.core.spans import encode_with_spans
from fusechat.core.token_bytes import token_bytes
from fusechat.show.columns import lines, segments
from fusechat.show.glyphs import Glyph, glyphs_of, visible
from fusechat.show.page import render_page
from fusechat.show.passages import Model, Passage, Shown, Token, tokens_of
from fusechat.show.terminal import drawing
from fusechat.show.tokens import load

VOCABULARIES = Path(__file__).parents[2] / "shared" / "tokenizers"
PAIRS = [("llama", "mistral"), ("gemma", "llama"), ("qwen1_5", "openchat_3_5"), ("internlm2", "nh2_solar")]
GUTTER = 8
# Of everything that does not stand still on a terminal: joiners, marks, flags, tones, controls, both directions, wide and wider.
AWKWARD = "aß 京𝔘\t\n\r\x00\x1b\x85\u00a0\u0301\u0e33\u093f\u200b\u200d\ufe0f👩👍🏽🇩🇪שע\u202eم한\u1100\u1161﷽▁·<|>é"
texts = st.text(st.one_of(st.sampled_from(AWKWARD), st.characters(exclude_categories=["Cs"])), max_size=40)


@pytest.fixture(scope="module")
def tokenizer(tokenizers: dict[str, Any]) -> Callable[[str], Any]:
    """A tiny tokenizer, or a real vocabulary, by name."""
    loaded = dict(tokenizers)

    def find(name: str) -> Any:
        if name not in loaded:
            if not (VOCABULARIES / name).is_dir():
                pytest.skip(f"the vocabulary {name} is not here")
            loaded[name] = load(str(VOCABULARIES / name))
        return loaded[name]

    return find


def passage_of(pivot: Any, source: Any, text: str) -> Passage:
    rows = []
    for tokenizer in (pivot, source):
        encoded = encode_with_spans(tokenizer, text)
        rows.append(tokens_of(token_bytes(tokenizer), text.encode(), ids=encoded.ids, spans=encoded.spans))
    return Passage(text, rows[0], rows[1])


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


# -- the layout's law -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pivot", "source"), PAIRS)
def test_every_boundary_stands_in_one_column_of_both_rows(
    pivot: str, source: str, tokenizer: Callable[[str], Any]
) -> None:
    """What can be read off the drawing by its marks is every token once, in order, and every shared start."""
    both = tokenizer(pivot), tokenizer(source)

    @settings(max_examples=60)
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


@pytest.mark.parametrize(("pivot", "source"), PAIRS)
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
    passage = Passage(
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
    passage = Passage("abcdefghij", hand_made("abc", "defg", "hij"), hand_made("abc", "de", "fg", "hi", "j"))
    drawn = [line.plain for line in drawing(passage, width=GUTTER + 9)]
    assert [line[GUTTER:] for line in drawn if line.startswith("pivot")] == ["abcdefg", "hij"]
    tight = [line.plain for line in drawing(passage, width=GUTTER + 6)]
    assert [line[GUTTER:] for line in tight if line.startswith("pivot")] == ["abcde", "fghij"]


def test_a_token_without_width_has_a_column_of_its_own() -> None:
    dummy = Token(9, "▁", b" ", 0, 0, False, (Glyph("·", 0, True),))
    passage = Passage("ab", (dummy, *hand_made("ab")), hand_made("a", "b"))
    drawn = [line.plain for line in drawing(passage, width=40)]
    assert [line[GUTTER:] for line in drawn[:3]] == ["·ab", "╵┃╷", " ab"]
    assert passage.partner == [-1, 0]
    assert [segment.tokens for segment in segments([(0, 2)], [(0, 1), (1, 1), (1, 2)])] == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b" a\tb\r\n\x00\x7f", "·a→b␍⏎␀␡"),
        ("\u200d\u200b\ufe0f\u202e\u2069\ufeff\u00a0\u0085".encode(), "<ZWJ><ZWSP><VS16><RLO><PDI><BOM><NBSP><U+0085>"),
        ("👍🏽🇩🏿".encode(), "👍<TONE-4><RI-D><TONE-6>"),
        ("e\u0301".encode(), "e\u0301"),
        ("\u0301".encode(), "◌\u0301"),
        (" \u0301".encode(), "·◌\u0301"),
        ("京".encode()[:2] + "ä".encode(), "<E4><BA>ä"),
        (b"\xff\xed\xa0\x80", "<FF><ED><A0><80>"),
        (b"", "∅"),
    ],
)
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


# -- the command ------------------------------------------------------------------------------------------------------------


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


def test_a_pipe_gets_no_colours_and_a_terminal_its_own_width(models: dict[str, Path]) -> None:
    asked = (*(models[kind] / "tokenizer.json" for kind in ("llama", "mistral")), "--text", TEXT * 4)
    piped = runs.fusechat("tokens", *asked)
    assert piped.returncode == 0, piped.stderr
    assert "\x1b" not in piped.stdout
    assert piped.stderr == ""
    for columns in (80, 50):
        coloured = runs.on_a_terminal(columns, "tokens", *asked)
        assert "\x1b[" in coloured
        plain = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
        drawn = [
            line for line in plain.splitlines() if line.startswith(("pivot   ", "source  ")) and "bytes" not in line
        ]
        assert columns - 20 < max(map(width_of, drawn)) <= columns
        if columns == 80:
            assert [line.rstrip() for line in plain.splitlines()] == piped.stdout.splitlines()


def test_the_summary_counts(models: dict[str, Path], tokenizer: Callable[[str], Any], capsys: Any) -> None:
    status, out, _ = command(capsys, models["llama"], models["mistral"], "--text", TEXT)
    assert status == 0
    pivot, source = (token_spans(tokenizer(kind), TEXT) for kind in ("llama", "mistral"))
    starts = set(source[source[:, 1] > source[:, 0], 0].tolist())
    shared = sum(begin in starts for begin, _ in pivot.tolist())
    inside = sum(any(b < begin < e for b, e in source.tolist()) for begin, _ in pivot.tolist())
    assert f"pivot   llama: {len(pivot)} tokens, {len(TEXT.encode()) / len(pivot):.2f} bytes per token" in out
    assert f"source  mistral: {len(source)} tokens" in out
    assert f"shared starts: {shared}, {shared / len(pivot):.1%} of the pivot's tokens" in out
    assert f"begin inside a source token: {inside}\n" in out
    assert "offsets" not in out
    assert shared + inside == len(pivot)


def test_standard_input_and_spans_from_offsets(
    models: dict[str, Path], capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A tokenizer that changes the text is said to; a text of no tokens is drawn as such."""
    state = json.loads((models["llama"] / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "Lowercase"}
    changing = tmp_path / "tokenizer.json"
    changing.write_text(json.dumps(state))
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO("Österreich\r\n".encode())))
    status, out, _ = command(capsys, changing, models["llama"], "--text", "-")
    assert status == 0
    assert "the pivot's tokenizer changes this text: its spans come from character offsets" in out
    assert "␍⏎" in out
    status, out, _ = command(capsys, changing, models["llama"], "--text", "")
    assert status == 0
    assert "llama: 0 tokens\n" in out


def test_json(models: dict[str, Path], tokenizer: Callable[[str], Any], capsys: Any) -> None:
    status, out, _ = command(capsys, models["llama"], models["gemma"], "--text", TEXT, "--json")
    assert status == 0
    found = json.loads(out)
    (passage,) = found["passages"]
    assert passage["text"] == TEXT
    for row, kind in (("pivot", "llama"), ("source", "gemma")):
        encoded = encode_with_spans(tokenizer(kind), TEXT)
        assert [token["id"] for token in passage[row]] == encoded.ids.tolist()
        assert [[token["begin"], token["end"]] for token in passage[row]] == encoded.spans.tolist()
        assert [token["piece"] for token in passage[row]] == tokenizer(kind).convert_ids_to_tokens(encoded.ids.tolist())
        assert found[row] == {
            "model": kind,
            "tokens": len(encoded.ids),
            "bytes_per_token": len(TEXT.encode()) / len(encoded.ids),
            "spans_from": "bytes",
        }
    assert [token["piece"] for token in passage["pivot"] if token["special"]] == ["<|im_end|>"]
    aligned = align_starts(token_spans(tokenizer("llama"), TEXT), token_spans(tokenizer("gemma"), TEXT))
    assert passage["alignment"] == [int(one) if one >= 0 else None for one in aligned]
    assert found["shared_starts"] == (aligned >= 0).sum()


def test_a_tokenizer_alone_will_do(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with a tokenizer.json, such a file, a repository of the hub; no weights are looked for."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub" / "models--org--name" / "refs").mkdir(parents=True)
    (tmp_path / "hub" / "models--org--name" / "refs" / "v2").write_text("0" * 40)
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / ("0" * 40)
    alone = tmp_path / "alone"
    for directory, names in ((snapshot, ("tokenizer.json", "tokenizer_config.json")), (alone, ("tokenizer.json",))):
        directory.mkdir(parents=True)
        for name in names:
            (directory / name).write_bytes((models["llama"] / name).read_bytes())
    expected = encode_with_spans(load(str(models["llama"])), TEXT)
    for name in (str(alone), str(alone / "tokenizer.json"), "org/name@v2"):
        assert np.array_equal(encode_with_spans(load(name), TEXT).ids, expected.ids)


# -- the page ---------------------------------------------------------------------------------------------------------------


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


def test_the_page_is_whole_safe_and_alone(models: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    text = "<script>alert(\"1\")</script> & <b> 'x' \u202eevil\u202c http://example.org"
    file = tmp_path / "new" / "page.html"
    status, out, _ = command(capsys, models["llama"], models["mistral"], "--text", text, "--html", file)
    assert status == 0
    assert f"page: {file}" in out
    assert "shared starts" in out
    html = file.read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags.isdisjoint({"script", "img", "link", "a", "b>", "iframe"})
    assert page.attributes.isdisjoint({"src", "href", "onclick"})
    assert not re.search(r"https?://", html)
    assert "\u202e" not in html
    assert "prefers-color-scheme: dark" in html
    assert sum("token" in kind.split() for kind in page.classes) == len(page.tips)
    said = json.loads(command(capsys, models["llama"], models["mistral"], "--text", text, "--json")[1])
    assert len(page.tips) == said["pivot"]["tokens"] + said["source"]["tokens"]
    assert sum("shared" in kind.split() for kind in page.classes) == said["shared_starts"]
    for row in ("pivot", "source"):
        for number, token in enumerate(said["passages"][0][row]):
            (tip,) = [tip for tip in page.tips if tip.startswith(f"{row} token {number}\n")]
            assert f"id {token['id']} " in tip
            assert f"piece {token['piece']}\n" in tip
            assert f"span {token['begin']} to {token['end']}" in tip
    assert list(tmp_path.glob("new/.*")) == [], "written at once"


@settings(max_examples=25)
@given(texts)
def test_any_text_makes_a_page(text: str) -> None:
    tokenizer = load_once("llama"), load_once("gemma")
    passage = passage_of(*tokenizer, text)
    model = Model("<model>", exact=True)
    page = Page(render_page(Shown(model, model, (passage,))))
    assert len(page.tips) == len(passage.pivot) + len(passage.source)


_LOADED: dict[str, Any] = {}


def load_once(kind: str) -> Any:
    if kind not in _LOADED:
        _LOADED[kind] = tiny.tokenizer_of(kind)
    return _LOADED[kind]


# -- a run ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose alignment is done, and nothing after it; positions without a source's distribution have none. Of the last
    two conversations mistral, which writes them in bytes, loses a response and everything."""
    directory = tmp_path_factory.mktemp("show")
    recipe = runs.write_recipe(directory, models, align={"unaligned": "skip"})
    long = {"role": "assistant", "content": "Москва является столицей России. " * 4 + "Да"}
    short = [
        {"role": "user", "content": "Где?"},
        {"role": "assistant", "content": "Да."},
        {"role": "user", "content": "И?"},
    ]
    with (directory / "train.jsonl").open("a") as lines:
        for messages in ([*short, long], [{"role": "user", "content": "Где?"}, long]):
            lines.write(json.dumps({"messages": messages}) + "\n")
    done = runs.fusechat("run", recipe, "--workdir", directory / "work", "--until", "align")
    assert done.returncode == 0, done.stderr
    return directory / "work"


def stores(work: Path, source: str, data: str) -> tuple[PreparedSet, Any, PreparedSet, Any]:
    return (
        PreparedSet(work / "prepare" / "pivot" / data),
        open_distributions(work / "align" / source),
        PreparedSet(work / "prepare" / source / data),
        open_distributions(work / "capture" / source / data),
    )


def test_a_conversation_of_a_run(work: Path, capsys: Any) -> None:
    asked = ("pivot", "mistral", "--workdir", work, "--conversation")
    status, out, _ = command(capsys, *asked, 1)
    assert status == 0
    assert "response 1 of 2" in out
    assert "response 2 of 2" in out
    assert "⟦<|im_end|>⟧" in out
    assert "⟦</s>⟧" in out
    pivot, aligned, source, captured = stores(work, "mistral", "data")
    identity = pivot.ids[1]
    for other in (identity, identity[:15]):
        assert command(capsys, *asked, other)[1] == out
    said = json.loads(command(capsys, *asked, 1, "--json")[1])
    assert said["conversation"] == identity
    for row, data, rows in (("pivot", pivot[1], aligned), ("source", source[source.row_of[identity]], captured)):
        found = [token for passage in said["passages"] for token in passage[row]]
        assert [token["id"] for token in found] == data.gold.tolist()
        assert [token.get("end_of_turn", False) for token in found] == data.end_of_turn.tolist()
        distributions = rows[identity]
        for token, ids, probabilities in zip(found, distributions.ids, distributions.probabilities, strict=True):
            kept = ids >= 0
            assert token["distribution"] == (
                {
                    "ids": ids[kept].tolist(),
                    "probabilities": probabilities[kept].tolist(),
                    "tail": max(1 - probabilities.sum(), 0),
                }
                if kept.any()
                else None
            )


def test_what_a_model_lost_is_said(work: Path, capsys: Any) -> None:
    ids = stores(work, "mistral", "data")[0].ids
    asked = ("pivot", "mistral", "--workdir", work, "--conversation")
    for number, note, sources in (
        (len(ids) - 2, "mistral (mistral) lost responses to max_length", (True, False)),
        (len(ids) - 1, "mistral (mistral) could not use this conversation", (False,)),
    ):
        assert command(capsys, *asked, number)[1].endswith(note + "\n")
        said = json.loads(command(capsys, *asked, number, "--json")[1])
        assert said["notes"] == [note]
        assert [bool(passage["source"]) for passage in said["passages"]] == list(sources)
        assert all(one is None for one in said["passages"][-1]["alignment"])
        assert all(token["distribution"] is None for token in said["passages"][-1]["pivot"])


def test_distributions_on_the_page(work: Path, tmp_path: Path, capsys: Any) -> None:
    """Every kept token is a bar with its probability, the one that stands in the text marked, and a position without says so."""
    file = tmp_path / "page.html"
    asked = ("pivot", "mistral", "--workdir", work, "--conversation", 1)
    assert command(capsys, *asked, "--html", file)[0] == 0
    page = Page(file.read_text(encoding="utf-8"))
    said = json.loads(command(capsys, *asked, "--json")[1])
    assert "And twice that?" in file.read_text(encoding="utf-8")
    unaligned = 0
    tips = iter(range(len(page.tips)))
    assert {tip.split(" token ")[0] for tip in page.tips} == {"pivot", "source"}
    by_name: dict[tuple[str, int], list[int]] = {}
    for tip in tips:
        row, number = re.match(r"(pivot|source) token (\d+)", page.tips[tip]).groups()  # type: ignore[union-attr]
        by_name.setdefault((row, int(number)), []).append(tip)
    for passage_number, passage in enumerate(said["passages"]):
        for row in ("pivot", "source"):
            for number, token in enumerate(passage[row]):
                tip = by_name[row, number][passage_number if len(by_name[row, number]) > 1 else 0]
                rows = [(kind, text) for owner, kind, text in page.rows if int(owner) == tip]
                if token["distribution"] is None:
                    unaligned += 1
                    assert rows == []
                    assert "unaligned: no distribution here" in page.tips[tip]
                    continue
                distribution = token["distribution"]
                shown = [*distribution["probabilities"], distribution["tail"]]
                assert [text.split("|")[-2] for _, text in rows] == [f"{100 * value:.2f}%" for value in shown]
                gold = [one == token["id"] for one in distribution["ids"]]
                assert ["gold" in kind for kind, _ in rows] == [*gold, False]
                assert ["★" in text for _, text in rows] == [*gold, False]
                assert ("★ this token is among all others" in page.tips[tip]) == (not any(gold))
    assert unaligned


# -- what cannot be shown ---------------------------------------------------------------------------------------------------


def refused(capsys: Any, *arguments: str | Path) -> str:
    """What is said: one line, status 2."""
    status, out, err = command(capsys, *arguments)
    assert status == 2, err
    assert out == ""
    assert err.startswith("fusechat: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("fusechat: error: ").strip()


def test_one_of_two_ways_to_ask(models: dict[str, Path], capsys: Any, tmp_path: Path) -> None:
    usage = "give either --text, or --workdir and --conversation; see fusechat tokens --help"
    both = models["llama"], models["gemma"]
    for options in (
        (),
        ("--workdir", tmp_path),
        ("--conversation", "1"),
        ("--text", "a", "--workdir", tmp_path),
        ("--text", "a", "--conversation", "1"),
        ("--text", "a", "--workdir", tmp_path, "--conversation", "1"),
    ):
        assert refused(capsys, *both, *options) == usage
    assert "SOURCE" in refused(capsys, models["llama"], "--text", "a")


def test_bad_models(models: dict[str, Path], capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text('{"no": "tokenizer"}')
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "model.gguf").write_text("nothing")
    for name, said in (
        ("nowhere", "'nowhere' is neither a directory"),
        ("no/where", "no/where: no such directory, and the hub gave no such model"),
        (tmp_path / "no.json", "no.json: no such file"),
        (tmp_path / "bad.json", "bad.json: no tokenizer.json that can be read"),
        (tmp_path / "empty", "empty: has no tokenizer"),
        (tmp_path / "notes.txt", "notes.txt' is neither a directory"),
        (tmp_path / "model.gguf", "model.gguf: its tokenizer cannot be loaded"),
        ("wheel:oops", "'wheel:oops' is not of the form"),
    ):
        assert said in refused(capsys, models["llama"], name, "--text", "a")


def test_bad_texts_and_files(
    models: dict[str, Path], capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = models["llama"], models["gemma"]
    assert "half a surrogate pair at character 1" in refused(capsys, *both, "--text", "a\udcff")
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"ab\xff")))
    assert refused(capsys, *both, "--text", "-") == "standard input is not UTF-8 (byte 2)"
    assert (
        refused(capsys, *both, "--text", "a", "--html", tmp_path) == f"--html {tmp_path}: is a directory; name a file"
    )
    under = tmp_path / "file" / "page.html"
    under.parent.write_text("")
    assert "cannot be written" in refused(capsys, *both, "--text", "a", "--html", under)


def test_bad_conversations(work: Path, capsys: Any, tmp_path: Path) -> None:
    assert "no work directory" in refused(capsys, "pivot", "gemma", "--workdir", tmp_path, "--conversation", "0")

    def of(pivot: str, source: str, conversation: str) -> str:
        return refused(capsys, pivot, source, "--workdir", work, "--conversation", conversation)

    assert of("llama", "gemma", "0").startswith("llama: with --workdir the first argument is pivot")
    assert of("pivot", "nobody", "0") == "nobody: the run has no such source; it has mistral, gemma"
    ids = stores(work, "mistral", "data")[0].ids
    assert of("pivot", "mistral", "xyz") == (
        f"xyz: no such conversation of mistral; there are 0 to {len(ids) - 1}, {ids[0]} to {ids[-1]}"
    )
    assert f"{len(ids)} conversations have ids that begin so" in of("pivot", "mistral", "")
    manifest = work / "align" / "mistral" / "manifest.json"
    kept = manifest.read_bytes()
    manifest.unlink()
    try:
        assert "not finished: align mistral is absent; run the recipe first" in of("pivot", "mistral", "0")
    finally:
        manifest.write_bytes(kept)
