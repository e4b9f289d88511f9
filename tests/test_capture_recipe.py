"""What a recipe says about captures has an effect."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runs
from fusechat.commands.run import run
from fusechat.data.distributions import DistributionSet, open_distributions
from fusechat.errors import DataError
from fusechat.models import teacher_forcing
from fusechat.pipeline import load_recipe
from fusechat.run.steps import MANIFEST


def capture(copied: Path, *changes: str) -> Path:
    """Captures again with a recipe that is changed so; returns where mistral's are."""
    recipe = load_recipe(copied / "recipe.yaml", [f"capture.{change}" for change in changes])
    run(recipe, runs.cut(copied / "work", "prepare"), until="capture", only="mistral")
    return copied / "work/capture/mistral/data"


@pytest.fixture
def usual(finished: Path) -> DistributionSet:
    return open_distributions(finished / "work/capture/mistral/data")


def test_top_k(copied: Path, usual: DistributionSet) -> None:
    found = open_distributions(capture(copied, "top_k=3"))
    assert (usual.k, found.k) == (6, 3)
    for identity in usual.index:
        np.testing.assert_array_equal(found[identity].ids, usual[identity].ids[:, :3])
        # float16 as stored, and scaled to what the float32 tail leaves, which is of other tokens in each
        np.testing.assert_allclose(found[identity].logprobs, usual[identity].logprobs[:, :3], atol=2e-3)


def test_more_than_the_vocabulary_is_all_of_it(copied: Path, usual: DistributionSet) -> None:
    found = open_distributions(capture(copied, "top_k=100000"))
    rows = found[next(iter(found.index))]
    assert found.k == rows.ids.shape[1] < 1000
    assert (np.sort(rows.ids, axis=1) == np.arange(found.k)).all()
    assert rows.tail.max() < 0.01  # float16


def test_dtype(copied: Path, usual: DistributionSet) -> None:
    found = open_distributions(capture(copied, "dtype=bfloat16"))
    differences = [np.abs(found[identity].nll - usual[identity].nll) for identity in usual.index]
    assert 1e-3 < np.concatenate(differences).max() < 2, "coarser weights, the same model"


def test_batch_tokens(copied: Path, usual: DistributionSet, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    forward = teacher_forcing.forward

    def counted(model: Any, members: list[Any], compute: Any) -> Any:
        sizes.append((len(members), max(len(one.input_ids) for one in members)))
        return forward(model, members, compute)

    monkeypatch.setattr(teacher_forcing, "forward", counted)
    found = open_distributions(capture(copied, "batch_tokens=1"))
    assert {number for number, _ in sizes} == {1}
    sizes.clear()
    capture(copied, "batch_tokens=10000")
    assert [number for number, _ in sizes] == [4, 4, 2] * 2, "a shard at a time, of both models"
    for identity in usual.index:
        np.testing.assert_allclose(found[identity].nll, usual[identity].nll, atol=1e-4)


def test_shard_conversations(copied: Path, usual: DistributionSet) -> None:
    place = copied / "work/capture/mistral/data"
    assert len(list(place.glob("shard-*"))) == 3
    capture(copied, "shard_conversations=7")
    assert len(list(place.glob("shard-*"))) == 2
    found = open_distributions(place)
    assert list(found.index) == list(usual.index)
    assert json.loads((place / MANIFEST).read_text())["counts"] == {
        "conversations": 10,
        "positions": sum(len(usual[identity]) for identity in usual.index),
        "rejected_not_finite": [],
        "shards": 2,
    }


def test_rejected_conversations_are_named_in_the_order_of_the_data(
    copied: Path, usual: DistributionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, run_all = list(usual.index), teacher_forcing.TeacherForcing.run
    bad = [ids[8], ids[1], ids[5]]

    def some_not_finite(self: Any, conversations: Any, compute: Any) -> Any:
        for index, columns in run_all(self, conversations, compute):
            yield index, [column * np.nan for column in columns] if conversations[index].id in bad else columns

    monkeypatch.setattr(teacher_forcing.TeacherForcing, "run", some_not_finite)
    with pytest.raises(DataError, match=r"3 of the 10 conversations of data are left out.*its values are not finite"):
        capture(copied, "top_k=4")
    recipe = load_recipe(copied / "recipe.yaml", ["capture.top_k=4", "data.max_rejected=0.5"])
    run(recipe, copied / "work", until="capture", only="mistral")
    place = copied / "work/capture/mistral/data"
    counts = json.loads((place / MANIFEST).read_text())["counts"]
    assert counts["rejected_not_finite"] == [ids[1], ids[5], ids[8]]
    assert counts["conversations"] == 7
    assert list(open_distributions(place).index) == [identity for identity in ids if identity not in bad]
    bad += ids
    with pytest.raises(DataError, match="every conversation gave values that are not finite"):
        capture(copied, "top_k=5")
