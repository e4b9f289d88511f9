"""Conversations that a model leaves out: told on the terminal, in status and report, and too many of them end the run."""

import json
from pathlib import Path
from typing import Any

import runs
import tiny
from fusechat.commands.run import run
from fusechat.data.prepared import PreparedSet
from fusechat.pipeline import load_recipe
from test_bad_input import complaints

# As the templates of Mistral and Gemma have it: questions and answers in turn, from a question on.
ALTERNATING = tiny.INST.replace(
    "{% if message['role'] == 'user' %}",
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}",
)
WHY = "turns of one role in a row: the template refuses it: Conversation roles must alternate user/assistant"


def turns(*contents: str) -> list[dict[str, str]]:
    """`u:…` and `a:…`."""
    names = {"u": "user", "a": "assistant"}
    return [{"role": names[text[0]], "content": text[2:]} for text in contents]


def records(in_a_row: int, plain: int) -> list[dict[str, Any]]:
    rows = [
        turns(f"u:Hi {n}", f"a:Hello {n}.", "u:How are you?", "u:And now?", f"a:Fine {n}.") for n in range(in_a_row)
    ]
    rows += [turns(f"u:What is {n}?", f"a:It is {n}.") for n in range(plain)]
    return [{"messages": row} for row in rows]


def recipe(
    directory: Path, models: dict[str, Path], rows: list[dict[str, Any]], *, strict: str = "mistral", **data: Any
) -> Path:
    """A pivot and one source, of which the strict one wants turns to alternate."""
    specs: dict[str, Any] = {name: {"model": str(models[name])} for name in ("llama", "mistral")}
    specs[strict]["chat_template"] = ALTERNATING if strict == "mistral" else ALTERNATING.replace("bos_token", "''")
    file = runs.write_recipe(
        directory,
        models,
        pivot=specs["llama"],
        sources={"mistral": specs["mistral"]},
        data={"train": "train.jsonl", "max_length": 256, **data},
    )
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def prepared(directory: Path, model: str) -> PreparedSet:
    return PreparedSet(directory / "work" / "prepare" / model / "data")


def test_more_than_the_recipe_allows_ends_the_run_with_the_reason_and_what_to_set(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    file = recipe(tmp_path, models, records(9, 1))
    [line] = complaints("run", file, "--workdir", tmp_path / "work", "--until", "align")
    assert line.startswith(
        "mistral: 9 of the 10 conversations of data are left out, 90%, more than data.max_rejected allows (0.1): "
        f"{WHY} (9 of them); data.join_turns: true joins such turns; a larger data.max_rejected continues"
    )
    assert not (tmp_path / "work" / "capture").exists(), "it stops before any model runs"
    planned = runs.here("plan", file, "--workdir", tmp_path / "plan", "--device", "cpu").stderr.splitlines()
    assert any("mistral: 90" in line and "data.max_rejected" in line and "join_turns" in line for line in planned)


def test_what_is_left_out_is_told_at_every_run_and_in_status(
    tmp_path: Path, models: dict[str, Path], heard: list[str]
) -> None:
    rows = records(2, 20)
    file = recipe(tmp_path, models, [*rows, rows[-1]])
    for _ in range(2):
        heard.clear()
        run(load_recipe(file), tmp_path / "work", until="prepare")
        told = [line for line in heard if "left out" in line]
        assert len(told) == 2
        assert told[0].startswith("prepare pivot/data: 1 of 23 conversations are left out: the same conversation came")
        assert told[1].startswith(f"prepare mistral/data: 2 of 22 conversations are left out: {WHY} (2)")
        assert told[1].endswith("data.join_turns: true joins such turns")
    shown = json.loads(runs.here("status", tmp_path / "work", "--json").stdout)
    lost = {row["step"]: row["left_out"] for row in shown if "left_out" in row}
    assert lost == {
        "prepare pivot/data": {"the same conversation came before": 1},
        "prepare mistral/data": {WHY: 2},
    }


def test_turns_in_a_row_are_joined_by_a_blank_line_where_the_template_needs_it(
    tmp_path: Path, models: dict[str, Path], tokenizers: dict[str, Any], heard: list[str]
) -> None:
    file = recipe(tmp_path, models, records(2, 2), join_turns=True)
    run(load_recipe(file), tmp_path / "work", until="prepare")
    assert [line for line in heard if "joined" in line] == [
        "prepare mistral/data: in 2 of 4 conversations turns of one role in a row were joined (data.join_turns)"
    ]
    by_hand = turns("u:Hi 0", "a:Hello 0.", "u:How are you?\n\nAnd now?", "a:Fine 0.")
    as_it_is = records(1, 0)[0]["messages"]
    for model, kind, messages, template in (
        ("mistral", "mistral", by_hand, ALTERNATING),
        ("pivot", "llama", as_it_is, None),
    ):
        expected = tokenizers[kind].apply_chat_template(messages, chat_template=template, return_dict=False)
        assert prepared(tmp_path, model)[0].input_ids.tolist() == expected


def test_answers_in_a_row_are_one_answer_for_every_model(tmp_path: Path, models: dict[str, Path]) -> None:
    rows = [{"messages": turns("u:Hi", "a:Hello.", "a:How are you?", "u:Fine.", "a:Good.")}]
    run(load_recipe(recipe(tmp_path, models, rows, join_turns=True)), tmp_path / "work", until="prepare")
    for model in ("pivot", "mistral"):
        assert prepared(tmp_path, model)[0].content_bytes.tolist() == [len("Hello.\n\nHow are you?"), len("Good.")]


def test_a_source_does_not_run_over_what_the_pivot_leaves_out(
    tmp_path: Path, models: dict[str, Path], heard: list[str]
) -> None:
    file = recipe(tmp_path, models, records(3, 4), strict="llama", max_rejected=0.5)
    run(load_recipe(file), tmp_path / "work", until="capture")
    assert prepared(tmp_path, "mistral").ids == prepared(tmp_path, "pivot").ids
    counts = json.loads((tmp_path / "work/capture/mistral/data/manifest.json").read_text())["counts"]
    assert counts["conversations"] == 4
    assert [line.partition(":")[0] for line in heard if "left out" in line] == ["prepare pivot/data"]


def test_the_report_names_them(tmp_path: Path, models: dict[str, Path]) -> None:
    from fusechat.data.rejected import LeftOut
    from fusechat.report.page import render_page
    from reporting import contents

    lost = LeftOut("mistral", "data", 20, {WHY: 2}, tmp_path)
    page = render_page(contents(left_out=[lost], notes=[("pivot/data", "in 3 of 4 conversations it rained")]))
    assert (
        f'<td class="left">mistral</td><td class="left">data</td><td>2</td><td>22</td><td class="left">{WHY} (2)</td>'
        in page
    )
    assert "pivot/data: in 3 of 4 conversations it rained." in page
