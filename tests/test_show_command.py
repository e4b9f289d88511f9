"""`fusechat tokens` as one types it, and the page that it writes."""

import json
import re
import sys
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given, settings

import runs
from fusechat.align import align_starts, token_spans
from fusechat.models.spans import encode_with_spans
from fusechat.show.page import render_page
from fusechat.show.passages import Model, TokenView
from fusechat.show.tokens import load
from showing import TEXT, Page, command, load_once, passage_of, texts, width_of


def test_a_pipe_gets_no_colours_and_a_terminal_its_own_width(models: dict[str, Path]) -> None:
    asked = (*(models[kind] / "tokenizer.json" for kind in ("llama", "mistral")), "--text", TEXT * 4)
    piped = runs.here("tokens", *asked, COLUMNS="50")
    assert piped.returncode == 0, piped.stderr
    assert "\x1b" not in piped.stdout
    assert piped.stderr == ""
    coloured = runs.on_a_terminal(50, "tokens", *asked)
    assert "\x1b[" in coloured
    plain = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    drawn = [line for line in plain.splitlines() if line.startswith(("pivot   ", "source  ")) and "bytes" not in line]
    assert 30 < max(map(width_of, drawn)) <= 50
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


# -- the page -------------------------------------------------------------------------------------------------------


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
    page = Page(render_page(TokenView(model, model, (passage,))))
    assert len(page.tips) == len(passage.pivot) + len(passage.source)


_LOADED: dict[str, Any] = {}
