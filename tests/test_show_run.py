"""`fusechat tokens` on a conversation of a run, and what it cannot show."""

import json
import re
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

import runs
from fusechat.commands.run import run
from fusechat.data.distributions import open_distributions
from fusechat.data.prepared import PreparedSet
from fusechat.pipeline import load_recipe
from showing import Page, command


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
    run(load_recipe(recipe), directory / "work", until="align")
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
                    "tail": pytest.approx(max(1 - probabilities.sum(), 0), abs=1e-6),
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
    assert f"{len(ids)} conversations have ids with this prefix" in of("pivot", "mistral", "")
    manifest = work / "align" / "mistral" / "manifest.json"
    kept = manifest.read_bytes()
    manifest.unlink()
    try:
        assert "not finished: align mistral is absent; run the recipe first" in of("pivot", "mistral", "0")
    finally:
        manifest.write_bytes(kept)
