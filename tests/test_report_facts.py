"""What the report tells of models, costs and aligned text: counted from files, nothing fetched."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import tiny
from fusechat.models.facts import count_parameters, facts, front_matter
from fusechat.pipeline import build_steps, load_recipe
from fusechat.recipe.schema import PIVOT
from fusechat.report import samples
from fusechat.report.costs import stage_costs, together
from fusechat.run import units as numbers
from fusechat.run.files import write_json
from fusechat.run.steps import Step
from fusechat.show.conversation import Branch
from fusechat.show.passages import Candidate, NextTokens

# -- models -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_parameters_are_those_that_pytorch_counts(models: dict[str, Path], kind: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(models[kind])
    found = facts(models[kind])
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.architecture == type(model).__name__
    assert found.layers == 2
    assert found.vocabulary == model.get_input_embeddings().num_embeddings
    assert found.dtypes == "F32"
    assert found.bytes == sum(file.stat().st_size for file in models[kind].iterdir())
    assert found.licence is None


def test_tied_weights_that_are_stored_twice_count_once(tmp_path: Path) -> None:
    weights = {"model.embed_tokens.weight": torch.zeros(10, 4), "model.norm.weight": torch.zeros(4)}
    save_file(weights, tmp_path / "model-00001-of-00002.safetensors")
    save_file(
        {"lm_head.weight": torch.zeros(10, 4, dtype=torch.bfloat16)}, tmp_path / "model-00002-of-00002.safetensors"
    )
    assert count_parameters(tmp_path, tied=True) == (44, "F32")
    assert count_parameters(tmp_path, tied=False) == (84, "BF16, F32")


@pytest.mark.parametrize("damage", [b"", b"\xff" * 8, b"\x05\0\0\0\0\0\0\0{no", b"\x02\0\0\0\0\0\0\0[]"])
def test_of_a_file_that_cannot_be_read_nothing_is_said(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(damage)
    (tmp_path / "config.json").write_bytes(damage)
    (tmp_path / "README.md").write_bytes(b"---\n" + damage + b"\n---\n")
    found = facts(tmp_path)
    assert (found.parameters, found.architecture, found.licence) == (None, None, None)
    assert facts(None).bytes is None


def test_the_licence_is_the_cards_else_the_gguf_files(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"]})
    write_json(tmp_path / "gguf.json", {"wheel_license": "MIT", "bytes": 1})
    assert (facts(tmp_path).licence, facts(tmp_path).licence_from) == ("MIT", "wheel")
    write_json(tmp_path / "gguf.json", {"license": "gemma", "wheel_license": "MIT", "bytes": 1})
    assert (facts(tmp_path).licence, facts(tmp_path).licence_from) == ("gemma", "GGUF file")
    assert facts(tmp_path).gguf_bytes == 1
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# Model\nlicense: mit\n")
    assert (facts(tmp_path).licence, facts(tmp_path).licence_from) == ("apache-2.0", "model card")
    assert front_matter(tmp_path / "README.md") == {"license": "apache-2.0", "tags": ["a"]}
    for text in ("# no header\nlicense: mit\n", "---\n: [\n---\n", "---\n- a list\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert front_matter(tmp_path / "README.md") == {}
    assert facts(tmp_path).licence == "gemma"


# -- costs ------------------------------------------------------------------------------------------------------------------


def test_costs_are_summed_and_peaks_are_not(tmp_path: Path) -> None:
    def step(stage: str, name: str, **timings: float) -> Step:
        found = Step(stage, name, tmp_path / stage / name, {}, lambda directory: {})
        outputs = {"a": {"bytes": 10}, "b": {"bytes": 5}}
        write_json(found.directory / "manifest.json", {"timings": timings, "outputs": outputs})
        return found

    steps = [
        step("prepare", "one", seconds=1.5),
        step("prepare", "two", seconds=2.0, peak_memory_bytes=7),
        step("fuse", "one", seconds=60.0, peak_memory_bytes=9, peak_gpu_bytes=3),
        Step("merge", "", tmp_path / "absent", {}, lambda directory: {}),
    ]
    prepare, fuse = stage_costs(steps)
    assert (prepare.total.seconds, prepare.total.memory, prepare.total.gpu, prepare.total.disk) == (3.5, 7, None, 30)
    assert [cost.name for cost in prepare.steps] == ["one", "two"]
    everything = together("all", [prepare.total, fuse.total])
    assert (everything.seconds, everything.memory, everything.gpu, everything.disk) == (63.5, 9, 3, 45)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (numbers.size(0), "0 bytes"),
        (numbers.size(999), "999 bytes"),
        (numbers.size(1000), "1 kB"),
        (numbers.size(999_999), "1 MB"),
        (numbers.size(538_090_408), "538 MB"),
        (numbers.size(1_107_000_000), "1.11 GB"),
        (numbers.size(None), "–"),
        (numbers.amount(134_515_008), "135M"),
        (numbers.amount(7_241_732_096), "7.24B"),
        (numbers.duration(0.35), "0.3 s"),
        (numbers.duration(348.65), "5 min 49 s"),
        (numbers.duration(7322), "2 h 2 min"),
        (numbers.percent(0.98765), "98.77%"),
        (numbers.percent(None), "–"),
    ],
)
def test_numbers_as_a_person_reads_them(said: str, expected: str) -> None:
    assert said == expected


# -- aligned text -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def branches(finished: Path) -> dict[str, tuple[Branch, Any]]:
    """The branches of a run, by source, as the report takes them."""
    recipe = load_recipe(finished / "recipe.yaml")
    aligned = [step for step in build_steps(recipe, finished / "work") if step.stage == "align"]
    return {
        step.name: (Branch(step, recipe.chat_model(PIVOT), recipe.chat_model(step.name)), recipe.sets_of(step.name))
        for step in aligned
    }


def test_coverage_is_that_of_the_drawing(branches: dict[str, tuple[Branch, Any]]) -> None:
    for branch, data in branches.values():
        for identity, shown in zip(branch.ids, branch.shown(data, branch.ids), strict=True):
            assert branch.coverage(identity) == pytest.approx(
                shown.shared / sum(not token.lead for token in shown.tokens("pivot"))
            )


def test_samples_are_the_first_and_the_worst_and_small(
    branches: dict[str, tuple[Branch, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "TOKENS", 20)
    found = samples.samples(branches)
    assert found.keys() == branches.keys()
    for name, (branch, _) in branches.items():
        worst = min(branch.coverage(identity) or 0 for identity in branch.ids)
        assert found[name][0].coverage == worst
        assert found[name][0].why == "the lowest coverage"
        assert branch.ids[0] in [sample.conversation for sample in found[name]]
        assert len({sample.conversation for sample in found[name]}) == len(found[name]) <= samples.EACH
        for sample in found[name]:
            drawn = [passage for passage, _ in sample.passages]
            assert sample.shown == sum(len(passage.pivot) for passage in drawn) <= sample.tokens
            assert sample.shown < 40
            for passage in drawn:
                assert "".join(token.data.decode("utf-8", "ignore") for token in passage.pivot if not token.end_of_turn)
                forecasts = [token.forecast for token in (*passage.pivot, *passage.source) if token.forecast]
                assert max(len(forecast.candidates) for forecast in forecasts) == samples.CANDIDATES
                for forecast in forecasts:
                    kept = sum(candidate.probability for candidate in forecast.candidates)
                    assert not forecast.candidates or kept + (forecast.tail or 0) == pytest.approx(1, abs=0.01)
    assert samples.samples(branches) == found, "the same each time"


def test_many_sources_share_the_room(branches: dict[str, tuple[Branch, Any]]) -> None:
    one = branches["mistral"]
    found = samples.samples({f"source-{number}": one for number in range(24)})
    assert all(len(each) == 1 for each in found.values())
    assert sum(sample.shown for each in found.values() for sample in each) <= 1000


def test_a_cut_passage_ends_where_both_begin_a_token(branches: dict[str, tuple[Branch, Any]]) -> None:
    branch, data = branches["gemma"]
    (shown,) = branch.shown(data, [branch.ids[0]])
    whole = shown.passages[0]
    cut = whole.beginning(5)
    assert 5 <= len(cut.pivot) < len(whole.pivot)
    assert cut.pivot[-1].end == cut.source[-1].end == len(cut.text.encode())
    assert whole.text.startswith(cut.text)
    assert whole.beginning(len(whole.pivot)) is whole


def test_what_is_left_out_of_a_forecast_joins_its_tail() -> None:
    def candidate(token: int, probability: float, gold: bool = False) -> Candidate:
        return Candidate(token, str(token), probability, gold)

    forecast = NextTokens((candidate(1, 0.5), candidate(2, 0.2), candidate(3, 0.1, gold=True)), tail=0.2)
    short = forecast.likeliest(2)
    assert [one.id for one in short.candidates] == [1, 2]
    assert short.tail == pytest.approx(0.3)
    assert short.gold == 0.1
    assert NextTokens().likeliest(2) == NextTokens()
    assert np.isclose(forecast.likeliest(9).tail or 0, 0.2)
