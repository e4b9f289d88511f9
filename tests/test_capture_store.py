"""The store of a capture: its format, its size, and damage that is found and mended, a shard at a time."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import runs
from fusechat.commands.run import run
from fusechat.data.distributions import (
    SHARDS,
    SparseDistribution,
    open_distributions,
    write_distributions,
    write_shard,
    write_store,
)
from fusechat.data.prepared import PreparedSet
from fusechat.errors import WorkdirError
from fusechat.pipeline import build_steps, load_recipe
from fusechat.run.integrity import write_checked
from fusechat.run.steps import MANIFEST, STARTED, Step

CAPTURE = "capture/mistral/data"


@pytest.fixture
def work(copied: Path) -> Path:
    """A work directory with captures: of mistral three shards."""
    return runs.cut(copied / "work", "capture")


def again(finished: Path, work: Path) -> int:
    return run(load_recipe(finished / "recipe.yaml"), work, until="capture", only="mistral")


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("shard-*"))


def random_rows(random: np.random.Generator, n: int, k: int, size: int) -> SparseDistribution:
    ids = np.stack([random.choice(size, k, replace=False) for _ in range(n)]).astype(np.int32)
    logprobs = -np.sort(random.exponential(5, (n, k)), axis=1).astype(np.float32)
    return SparseDistribution(ids, logprobs, random.exponential(1, n).astype(np.float32))


# -- format -------------------------------------------------------------------------------------------------------------


def test_a_store_read_by_its_specification_alone(work: Path) -> None:
    """With nothing of FuseChat but the prepared conversations."""
    directory = work / CAPTURE
    store = json.loads((directory / "store.json").read_text())
    assert store == {"format": 3, "k": 6, "files": "shard-*.arrow"}
    prepared = PreparedSet(work / "prepare/mistral/data")
    ids: list[str] = []
    for number, path in enumerate(shards(directory)):
        assert path.name == f"shard-{number:05d}-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.arrow"
        table = pa.ipc.open_file(pa.OSFile(str(path))).read_all()
        assert [(field.name, str(field.type).split("<")[0]) for field in table.schema] == [
            ("id", "string"),
            ("ids", "list"),
            ("logprobs", "list"),
            ("nll", "list"),
            ("tail", "list"),
        ]
        kinds = [table.schema.field(name).type.value_type for name in ("ids", "logprobs", "nll", "tail")]
        assert kinds == [pa.uint16(), pa.float16(), pa.float32(), pa.float32()]
        for record in table.to_pylist():
            n = len(record["nll"])
            assert n == len(prepared[prepared.row_of[record["id"]]])
            tokens, logprobs = (np.array(record[name]).reshape(n, 6) for name in ("ids", "logprobs"))
            assert (np.diff(logprobs, axis=1) <= 0).all()
            assert all(len(set(row)) == 6 for row in tokens.tolist())
            ours = open_distributions(directory)[record["id"]]
            assert (ours.ids.dtype, ours.tail.dtype) == (np.int32, np.float32)
            np.testing.assert_array_equal(ours.ids, tokens)
            np.testing.assert_array_equal(ours.tail, np.array(record["tail"], np.float32))
            kept = np.exp(logprobs.astype(np.float64))
            scaled = kept / kept.sum(axis=1, keepdims=True) * (1 - ours.tail.astype(np.float64))[:, None]
            np.testing.assert_allclose(ours.probabilities, scaled, rtol=1e-12)
            ids.append(record["id"])
    assert ids == prepared.ids
    assert {path.name for path in directory.iterdir()} == {
        *(MANIFEST, "store.json"),
        *(path.name for path in shards(directory)),
    }


@pytest.mark.parametrize(("size", "kind"), [(65_536, pa.uint16()), (65_537, pa.int32())])
def test_ids_take_two_bytes_where_the_vocabulary_lets_them(tmp_path: Path, size: int, kind: pa.DataType) -> None:
    rows = random_rows(np.random.default_rng(0), 5, 3, size)
    rows.ids[0, 0] = size - 1
    path = write_shard(tmp_path, 3, [("a", rows)], vocabulary=size)
    write_store(tmp_path, k=3, files=SHARDS)
    assert pa.ipc.open_file(pa.OSFile(str(path))).schema.field("ids").type.value_type == kind
    found = open_distributions(tmp_path)["a"]
    assert found.ids.dtype == np.int32
    np.testing.assert_array_equal(found.ids, rows.ids)


def test_an_id_that_the_model_does_not_know_is_not_stored_as_another(tmp_path: Path) -> None:
    rows = random_rows(np.random.default_rng(0), 5, 3, 1000)
    for wrong in (-1, 65_536):
        rows.ids[2, 1] = wrong
        with pytest.raises(pa.ArrowInvalid):
            write_shard(tmp_path, 0, [("a", rows)], vocabulary=1000)
    assert list(tmp_path.iterdir()) == []


def test_targets_keep_pads(tmp_path: Path) -> None:
    rows = random_rows(np.random.default_rng(0), 4, 3, 1000)
    rows.ids[1:, 2] = -1
    rows.logprobs[1:, 2] = -np.inf
    write_distributions(tmp_path / "aligned.arrow", [("a", rows)])
    write_store(tmp_path, k=3, files="aligned.arrow")
    np.testing.assert_array_equal(open_distributions(tmp_path)["a"].ids, rows.ids)


@pytest.mark.parametrize(
    ("size", "k", "most"), [(49_152, 10, 51), (49_152, 50, 212), (262_144, 10, 71), (262_144, 50, 312)]
)
def test_bytes_on_the_disk(tmp_path: Path, size: int, k: int, most: float) -> None:
    """Everything in the directory counted, of 600 conversations with 20 to 200 rows: at most 72 at k = 10, 320 at 50."""
    random = np.random.default_rng(0)
    lengths = random.integers(20, 200, 600)
    rows = random_rows(random, 200, k, size)

    def work(directory: Path) -> dict[str, Any]:
        write_store(directory, k=k, files=SHARDS)
        for shard, begin in enumerate(range(0, 600, 256)):
            members = range(begin, min(begin + 256, 600))
            records = [(f"{index:020x}", rows.take(np.arange(lengths[index]))) for index in members]
            write_shard(directory, shard, records, vocabulary=size)
        return {}

    Step("capture", "x", tmp_path / "x", {}, work).run()
    assert sum(file.stat().st_size for file in (tmp_path / "x").iterdir()) / lengths.sum() <= most


# -- tails --------------------------------------------------------------------------------------------------------------


def test_the_tail_is_the_models_and_not_what_rounding_makes_of_it(work: Path, models: dict[str, Path]) -> None:
    """By Transformers, in float64: far below what the float16 log-probabilities resolve."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models["mistral"], dtype="float32")
    prepared, store = PreparedSet(work / "prepare/mistral/data"), open_distributions(work / CAPTURE)
    for conversation in list(prepared)[:6]:
        with torch.no_grad():
            logits = model(torch.from_numpy(conversation.input_ids.astype(np.int64))[None]).logits[0]
        exact = logits[conversation.position - 1].double().softmax(dim=1).numpy()
        rows = store[conversation.id]
        np.put_along_axis(exact, rows.ids.astype(np.int64), 0.0, axis=1)
        np.testing.assert_allclose(rows.tail, exact.sum(axis=1), rtol=2e-5)
        np.testing.assert_allclose(rows.probabilities.sum(axis=1) + rows.tail, 1.0, atol=1e-6)


def as_format_2(directory: Path) -> None:
    """Makes a finished capture what an earlier version left: without tails."""
    for path in shards(directory):
        table = pa.ipc.open_file(pa.OSFile(str(path))).read_all().drop_columns(["tail"])
        path.unlink()
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
        path.rename(path.with_name(f"{path.name[:12]}{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.arrow"))
    write_store(directory, k=6, files=SHARDS, store_format=2)
    outputs = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in (*shards(directory), directory / "store.json")
    }
    write_checked(directory / MANIFEST, json.loads((directory / MANIFEST).read_text()) | {"outputs": outputs})


def test_an_older_capture_stays_done_and_is_gone_on_with_in_its_format(finished: Path, work: Path) -> None:
    directory = work / CAPTURE
    today = open_distributions(directory)
    as_format_2(directory)
    assert again(finished, work) == 0
    before = runs.digests(work)
    unfinish(directory)
    shards(directory)[1].unlink()
    assert again(finished, work) == 1
    assert runs.digests(work) == before
    found = open_distributions(directory)
    assert (today.has_tails, found.has_tails) == (True, False)
    assert list(found.index) == list(today.index)
    both = open_distributions(directory, finished / "work" / CAPTURE)  # several sets of one model, of two formats
    assert not both.has_tails
    for identity in found.index:
        np.testing.assert_array_equal(both[identity].tail, found[identity].tail)
        np.testing.assert_allclose(found[identity].tail, today[identity].tail, atol=2e-3)


def test_of_older_stores_a_tail_that_may_be_rounding_is_none(tmp_path: Path) -> None:
    probabilities = np.array([[0.7, 0.2995], [0.7, 0.25], [0.7, 0.3004]])
    rows = SparseDistribution(np.array([[3, 5]] * 3, np.int32), np.log(probabilities), np.zeros(3, np.float32))
    write_distributions(tmp_path / "all.arrow", [("a", rows)], store_format=2)
    write_store(tmp_path, k=2, files="all.arrow", store_format=2)
    found = open_distributions(tmp_path)["a"]
    assert found.tail == pytest.approx([0.0, 0.05, 0.0], abs=5e-4)
    assert found.tail[[0, 2]].tolist() == [0.0, 0.0]
    assert found.probabilities.sum(axis=1) + found.tail == pytest.approx([1.0] * 3, abs=1e-9)


def test_a_tail_of_nearly_everything_keeps_what_was_kept(tmp_path: Path) -> None:
    rows = SparseDistribution(
        np.array([[3, -1]], np.int32), np.log([[1e-9, 1.0]]), np.zeros(0, np.float32), np.array([1 - 1e-9])
    )
    rows.logprobs[:, 1] = -np.inf
    write_distributions(tmp_path / "all.arrow", [("a", rows)])
    write_store(tmp_path, k=2, files="all.arrow")
    assert open_distributions(tmp_path)["a"].probabilities[0] == pytest.approx([1e-9, 0.0], rel=0.02)


# -- damage -------------------------------------------------------------------------------------------------------------


def altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def renamed(path: Path) -> None:
    path.rename(path.with_name(path.name[:12] + "0123456789abcdef.arrow"))


DAMAGE = [altered, truncated, empty, renamed]


def unfinish(directory: Path) -> None:
    """As a kill leaves it: begun, without a manifest."""
    manifest = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).unlink()
    (directory / STARTED).write_text(json.dumps({"fingerprint": manifest["fingerprint"]}))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_that_goes_on_takes_no_shard_on_trust(
    finished: Path, work: Path, heard: list[str], damage: Callable[[Path], None]
) -> None:
    directory = work / CAPTURE
    before = runs.digests(work)
    first, second, third = shards(directory)
    kept = {path: path.stat().st_mtime_ns for path in (first, third)}
    unfinish(directory)
    damage(second)
    assert again(finished, work) == 1
    assert runs.digests(work) == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "the others are left as they are"
    (line,) = [line for line in heard if "prepare" not in line]
    assert "shard-00001-" in line
    assert str(directory) in line


def test_a_shard_that_is_there_twice(finished: Path, work: Path, heard: list[str]) -> None:
    before = runs.digests(work)
    directory = work / CAPTURE
    unfinish(directory)
    twice = directory / "shard-00001-ffffffffffffffff.arrow"
    twice.write_bytes(b"something else")
    assert again(finished, work) == 1
    assert runs.digests(work) == before
    assert [str(twice) in line for line in heard if "prepare" not in line] == [True]


@pytest.mark.parametrize("damage", DAMAGE)
def test_of_a_finished_capture_one_damaged_shard_is_captured_again_alone(
    finished: Path, work: Path, damage: Callable[[Path], None]
) -> None:
    directory = work / CAPTURE
    before = runs.digests(work)
    first, second, third = shards(directory)
    kept = {path: path.stat().st_mtime_ns for path in (first, third)}
    damage(second)
    assert again(finished, work) == 1
    assert runs.digests(work) == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_store_file_that_is_gone_is_written_again(finished: Path, work: Path) -> None:
    before = runs.digests(work)
    kept = {path: path.stat().st_mtime_ns for path in shards(work / CAPTURE)}
    (work / CAPTURE / "store.json").unlink()
    assert again(finished, work) == 1
    assert runs.digests(work) == before
    assert {path: path.stat().st_mtime_ns for path in shards(work / CAPTURE)} == kept


def test_a_bit_that_rots_unseen_is_found_by_who_reads_it_and_mended_by_the_next_run(finished: Path, work: Path) -> None:
    """Neither size nor times say anything; the shard's name does."""
    directory = work / CAPTURE
    assert again(finished, work) == 0
    before = runs.digests(work)
    victim = shards(directory)[1]
    stat = victim.stat()
    altered(victim)
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    open_distributions(directory, verify=False)
    with pytest.raises(WorkdirError) as raised:
        open_distributions(directory)
    (line,) = raised.value.messages
    assert line.startswith(f"{victim}: is damaged")
    assert "run again" in line
    states = {step.label: step.state()[0] for step in build_steps(load_recipe(finished / "recipe.yaml"), work)}
    assert states["capture mistral/data"] == "damaged"
    assert again(finished, work) == 1
    assert runs.digests(work) == before


def test_captures_of_the_first_format_are_made_again(finished: Path, work: Path) -> None:
    before = runs.digests(work)
    manifest = json.loads((work / CAPTURE / MANIFEST).read_text())
    manifest["inputs"]["format"] = 1
    write_checked(work / CAPTURE / MANIFEST, manifest | {"fingerprint": "0" * 64})
    first = shards(work / CAPTURE)[0]
    first.rename(first.with_name("shard-00000.arrow"))
    assert again(finished, work) == 1
    assert runs.digests(work) == before
