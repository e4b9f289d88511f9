"""AlpacaEval's files, read and checked."""

import json
from pathlib import Path
from typing import Any

import pytest

from alpaca_evaluating import annotation_records, baseline_records, made_up, official, write
from cases import each
from fusechat.errors import DataError
from fusechat.evaluate.alpaca.data import gamed_file, is_official, load, read_annotations, write_annotations


def test_both_formats_hold_the_same(tmp_path: Path) -> None:
    one = load(write(tmp_path / "outputs.json", baseline_records()))
    other = load(write(tmp_path / "m.annotations.json", annotation_records()))
    assert one == other
    assert one.generator == "base"
    assert one.instructions[1] == "What is 1 + 1?"
    assert one.baseline[1] == "It is 2."
    assert one.digest == other.digest
    assert one.gamed is None


def test_a_directory_may_hold_either_and_the_difficulties(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither alpaca_eval_gpt4_baseline\.json nor \*\.annotations\.json"):
        load(tmp_path)
    write(tmp_path / "b.annotations.json", annotation_records(3))
    assert len(load(tmp_path).instructions) == 3
    write(tmp_path / "alpaca_eval_gpt4_baseline.json", baseline_records(5))
    (tmp_path / "df_gamed.csv").write_text("")
    assert len(load(tmp_path).instructions) == 5
    assert load(tmp_path).gamed == tmp_path / "df_gamed.csv"


def test_a_limit_keeps_the_first_and_changes_the_digest(tmp_path: Path) -> None:
    whole = load(write(tmp_path / "outputs.json", baseline_records()))
    first = whole.first(2)
    assert first.instructions == ("What is 0 + 1?", "What is 1 + 1?")
    assert len(first.baseline) == len(first.sets) == 2
    assert first.digest != whole.digest
    assert whole.first(None) == whole


def changed(records: list[dict[str, Any]], number: int, **values: Any) -> list[dict[str, Any]]:
    """`...` takes a key away."""
    record = {key: value for key, value in (records[number] | values).items() if value is not ...}
    return [*records[:number], record, *records[number + 1 :]]


@each("records, said", [
    ({}, r"x\.json: holds no list of records"),
    ([], r"x\.json: holds no list of records"),
    ([*baseline_records(1), 7], r"x\.json, record 2: is int, not an object"),
    (changed(baseline_records(), 3, output=...), r'x\.json, record 4: lacks "output"'),
    (changed(baseline_records(), 0, generator=...), r'x\.json, record 1: lacks "generator"'),
    (changed(baseline_records(), 3, instruction=None), r'record 4: "instruction" is NoneType, not text'),
    (changed(baseline_records(), 3, output="\ud800"), r'record 4: "output" holds half a surrogate pair'),
    (changed(baseline_records(), 3, instruction="What is 0 + 1?"), r"record 4: has the instruction of .*record 1 again"),
    (changed(baseline_records(), 3, generator="gpt"), r"record 4: its generator is 'gpt', that of others 'base'"),
])  # fmt: skip
def test_what_is_wrong_with_outputs_is_told_by_record(tmp_path: Path, records: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load(write(tmp_path / "x.json", records))


@each("read", [load, read_annotations])
def test_a_file_that_cannot_be_read(tmp_path: Path, read: Any) -> None:
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[{")
    with pytest.raises(DataError, match=r"x\.json: not JSON"):
        read(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match=r"x\.json: not JSON"):
        read(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"x\.json: not JSON"):
        read(tmp_path / "x.json")


@each("values, said", [
    ({"preference": ...}, r'x\.json, record 2: lacks "preference"'),
    ({"preference": "2"}, r'record 2: "preference" is str, not a number'),
    ({"preference": True}, r'record 2: "preference" is bool, not a number'),
    ({"preference": 2.5}, r'record 2: "preference" is 2\.5; it is 0, 1 to 2, or null'),
    ({"preference": -1}, r'record 2: "preference" is -1'),
    ({"generator_2": ...}, r'record 2: lacks "generator_2"'),
    ({"output_2": ...}, r'record 2: lacks "output_2"'),
    ({"instruction": "What is 0 + 1?"}, r"record 2: has the instruction of .*record 1 again"),
])  # fmt: skip
def test_what_is_wrong_with_annotations_is_told_by_record(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_annotations(write(tmp_path / "x.json", changed(annotation_records(), 1, **values)))


def test_annotations_of_several_models_are_told_apart(tmp_path: Path) -> None:
    both = [one for two in zip(annotation_records(3, "a"), annotation_records(3, "b"), strict=True) for one in two]
    path = write(tmp_path / "x.json", both)
    found = read_annotations(path)
    assert {label: [one.instruction for one in of_one] for label, of_one in found.items()} == {
        label: [f"What is {n} + 1?" for n in range(3)] for label in "ab"
    }
    assert len(load(path).instructions) == 3  # the baseline is the same for both


def test_null_and_nan_are_no_judgement(tmp_path: Path) -> None:
    records = changed(annotation_records(3), 0, preference=None)
    records = changed(records, 1, preference=float("nan"))
    records = changed(records, 2, output_2=None, preference=None)
    found = read_annotations(write(tmp_path / "x.json", records))["ours"]
    assert [one.preference for one in found] == [None, None, None]
    assert [one.output_2 for one in found] == ["Number 0", "Number 1", None]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    records = changed(annotation_records(3), 1, preference=None, missing="it would not say")
    found = read_annotations(write(tmp_path / "x.json", records))["ours"]
    write_annotations(tmp_path / "y.json", found)
    assert read_annotations(tmp_path / "y.json") == {"ours": found}
    assert json.loads((tmp_path / "y.json").read_text()) == records


def test_without_a_path_the_hub_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, name: str, **options: Any) -> str:
        asked.append((repository, name, options))
        return str(write(tmp_path / name, baseline_records()))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = load(None)
    assert asked == [("tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json", {"repo_type": "dataset"})]
    assert len(found.instructions) == 12
    assert found.gamed is None


def test_without_the_hub_the_user_is_told_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*names: str, **options: Any) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(DataError, match=r"baseline\.json: not fetched .* \(no network\); give --data a directory"):
        load(None)
    with pytest.raises(DataError, match=r"df_gamed\.csv: not fetched .*; put it here"):
        gamed_file(None, "put it here")


HEADER = "preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline,model"


def difficulties(order: list[int], value: str = "0.5") -> str:
    return "\n".join([HEADER, *(f"1.0,{index},0.1,{value},False,m" for index in order)])


def test_difficulties_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "df_gamed.csv"
    with pytest.raises(DataError, match="no such file"):
        gamed_file(file, "")
    for text, said in [
        ("a,b\n1,2\n", "lacks one of the columns"),
        (difficulties([0, 1]), "its first 805 rows are not those of instructions 0 to 804"),
        (difficulties([1, 0, *range(2, 805)]), "its first 805 rows"),
        (difficulties([*range(805)], "hard"), "not the difficulties"),
        (difficulties([*range(805)], "nan"), "not finite"),
        (f"{HEADER}\n1.0", "not the difficulties"),
    ]:
        file.write_text(text)
        with pytest.raises(DataError, match=said):
            gamed_file(file, "")
    file.write_text(difficulties([*range(805), *range(805)]))
    assert gamed_file(file, "") == file


def test_official_are_the_805_instructions_in_their_order(tmp_path: Path) -> None:
    instructions = [one["instruction"] for one in made_up()]
    assert not is_official(instructions)
    with official(tmp_path):
        assert is_official(instructions)
        assert is_official([f" {text}\n" for text in instructions])
        assert not is_official([*instructions[1:], instructions[0]])
        assert not is_official(instructions[:-1])
        assert not is_official([*instructions[:-1], "?"])
    found = load(tmp_path)
    assert len(found.instructions) == 805
    assert found.generator == "gpt4_1106_preview"
    assert gamed_file(found.gamed, "") == tmp_path / "df_gamed.csv"
