"""The stage `rounds` on tiny models: what its steps write, one training over all rounds, when it stops, what is the target then."""

import html
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import runs
from answering import counts, gemma, refused, rows, write_prompts, write_recipe
from fusechat.align import stage as align
from fusechat.align.blocks import Blocks, Conversations
from fusechat.commands.run import run
from fusechat.data.distributions import open_distributions
from fusechat.data.prepared import FILE, PreparedSet, write_prepared
from fusechat.data.prompts import read_prompts
from fusechat.errors import DataError
from fusechat.fuse.lora import with_adapters
from fusechat.fuse.part import Part
from fusechat.fuse.training import train
from fusechat.pipeline import build_steps, load_recipe
from fusechat.rounds import alarms
from fusechat.rounds.cut import take_rows
from fusechat.rounds.prompts import of_round, sets_of, taught_prompts
from fusechat.rounds.sound import sound_round, why_stopped
from fusechat.run.units import percent
from test_rounds_rows import naive
from training import StopError, fusion_data, silent, stop_at, trainer_of, weighted

FUSE = {
    "sft_weight": 0.5,
    "training": {
        "num_train_epochs": 12,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
    },
}
ROUNDS: dict[str, Any] = {"count": 2, "max_new_tokens": 12, "stop_on_alarm": False}
TRAINING = {"num_train_epochs": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 2}
ROUNDS["training"] = {**TRAINING, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def whole(shared: Any, taught: dict[str, Path]) -> Iterator[Path]:
    """A finished work directory with two rounds; not to be changed."""

    def make(directory: Path) -> None:
        run(load_recipe(write_recipe(directory, taught, fuse=FUSE, rounds=ROUNDS)), directory / "work")

    directory = shared("rounds", make)
    before = runs.digests(directory / "work")
    yield directory
    assert runs.digests(directory / "work") == before


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(directory / "model.safetensors"))


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_the_target_is_the_last_rounds_model(whole: Path) -> None:
    work, own = whole / "work", whole / "work/rounds/answers"
    last, sound = weights(own / "2/trained/model"), weights(own / "sound/model")
    assert equal(last, sound)
    assert not equal(last, weights(own / "1/trained/model"))
    assert not equal(weights(own / "1/trained/model"), weights(work / "fuse/answers/model"))
    merged = weights(work / "merge/model")
    assert all(torch.allclose(merged[name].float(), last[name], atol=1e-6) for name in merged)
    found = counts(work, "rounds/answers/sound")
    assert (found["round"], found["of"], len(found["rounds"])) == (2, 2, 3)
    measured = json.loads((work / "evaluate/results.json").read_text())
    assert "answers" in json.dumps(measured)
    assert (work / "report/index.html").is_file()


def test_answers_are_kept_as_they_were_sampled(whole: Path) -> None:
    own = whole / "work/rounds/answers"
    for number in (1, 2, 3):
        found = {f"{row['id']}-{number}": row for row in rows(own / f"{number}/answers")}
        assert len(found) == 6
        for teacher in ("mistral", "gemma"):
            student = PreparedSet(own / f"{number}/teachers/{teacher}/student")
            theirs = PreparedSet(own / f"{number}/teachers/{teacher}/prepared")
            wanted = [name for name, row in found.items() if row["teacher"] == teacher and not row["why"]]
            assert student.ids == theirs.ids == wanted
            for one in student:
                row = found[one.id]
                gold = [*row["tokens"], *([] if row["end"] is None else [row["end"]])]
                assert one.gold.tolist() == gold[: len(one)]
                assert one.content_bytes.tolist() == [len(row["text"].encode())]
                assert theirs[theirs.row_of[one.id]].content_bytes.sum() > 0
    texts = [[row["tokens"] for row in rows(own / f"{number}/answers")] for number in (1, 2)]
    assert texts[0] != texts[1], "each round draws others"


def test_what_is_left_out_is_said(taught: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts of which no answer was kept, and answers that are no conversation for their teacher."""
    generate = {"keep": 0.5, "max_new_tokens": 12}
    rounds = {**ROUNDS, "count": 1, "temperature": 3.0}
    recipe = load_recipe(write_recipe(tmp_path, taught, fuse=FUSE, generate=generate, rounds=rounds))
    with caplog.at_level("WARNING", logger="fusechat"):
        run(recipe, tmp_path / "work", until="rounds")
    assert caplog.messages.count("rounds answers: round 1: 3 prompts are not asked: it has no chosen answer") == 1
    for reason, number in counts(tmp_path / "work", "rounds/answers/1/kept")["left_out"].items():
        assert f"rounds answers: round 1: {number} answers teach nothing: {reason}" in caplog.messages


def test_rows_up_to_the_first_wrong_one_are_learnt(whole: Path) -> None:
    own, cut = whole / "work/rounds/answers", 0
    for number in (1, 2, 3):
        figures, total = counts(whole / "work", f"rounds/answers/{number}/kept"), 0
        for teacher in ("mistral", "gemma"):
            place = own / f"{number}/teachers/{teacher}"
            student, aligned = PreparedSet(place / "student"), open_distributions(place / "aligned")
            kept = own / f"{number}/kept/{teacher}"
            found, targets = PreparedSet(kept), open_distributions(kept)
            for one in student:
                targets_of_one = aligned[one.id]
                dense = [
                    {int(token): float(mass) for token, mass in zip(*row, strict=True) if token >= 0}
                    for row in zip(targets_of_one.ids, targets_of_one.probabilities, strict=True)
                ]
                expected = naive(one.gold.tolist(), dense, 0.1)
                cut += expected != [bool(row) for row in dense]
                total += sum(expected)
                if not any(expected):
                    assert one.id not in found.row_of
                    continue
                here = found[found.row_of[one.id]]
                assert here.position.tolist() == one.position[expected].tolist()
                assert targets[one.id].ids.tolist() == targets_of_one.ids[expected].tolist()
                assert (targets[one.id].ids >= 0).any(axis=1).all(), "no row without a target is learnt"
        assert figures["kept"] == total
        assert figures["rows"] == figures["kept"] + figures["without_target"] + figures["after_a_wrong_token"]
    assert cut > 0


def test_one_optimizer_and_one_schedule_over_all_rounds(whole: Path) -> None:
    own = whole / "work/rounds/answers"
    entries = [
        json.loads(line)
        for number in (1, 2)
        for line in (own / f"{number}/trained/losses.jsonl").read_text().splitlines()
    ]
    assert [entry["step"] for entry in entries] == list(range(1, 13))  # four epochs of six prompts, two a step
    assert [entry["learning_rate"] for entry in entries] == pytest.approx(
        [1e-3 * (12 - step) / 12 for step in range(12)]
    )
    assert (own / "1/trained/checkpoint-6/optimizer.pt").is_file()
    assert not list((own / "2/trained").glob("checkpoint*"))
    assert [counts(whole / "work", f"rounds/answers/{number}/trained")["steps"] for number in (1, 2)] == [6, 6]


def test_the_map_is_counted_further_by_the_kept_rows_alone(whole: Path) -> None:
    """In what is seen at shared starts: the first training's conversations, then what each round kept."""
    recipe = load_recipe(whole / "recipe.yaml")
    steps = {step.name: step for step in build_steps(recipe, whole / "work")}
    upstream = {key: step.name for key, step in steps["answers/2/teachers/mistral/aligned"].upstream.items()}
    assert upstream["counted/kept/1"] == "answers/1/kept"
    assert upstream["counted/prepared/1"] == "answers/1/teachers/mistral/prepared"
    assert {"counted/pivot/answers-mistral", "counted/mistral/answers-mistral"} <= upstream.keys()
    assert not any("/2/" in name for key, name in upstream.items() if key.startswith("counted"))


def test_a_map_is_counted_on_rows_with_gaps(whole: Path, tmp_path: Path) -> None:
    """A kept answer may begin late, for its first row had no target: that is no sign of another text."""
    recipe, own = load_recipe(whole / "recipe.yaml"), whole / "work/rounds/answers/1"
    pair, _, about = align.models(recipe, "gemma")
    kept = [one for one in PreparedSet(own / "teachers/gemma/student") if len(one) > 2]
    assert kept
    late = [take_rows(one, np.arange(len(one)) != at % 2) for at, one in enumerate(kept)]
    write_prepared(tmp_path / FILE, late)
    data = Conversations([tmp_path], [own / "teachers/gemma/prepared"], [], checked=True, **about)
    with Blocks(pair, data) as blocks:
        found = blocks.count(silent)
    whole_rows = Conversations([own / "teachers/gemma/student"], [own / "teachers/gemma/prepared"], [], **about)
    with Blocks(pair, whole_rows) as blocks:
        assert 0 < found.count.sum() < blocks.count(silent).count.sum()


@pytest.mark.parametrize("loss", ["cross_entropy", "reverse_kl", "jsd"])
def test_a_steps_loss_is_the_naive_one(taught: dict[str, Path], tmp_path: Path, loss: str) -> None:
    write_prompts(tmp_path / "prompts.jsonl", ["dog"])
    training = {"max_steps": 1, "per_device_train_batch_size": 1, "save_strategy": "no"}
    how = {"count": 1, "max_new_tokens": 8, "loss": loss, "training": training, "stop_on_alarm": False}
    how["until_wrong"] = 0.0
    run(load_recipe(write_recipe(tmp_path, taught, fuse=FUSE, rounds=how)), tmp_path / "work", until="rounds")
    own = tmp_path / "work/rounds/answers"
    (kept,) = [place for place in (own / "1/kept").iterdir() if place.is_dir() and len(PreparedSet(place))]
    rows, store = PreparedSet(kept)[0], open_distributions(kept)
    targets = store[rows.id]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "work/fuse/answers/model", dtype=torch.float32)
    logits = model(input_ids=torch.tensor([rows.input_ids.tolist()])).logits[0].double()
    total = 0.0
    for row, position in enumerate(rows.position.tolist()):
        q = torch.softmax(logits[position - 1], dim=0)
        ids = [token for token in targets.ids[row].tolist() if token >= 0]
        p = [float(x) for x in targets.probabilities[row][: len(ids)]]
        scale = (1 - float(targets.tail[row])) / sum(p)
        p = [*(x * scale for x in p), float(targets.tail[row])]
        ours = [*(float(q[token]) for token in ids), 1 - sum(float(q[token]) for token in ids)]
        for one, other in zip(p, ours, strict=True):
            middle = (one + other) / 2
            if loss == "cross_entropy":
                total -= one * math.log(other) if one else 0.0
            elif loss == "reverse_kl":
                total += other * math.log(other / one) if one else 0.0
            else:
                total += (one * math.log(one / middle) if one else 0.0) / 2 + other * math.log(other / middle) / 2
    (entry,) = map(json.loads, (own / "1/trained/losses.jsonl").read_text().splitlines())
    assert entry["loss"] == entry["fusion_loss"]
    assert entry["loss"] == pytest.approx(total / len(rows), rel=1e-4)


LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.3, "target_modules": "all-linear"}


@pytest.mark.parametrize("lora", [None, LORA])
def test_parts_of_a_training_are_the_whole_training(
    models: dict[str, Path], single: Path, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    """On the same data: bit for bit, and also where a part was stopped between its checkpoints and went on."""
    data = weighted(fusion_data(single / "work", "mistral", function="source"), 1.2)  # twelve conversations an epoch
    settings = {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 4, "logging_steps": 2}

    def trained(
        output: Path, part: Part | None, stop: int = 0, **more: Any
    ) -> tuple[list[Any], dict[str, torch.Tensor]]:
        model = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32)
        model = with_adapters(model, lora, seed=3) if lora else model
        trainer = trainer_of(model, data, output, sft_weight=(0.0, 0.0), **settings, **more)
        if stop:
            stop_at(trainer, stop)
            with pytest.raises(StopError):
                train(trainer, silent, part=part)
            return [], {}
        return train(trainer, silent, part=part), model.state_dict()

    _, expected = trained(tmp_path / "whole", None)
    begin, entries = None, []
    for number in (1, 2, 3):
        part, saved = Part(number, 3, 3, begin), {"save_strategy": "steps", "save_steps": 2}
        trained(tmp_path / str(number), part, 3 * number - 1, **saved)
        log, found = trained(tmp_path / str(number), part, **saved)
        entries += log
        begin = tmp_path / str(number) / str(part.checkpoint)
    assert part.checkpoint is None
    assert equal(found, expected)
    assert [entry["step"] for entry in entries] == sorted({entry["step"] for entry in entries})
    assert entries[-1]["step"] == 9


def test_prompts_of_a_round_go_on_where_the_last_stopped(taught: dict[str, Path], tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, taught, rounds={"teacher": {"source": "gemma"}, "prompts": 0.5}))
    every, left_out = taught_prompts(recipe, "answers", None)
    assert (len(every), left_out) == (6, {})
    assert {teacher for _, teacher in every} == {"gemma"}
    each = [[one.id for one, _ in of_round(every, 0.5, number, seed=0)] for number in (1, 2, 3)]
    assert [len(one) for one in each] == [3, 3, 3]
    assert set(each[0]) | set(each[1]) == {one.id for one, _ in every}
    assert each[2] == each[0]
    assert each != [[one.id for one, _ in of_round(every, 0.5, number, seed=1)] for number in (1, 2, 3)]
    assert len(of_round(every, 0.01, 1, seed=0)) == 1
    few = [[one.id for one, _ in of_round(every, 1.0, 2, seed=seed, most=2)] for seed in range(9)]
    assert all(len(one) == 2 for one in few)
    assert len({tuple(one) for one in few}) > 3, "a few of all prompts, not the first of the file"
    assert of_round([], 0.5, 1, seed=0) == []


def test_who_teaches_a_prompt(taught: dict[str, Path], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, taught, rounds={})
    recipe = load_recipe(path)
    ids = [one.id for one in read_prompts(sets_of(recipe, "answers")).conversations]
    chosen = [
        {"prompt_id": ids[0], "author": "mistral", "scores": {"pivot": 0.1, "mistral": 0.9, "gemma": 0.5}},
        {"prompt_id": ids[1], "author": "pivot", "scores": {"pivot": 0.1, "mistral": 0.2, "gemma": None}},
        {"prompt_id": ids[2], "author": "gemma", "scores": {"pivot": 0.1, "mistral": 0.4, "gemma": 0.4}},
        {"prompt_id": ids[3], "author": "gemma", "scores": {"pivot": 0.1}},
    ]
    (tmp_path / "conversations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chosen))

    def found(rule: str) -> tuple[dict[int, str], dict[str, int]]:
        recipe = load_recipe(path, [f"rounds.teacher={rule}"])
        taught_by, left_out = taught_prompts(recipe, "answers", tmp_path)
        return {ids.index(one.id): teacher for one, teacher in taught_by}, left_out

    nobody, none = "nobody who teaches the target is its teacher", "it has no chosen answer"
    assert found("author") == ({0: "mistral", 2: "gemma", 3: "gemma"}, {nobody: 1, none: 2})
    assert found("best") == ({0: "gemma", 1: "mistral", 2: "mistral"}, {nobody: 1, none: 2})


def test_conversations_of_a_file_lend_their_prompts(models: dict[str, Path], tmp_path: Path) -> None:
    """Without answers from the models: a target's own conversations, without their last answers."""
    how = {"count": 1, "max_new_tokens": 6, "teacher": {"source": "gemma"}, "training": {"max_steps": 1}}
    recipe = load_recipe(runs.write_recipe(tmp_path, models, rounds=how | {"prompts": 0.5}))
    run(recipe, tmp_path / "work", only="gemma")
    found = counts(tmp_path / "work", "rounds/gemma/sound")
    assert found["rounds"][0]["answers"] == 4, "half of the prompts of own.jsonl"
    assert not (tmp_path / "work/merge").exists()
    assert not (tmp_path / "work/rounds/mistral").exists()
    asked = [one.messages for one, _ in taught_prompts(recipe, "gemma", None)[0]]
    assert all(messages[-1].role == "user" for messages in asked)


def test_a_source_with_the_targets_tokenizer_is_carried_over_whole(models: dict[str, Path], tmp_path: Path) -> None:
    how = {"count": 1, "max_new_tokens": 6, "teacher": {"source": "same"}, "training": {"max_steps": 1}}
    recipe = runs.write_recipe(tmp_path, models, sources={"same": str(models["llama"])}, rounds=how)
    run(load_recipe(recipe), tmp_path / "work", until="rounds")
    place = tmp_path / "work/rounds/same/1/teachers/same"
    assert json.loads((place / "aligned/figures.json").read_text())["same_tokenizer"]
    aligned, captured = open_distributions(place / "aligned"), open_distributions(place / "captured")
    student, theirs = PreparedSet(place / "student"), PreparedSet(place / "prepared")
    compared = 0
    for one in student:
        if one.input_ids.tolist() == theirs[theirs.row_of[one.id]].input_ids[: len(one.input_ids)].tolist():
            ours = aligned[one.id]
            assert [set(row) for row in ours.ids.tolist()] == [
                set(row) for row in captured[one.id].ids[: len(one)].tolist()
            ]
            np.testing.assert_allclose(ours.tail, captured[one.id].tail[: len(one)], atol=2e-3)
            compared += 1
    assert compared


def test_an_alarm_ends_the_rounds_and_the_last_sound_model_stays(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: list[str]
) -> None:
    def alarm_in_round(wrong: int) -> Path:
        directory = tmp_path / str(wrong)
        shutil.copytree(whole, directory)
        seen: list[Any] = []

        def said(now: Any, first: Any) -> list[str]:
            seen.append(now)
            return ["it is wrong"] if len(seen) == wrong else []

        monkeypatch.setattr(alarms, "alarms", said)
        for place in (directory / "work/rounds/answers").glob("*/kept"):
            shutil.rmtree(place)
        recipe = load_recipe(directory / "recipe.yaml", ["rounds.stop_on_alarm=true"])
        run(recipe, directory / "work", until="rounds")
        assert all(step.finished for step in build_steps(recipe, directory / "work") if step.stage == "rounds")
        return directory / "work"

    for wrong, kept, trained in ((1, 0, 0), (2, 0, 1), (3, 1, 2)):
        work = alarm_in_round(wrong)
        own = work / "rounds/answers"
        model = own / f"{kept}/trained/model" if kept else work / "fuse/answers/model"
        assert equal(weights(own / "sound/model"), weights(model)), wrong
        assert [counts(work, f"rounds/answers/{number}/trained").get("stopped") for number in (1, 2)] == [
            None if number <= trained else "it is wrong" if number == wrong else "the round before was the last"
            for number in (1, 2)
        ]
        assert counts(work, "rounds/answers/sound")["round"] == kept
        assert any(line.endswith("alarm: it is wrong") for line in heard)
        assert f"rounds answers: the model of round {kept} is the target, of 2" in heard
        heard.clear()


def test_which_model_is_sound() -> None:
    well, wrong, ended = {"alarms": []}, {"alarms": ["x"]}, {"stopped": "x"}
    for trained, kept, stop, expected in (
        ([{}, {}, {}], [well, well, well], True, 2),
        ([{}, {}, {}], [well, well, wrong], True, 1),
        ([{}, {}, ended], [well, well, wrong], True, 1),
        ([{}, ended, ended], [well, wrong, well], True, 0),
        ([{}, ended, ended], [wrong, well, well], True, 0),
        ([{}, {}, {}], [well, wrong, wrong], False, 2),
        ([{}, {}, ended], [well, wrong, wrong], False, 1),
    ):
        assert sound_round(trained, kept, stop_on_alarm=stop) == expected
    assert why_stopped({}, {"kept": 3, "alarms": ["x", "y"]}, stop_on_alarm=True) == "x; y"
    assert why_stopped({}, {"kept": 3, "alarms": ["x"]}, stop_on_alarm=False) == ""
    assert why_stopped({}, {"kept": 0, "alarms": []}, stop_on_alarm=False) == "no row of the answers is taught"
    assert why_stopped({"stopped": "x"}, {"kept": 3, "alarms": []}, stop_on_alarm=False)


def test_nothing_that_could_be_learnt_leaves_the_first_model(taught: dict[str, Path], tmp_path: Path) -> None:
    """Whose answers are white space at best."""
    path = write_recipe(tmp_path, taught, fuse=FUSE, rounds={**ROUNDS, "max_new_tokens": 1}, align={"min_mass": 1.0})
    run(load_recipe(path), tmp_path / "work", until="rounds")
    found = counts(tmp_path / "work", "rounds/answers/sound")
    assert found["round"] == 0
    assert found["rounds"][0]["alarms"] == ["no row of the answers is taught"]
    assert equal(weights(tmp_path / "work/rounds/answers/sound/model"), weights(tmp_path / "work/fuse/answers/model"))


def of_rounds(work: Path) -> dict[str, str]:
    return {name: digest for name, digest in runs.digests(work).items() if name.startswith("rounds/")}


def test_a_killed_round_goes_on_to_the_same_bits(whole: Path, tmp_path: Path) -> None:
    """As if it had been killed in any of its steps: what was finished after that is gone."""
    expected = of_rounds(whole / "work")
    names = ("answers", "teachers/mistral/captured", "teachers/gemma/aligned", "kept", "trained")
    for number, name in ((number, name) for number in (1, 2) for name in names):
        directory = tmp_path / f"{number}-{name.replace('/', '-')}"
        shutil.copytree(whole, directory)
        place = directory / "work/rounds/answers" / str(number) / name
        manifest = json.loads((place / "manifest.json").read_text())
        started = {key: manifest[key] for key in ("fingerprint", "inputs", "built_from", "versions")}
        (place / "manifest.json").unlink()
        (place / "started.json").write_text(json.dumps({**started, "spent": 0.0, "began": 0.0}))
        if name == "answers":
            (place / "answers-00001.json").unlink()
        if name == "trained":
            shutil.rmtree(place / "model")
            shutil.rmtree(place / "checkpoint-6", ignore_errors=True)  # the same bytes wherever it is written
        run(load_recipe(directory / "recipe.yaml"), directory / "work", until="rounds")
        assert of_rounds(directory / "work") == expected, (number, name)


def test_status_clean_and_what_goes_stale(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    directory, work = tmp_path / "copy", tmp_path / "copy" / "work"
    shown = json.loads(runs.here("status", work, "--json").stdout)
    assert {row["state"] for row in shown} == {"done"}
    own = [row["step"] for row in shown if row["step"].startswith("rounds")]
    assert own[0] == "rounds answers/1/answers"
    assert own[-1] == "rounds answers"
    assert len(own) == 3 * (2 + 2 * 4) + 2 + 1
    content = yaml.safe_load((directory / "recipe.yaml").read_text())
    content["rounds"] = {**ROUNDS, "until_wrong": 0.3}
    (directory / "changed.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    told = json.loads(runs.here("status", work, "--recipe", directory / "changed.yaml", "--json").stdout)
    stale = {row["step"] for row in told if row["state"] == "stale"}
    assert "rounds answers/1/kept" in stale
    assert "rounds answers/1/answers" not in stale
    assert run(load_recipe(directory / "recipe.yaml"), work) == 1, "the page names where the data are"
    assert runs.here("clean", work, "--yes").returncode == 0
    assert not list((work / "rounds").rglob("checkpoint-*/*"))
    assert not [file for name in ("shard-*.arrow", "aligned.arrow") for file in (work / "rounds").rglob(name)]
    assert run(load_recipe(directory / "recipe.yaml"), work) == 0
    shutil.rmtree(work / "rounds/answers/2/trained")
    run(load_recipe(directory / "recipe.yaml"), work, until="rounds")
    assert equal(
        weights(work / "rounds/answers/2/trained/model"), weights(whole / "work/rounds/answers/2/trained/model")
    )


def test_the_report_has_curves_over_rounds_and_one_prompts_answers(whole: Path) -> None:
    work = whole / "work"
    page = (work / "report/index.html").read_text(encoding="utf-8")
    section = re.sub(r"\s+", " ", page.split('<section id="rounds">')[1].split("</section>")[0])
    assert "The target is the model of the last round, of 2." in section
    for number, place in ((1, "round 1"), (2, "round 2"), (3, "afterwards")):
        figures = counts(work, f"rounds/answers/{number}/kept")
        assert f'<td class="left">{place}</td><td>6</td><td>{percent(figures["share_kept"])}</td>' in section
    first, texts = rows(work / "rounds/answers/1/answers")[0], []
    for number in (1, 2, 3):
        texts += [row["text"] for row in rows(work / f"rounds/answers/{number}/answers") if row["id"] == first["id"]]
    shown = re.findall(r'<div class="said" dir="auto">(.*?)</div>', section)
    assert [html.unescape(text) for text in shown] == [re.sub(r"\s+", " ", text) for text in texts]
    drawn = page.split('<script type="application/json" id="figures">')[1].split("</script>")[0]
    (plot,) = [one for one in json.loads(drawn) if one["name"] == "rounds-0"]
    assert plot["data"][0]["x"] == ["round 1", "round 2", "afterwards"]
    assert "answers, rounds: fusion term" in drawn


def test_other_commands_on_such_a_recipe(taught: dict[str, Path], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, taught, rounds=ROUNDS, sources={"gemma": gemma(taught)})
    planned = runs.here("plan", path)
    assert planned.returncode == 2
    assert "cannot be planned yet" in planned.stderr
    line = refused(write_recipe(tmp_path, taught, rounds={**ROUNDS, "training": {"optim": "adamw_torhc"}}))
    assert line.startswith("rounds.training: ")


def test_prompts_that_are_no_prompts(models: dict[str, Path], tmp_path: Path) -> None:
    how = {"count": 1, "teacher": {"source": "gemma"}}
    recipe = load_recipe(runs.write_recipe(tmp_path, models, rounds=how))
    (tmp_path / "own.jsonl").write_text(json.dumps({"messages": []}) + "\n")
    with pytest.raises(DataError, match=r"own.jsonl:1"):
        taught_prompts(recipe, "gemma", None)
