"""The whole pipeline on tiny models of three architectures with three kinds of tokenizer."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fusing
import runs
import tiny
from fusechat.commands.run import run
from fusechat.data.distributions import open_distributions
from fusechat.data.prepared import PreparedSet
from fusechat.pipeline import build_steps, load_recipe


def manifest(finished: Path, step: str) -> dict[str, Any]:
    return dict(json.loads((finished / "work" / step / "manifest.json").read_text()))


def test_every_stage_leaves_what_the_design_names(finished: Path) -> None:
    work = finished / "work"
    for name in (
        "recipe.yaml",
        "prepare/pivot/data/conversations.arrow",
        "prepare/gemma/gemma/rejected.jsonl",
        "capture/mistral/data/shard-00000-*.arrow",
        "align/gemma/vocabulary_map.arrow",
        "align/gemma/aligned.arrow",
        "fuse/mistral/model/model.safetensors",
        "fuse/mistral/losses.jsonl",
        "merge/model/model.safetensors",
        "merge/merge_report.json",
        "evaluate/results.json",
        "report/index.html",
    ):
        assert len([file for file in work.glob(name) if file.is_file()]) == 1, name
    assert not list(work.rglob("*.partial")), "nothing half-written is left"
    assert not list(work.rglob("started.json"))
    assert not list(work.rglob("checkpoint*"))


def test_what_had_to_be_done_to_conversations_is_counted(finished: Path) -> None:
    """Of ten conversations 0, 3, 6 and 9 have a system message, which mistral's template alone refuses."""
    assert manifest(finished, "prepare/mistral/data")["counts"]["system_folded"] == 4
    assert "system_folded" not in manifest(finished, "prepare/pivot/data")["counts"]
    assert manifest(finished, "prepare/pivot/data")["counts"]["conversations"] == 10
    assert manifest(finished, "prepare/pivot/data")["counts"]["responses"] == 15


def test_a_second_run_does_nothing(finished: Path, copied: Path) -> None:
    assert run(load_recipe(copied / "recipe.yaml"), copied / "work") == 0
    assert runs.digests(copied / "work") == runs.digests(finished / "work")


def test_of_a_source_with_the_pivots_tokenizer_every_token_is_itself(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is aligned is then what was captured. Two templates: the end of turn of the one stands for the other's."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    twin = {"model": str(models["llama"]), "chat_template": template}
    runs.write_recipe(tmp_path, models, sources={"twin": twin})
    with caplog.at_level("INFO", logger="fusechat"):
        run(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "work", until="align")
    counts = json.loads((tmp_path / "work/align/twin/manifest.json").read_text())["counts"]
    assert counts["same_tokenizer"]
    assert counts["map_rows_by_origin"]["same token"] > 0
    assert "align twin: has the pivot's tokenizer" in caplog.text
    prepared = [PreparedSet(tmp_path / "work/prepare" / name / "data") for name in ("pivot", "twin")]
    captured, aligned = (open_distributions(tmp_path / "work" / at) for at in ("capture/twin/data", "align/twin"))
    for identity, number in prepared[0].row_of.items():
        ours, theirs = prepared[0][number], prepared[1][prepared[1].row_of[identity]]
        places = [
            {
                (int(each.response[row]), int(each.begin[row]), int(each.end[row])): row
                for row in np.flatnonzero(~each.end_of_turn & ~each.lead & (each.begin > 0)).tolist()
            }
            for each in (ours, theirs)
        ]
        both = sorted(places[0].keys() & places[1].keys())
        assert len(both) > 0.8 * len(places[0])
        here, there = ([each[place] for place in both] for each in places)
        rows, expected = aligned[identity].take(np.array(here)), captured[identity].take(np.array(there))
        for one, other in zip(fusing.rows_of(rows), fusing.rows_of(expected), strict=True):
            assert one == pytest.approx(other, rel=2e-3)
        np.testing.assert_allclose(rows.tail, expected.tail, rtol=1e-4)


def test_aligned_rows_conserve_mass_and_join_the_pivot_rows(finished: Path) -> None:
    work = finished / "work"
    for source, data in (("mistral", "data"), ("gemma", "gemma")):
        prepared = PreparedSet(work / "prepare" / "pivot" / data)
        aligned = open_distributions(work / "align" / source)
        captured = open_distributions(work / "capture" / source / data)
        empty = 0
        for conversation in prepared:
            rows = aligned[conversation.id]
            assert len(rows) == len(conversation)
            sums = rows.probabilities.sum(axis=1)
            assert sums + rows.tail == pytest.approx(np.ones(len(rows)), abs=1e-6)
            rounded = np.exp(aligned.table.array("logprobs", aligned.index[conversation.id]).astype(np.float64))
            rounded = rounded.reshape(len(rows), -1).sum(axis=1)
            assert rounded + rows.tail == pytest.approx(np.ones(len(rows)), abs=2e-3)
            empty += int(
                (sums == 0).sum()
            )  # the gold token fills what is unaligned, so these are aligned but without a candidate
            assert (rows.ids < 412).all()
            assert captured[conversation.id].probabilities.sum(axis=1).max() <= 1
        figures = json.loads((work / "align" / source / "figures.json").read_text())
        assert figures["conversations"] == len(prepared)
        assert figures["positions_without_candidate"] == empty
        assert figures["positions"] == sum(map(len, prepared))
        assert 0.2 < figures["coverage_of_positions"] <= 1


def test_the_fused_model_is_a_plain_hugging_face_model(finished: Path, models: dict[str, Path]) -> None:
    directory = finished / "work" / "merge" / "model"
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.dtype == torch.float32
    assert tokenizer.chat_template == tiny.CHATML
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 3 + 4?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    names = {file.name for file in directory.iterdir()}
    assert names >= {"README.md", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    card = (directory / "README.md").read_text()
    assert "select_topk: 0.5" in card
    assert "mistral" in card
    assert str(models["mistral"].parent) not in card, "paths of this machine are not published"


def test_merged_weights_are_sce_of_the_targets(finished: Path, models: dict[str, Path]) -> None:
    """Against a naive SCE: no NumPy tricks, one element at a time."""
    work = finished / "work"
    paths = [models["llama"], work / "fuse" / "mistral" / "model", work / "fuse" / "gemma" / "model"]
    pivot, *targets = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in paths)
    fused = AutoModelForCausalLM.from_pretrained(work / "merge" / "model").state_dict()
    name = "model.layers.0.self_attn.k_proj.weight"
    deltas = [(target[name] - pivot[name]).flatten().tolist() for target in targets]
    variances = [((a - b) / 2) ** 2 for a, b in zip(*deltas, strict=True)]
    keep = int(0.5 * sum(v != 0 for v in variances))
    kept = set(sorted(range(len(variances)), key=lambda i: (-variances[i], i))[:keep])
    squares = [sum(delta[i] ** 2 for i in kept) for delta in deltas]
    eta = [square / sum(squares) for square in squares]
    base = pivot[name].flatten().tolist()
    for i, value in enumerate(fused[name].flatten().tolist()):
        expected = base[i]
        if i in kept:
            positive = deltas[0][i] + deltas[1][i] >= 0
            left = [j for j in (0, 1) if (deltas[j][i] >= 0) == positive and deltas[j][i] != 0]
            if left:
                expected += sum(eta[j] * deltas[j][i] for j in left) / sum(eta[j] for j in left)
        assert value == pytest.approx(expected, abs=2e-6)


def test_results_are_bits_per_byte_by_a_naive_loop(finished: Path) -> None:
    results = json.loads((finished / "work" / "evaluate" / "results.json").read_text())["scores"]
    assert {score["role"] for score in results} == {"pivot", "source", "target", "fused"}
    directory = finished / "work" / "merge" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    nll, size = 0.0, 0
    for line in (finished / "held-out.jsonl").read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
                begin = len(tokenizer(before, add_special_tokens=False)["input_ids"])
                ids = tokenizer(before + message["content"], add_special_tokens=False)["input_ids"]
                with torch.inference_mode():
                    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                nll -= sum(float(logprobs[at - 1, ids[at]]) for at in range(begin, len(ids)))
                size += len(message["content"].encode())
    (fused,) = (score for score in results if score["role"] == "fused" and score["data"] == "data-held-out")
    assert fused["bytes"] == size
    assert fused["value"] == pytest.approx(nll / size / math.log(2), rel=1e-4)


def test_fine_tuning_taught_something(finished: Path) -> None:
    """The random pivot knows nothing; a target that did not learn its own data would show a broken loss."""
    scores = json.loads((finished / "work" / "evaluate" / "results.json").read_text())["scores"]
    taught = {"mistral": "data-held-out", "gemma": "gemma-held-out"}
    for score in scores:
        if score["role"] == "target" and score["data"] == taught[score["model"]]:
            assert score["difference_to_pivot"] < -0.5


def test_a_changed_setting_redoes_what_rests_on_it(finished: Path) -> None:
    def states(*changes: str) -> dict[str, str]:
        steps = build_steps(load_recipe(finished / "recipe.yaml", list(changes)), finished / "work")
        return {step.label: step.state()[0] for step in steps}

    assert set(states().values()) == {"done"}
    changed = states("merge.select_topk=0.2")
    assert {label for label, state in changed.items() if state == "stale"} == {
        "merge",
        "evaluate answers fused",
        "evaluate fused",
        "evaluate results",
        "report",
    }
    changed = states("sources.gemma.capture.top_k=3")
    assert changed["capture mistral/data"] == changed["fuse mistral"] == "done"
    assert (
        changed["capture gemma/gemma"] == changed["align gemma"] == changed["fuse gemma"] == changed["merge"] == "stale"
    )


def test_another_way_to_align_makes_alignment_stale_and_nothing_before_it(finished: Path) -> None:
    for change in (
        *(
            "sequence=dtw",
            "vocabulary=exact",
            "vocabulary=edit",
            "top_1=true",
            "look_ahead=false",
            "chain_rule=true",
            "top_k=3",
        ),
        *(f"unaligned={kind}" for kind in ("label", "skip", "pivot")),
    ):
        steps = build_steps(load_recipe(finished / "recipe.yaml", [f"align.{change}"]), finished / "work")
        stale = {(step.stage, step.name) for step in steps if step.state()[0] != "done"}
        assert {stage for stage, _ in stale} == {"align", "fuse", "merge", "evaluate", "report"}, change
        assert {name for stage, name in stale if stage == "align"} == {"mistral", "gemma"}, change


def test_more_processes_make_nothing_stale_but_the_page_that_shows_the_recipe(finished: Path) -> None:
    steps = build_steps(load_recipe(finished / "recipe.yaml", ["align.processes=2"]), finished / "work")
    assert [step.label for step in steps if step.state()[0] != "done"] == ["report"]


def test_alignment_rests_on_what_the_pivot_was_captured_to_say_only_where_it_fills_gaps_with_that(
    finished: Path,
) -> None:
    for unaligned, needs in (("label", 0), ("skip", 0), ("condition", 0), ("pivot", 2)):
        steps = build_steps(load_recipe(finished / "recipe.yaml", [f"align.unaligned={unaligned}"]), finished / "work")
        aligned = [step for step in steps if step.stage == "align"]
        above = [one.label for step in aligned for one in step.upstream.values() if one.stage == "capture"]
        assert [label for label in above if "pivot" not in label] == ["capture mistral/data", "capture gemma/gemma"]
        assert len(above) - 2 == needs, unaligned


@pytest.mark.parametrize(
    "changes",
    [
        ["vocabulary=exact", "unaligned=label", "top_1=true"],
        ["vocabulary=edit", "unaligned=skip", "top_k=3"],
        ["sequence=dtw", "unaligned=pivot", "look_ahead=true", "top_k=9"],
        ["chain_rule=true", "look_ahead=false", "processes=1"],
        ["sequence=dtw", "vocabulary=edit", "chain_rule=true", "unaligned=condition"],
    ],
    ids=" ".join,
)
def test_a_recipe_sets_every_way_to_align(finished: Path, copied: Path, changes: list[str]) -> None:
    work = copied / "work"
    recipe = load_recipe(finished / "recipe.yaml", [f"align.{change}" for change in changes])
    assert run(recipe, work, until="align") == 2
    totals = {"positions_conditioned": 0, "positions_by_the_chain_rule": 0}
    for source, data in (("mistral", "data"), ("gemma", "gemma")):
        figures = json.loads((work / "align" / source / "figures.json").read_text())
        prepared = PreparedSet(work / "prepare" / "pivot" / data)
        rows = [open_distributions(work / "align" / source)[identity] for identity in prepared.ids]
        size = recipe.align.top_k or 6
        assert {each.ids.shape[1] for each in rows} == {size}
        missing = figures["positions"] - figures["positions_aligned"] - figures["positions_conditioned"]
        empty = sum(int((each.ids < 0).all(axis=1).sum()) for each in rows)
        unfilled = missing if recipe.align.unaligned == "skip" else 0
        assert empty - figures["positions_without_candidate"] == unfilled
        for key in totals:
            totals[key] += figures[key]
        assert ("seen" in figures["map_rows_by_origin"]) == (recipe.align.vocabulary == "statistics")
        assert ("edit distance" in figures["map_rows_by_origin"]) == (recipe.align.vocabulary == "edit")
    assert (totals["positions_conditioned"] > 0) == (recipe.align.unaligned == "condition")
    assert (totals["positions_by_the_chain_rule"] > 0) == recipe.align.chain_rule


def test_a_damaged_artifact_is_made_again(finished: Path, copied: Path) -> None:
    work = copied / "work"
    (work / "align" / "gemma" / "aligned.arrow").unlink()
    file = work / "merge" / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert run(load_recipe(finished / "recipe.yaml"), work) == 2
    assert runs.digests(work) == runs.digests(finished / "work")


def test_only_and_until(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = load_recipe(runs.write_recipe(tmp_path, models))
    run(recipe, tmp_path / "work", until="capture", only="gemma")
    made = {path.name for path in (tmp_path / "work" / "capture").iterdir()}
    assert made == {"pivot", "gemma"}
    assert {path.name for path in (tmp_path / "work").iterdir()} == {".lock", "recipe.yaml", "prepare", "capture"}


@pytest.mark.parametrize(
    "changes",
    [
        ["merge.method=linear", "merge.select_topk=null", "fuse.loss=jsd", "fuse.tail=bucket", "fuse.temperature=2.0"],
        ["align.top_1=true", "align.unaligned=skip", "align.top_k=3", "fuse.loss=reverse_kl", "merge.dtype=bfloat16"],
        ["fuse.loss=kl", "merge.select_deltas=false", "merge.normalize=false", "evaluate.bits_per_byte=false"],
        ["fuse.sft_weight=1.0", "fuse.training.bf16=true", "capture.dtype=bfloat16", "evaluate.dtype=bfloat16"],
    ],
)
def test_every_option_runs(copied: Path, changes: list[str]) -> None:
    work = copied / "work"
    shutil.rmtree(work / "evaluate")
    settings = [*changes, "fuse.training.num_train_epochs=1"]
    run(load_recipe(copied / "recipe.yaml", settings), work)
    model = AutoModelForCausalLM.from_pretrained(work / "merge" / "model")
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    if "merge.dtype=bfloat16" in changes:
        assert model.dtype == torch.bfloat16
    if "evaluate.bits_per_byte=false" in changes:
        assert not (work / "evaluate").exists()
        assert "Nothing was measured" in (work / "report" / "index.html").read_text()
