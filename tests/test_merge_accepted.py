"""Settings of published configurations that ask for what is done anyway: the same merge as without them, or a line where the
models are not as the setting supposes."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from checkpoints import configuration, read, relative, write
from fusechat.errors import RecipeError
from fusechat.merge import merge


@pytest.fixture
def trio(models: dict[str, Path], tmp_path: Path) -> list[Path]:
    base = write(tmp_path / "base", read(models["mistral"]), models["mistral"])
    return [base, relative(base, tmp_path / "one", 1), relative(base, tmp_path / "two", 2)]


def refused(config: Any, out: Path) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        merge(config, out)
    assert not out.exists()
    return [line.replace(f"{out.parent}/", "") for line in raised.value.messages]


def test_they_change_nothing(trio: list[Path], tmp_path: Path) -> None:
    plain = configuration("ties", trio, {"weight": 0.5, "density": 0.5})
    merge(plain, tmp_path / "plain")
    expected = (tmp_path / "plain" / "model.safetensors").read_bytes()
    forms: list[dict[str, Any]] = [
        {"tokenizer_source": "base"},
        {"tokenizer_source": str(trio[0])},
        {"tokenizer": {"source": "base"}},
        {"chat_template": "auto"},
        {"normalize": True},
        {"lambda": 1, "int8_mask": True, "rescale": False},
    ]
    for number, form in enumerate(forms):
        report = merge(plain | form, tmp_path / str(number))
        assert (tmp_path / str(number) / "model.safetensors").read_bytes() == expected, form
        card = (tmp_path / str(number) / "README.md").read_text()
        assert report["method"] == "ties"
        assert next(iter(form)) in card, "the configuration is shown as given"


def test_anchors_under_a_key_of_their_own(trio: list[Path], tmp_path: Path) -> None:
    merge(
        configuration("ties", trio, own=[{"weight": 0.5, "density": 0.5}, {"weight": 0.2, "density": 0.5}]),
        tmp_path / "plain",
    )
    head = f"merge_method: ties\nbase_model: {trio[0]}\n"
    for number, text in enumerate(
        (
            f"x: &w {{weight: 0.5, density: 0.5}}\n{head}models:\n  - {{model: {trio[1]}, parameters: *w}}\n"
            f"  - {{model: {trio[2]}, parameters: {{<<: *w, weight: 0.2}}}}\n",
            f"kept: [&half 0.5, &little 0.2]\n{head}models:\n  - {{model: {trio[1]}, parameters: {{weight: *half}}}}\n"
            f"  - {{model: {trio[2]}, parameters: {{weight: *little}}}}\nparameters: {{density: *half}}\n",
        )
    ):
        (tmp_path / "merge.yaml").write_text(text)
        merge(tmp_path / "merge.yaml", tmp_path / str(number))
        assert all(torch.equal(t, read(tmp_path / str(number))[n]) for n, t in read(tmp_path / "plain").items())


def test_one_slice_over_all_layers_is_the_models(trio: list[Path], tmp_path: Path) -> None:
    """As the most published configurations of SLERP have it."""
    t = [{"filter": "self_attn", "value": [0, 1]}, {"value": 0.5}]
    merge(configuration("slerp", trio[:2], {"t": t}), tmp_path / "plain")
    plain = read(tmp_path / "plain")

    def sliced(*ranges: list[int], **more: Any) -> dict[str, Any]:
        sources = [{"model": str(path), "layer_range": found} for path, found in zip(trio[:2], ranges, strict=True)]
        return {"slices": [{"sources": sources, **more}], "merge_method": "slerp", "base_model": str(trio[0])}

    merge({**sliced([0, 2], [0, 2]), "parameters": {"t": t}}, tmp_path / "sliced")
    merge({**sliced([0, 2], [0, 2], parameters={"t": t}), "parameters": {"t": 0}}, tmp_path / "own")
    for name, tensor in plain.items():
        assert torch.equal(read(tmp_path / "sliced")[name], tensor)
        assert torch.equal(read(tmp_path / "own")[name], tensor), "a slice's own parameters come first"
    why = "putting a model together from layers of others is not supported: list whole models under models"
    for config in (sliced([0, 1], [0, 2]), sliced([1, 2], [1, 2]), sliced([0, 2], [0, 2], residual_weight=1)):
        assert refused({**config, "parameters": {"t": t}}, tmp_path / "out") == [f"merge: slices: {why}"]
    found = refused({**sliced([0, 1], [0, 1]), "parameters": {"t": t}}, tmp_path / "out")
    assert found == [f"merge: slices: {name} has 2 layers, and these are 1: {why}" for name in ("base", "one")]


def test_what_the_models_do_not_bear_out_is_refused(trio: list[Path], tmp_path: Path) -> None:
    base, one, _ = trio
    tokenizer = json.loads((one / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] = "<other>"
    (one / "tokenizer.json").write_text(json.dumps(tokenizer))
    [line] = refused(
        {**configuration("task_arithmetic", trio, {"weight": 1}), "tokenizer_source": "base"}, tmp_path / "out"
    )
    assert line.startswith("merge: tokenizer_source: one: 1 ids are other tokens' than in base (")
    for path, template in ((one, "{{ other }}"), (base, "{{ messages }}")):
        (path / "chat_template.jinja").write_text(template)
    file = tmp_path / "merge.yaml"
    file.write_text(
        yaml.safe_dump({**configuration("task_arithmetic", [base, one], {"weight": 1}), "chat_template": "auto"})
    )
    [line] = refused(file, tmp_path / "out")
    what = "chat_template: one has another than base: leave it out to keep the latter's"
    assert line.startswith("merge.yaml:")
    assert line.endswith(what)


def test_a_model_listed_twice_counts_twice_where_weights_are_summed(
    trio: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("fusechat"), "propagate", True)
    _, one, two = trio
    models = [one, two, Path(f"{one.parent}/./{one.name}/")]
    own = [{"weight": weight} for weight in (1, 1, 2)]
    config = {**configuration("linear", [one, *models], own=own), "base_model": None}
    report = merge(config, tmp_path / "out")
    assert caplog.messages[0] == f"merge: models.2.model: {one} is listed twice, and the weights of both count"
    assert report["targets"] == ["one", "one (2)", "two"]
    found, first, second = (read(path) for path in (tmp_path / "out", one, two))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (3 * first[name] + second[name]) / 4)
