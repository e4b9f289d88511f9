"""What alignment finds in a work directory that does not fit together: status 2 and a line that names the model and the
conversation. And models whose tokenizers do not fit, or just do."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import normalizers

import runs
import tiny
from fusechat.align import token_spans
from fusechat.align.aligner import Pair, Side, Strategy
from fusechat.align.check import check_conversation
from fusechat.commands.run import run
from fusechat.data.conversations import Conversation, Message
from fusechat.data.distributions import SparseDistribution, open_distributions, write_shard
from fusechat.data.prepared import FILE, Prepared, PreparedSet, write_prepared
from fusechat.errors import ModelError
from fusechat.models.spans import encode_with_spans
from fusechat.models.templates import ChatTemplate
from fusechat.models.token_bytes import token_bytes
from fusechat.models.tokenise import prepare_conversation
from fusechat.pipeline import build_steps, load_recipe
from fusechat.run.files import digest_json
from fusechat.run.integrity import write_checked
from fusechat.run.steps import MANIFEST
from test_bad_input import complaints

VICTIM = 3  # the conversation that is tampered with, by its place
PIVOT, SOURCE = "prepare/pivot/data", "prepare/mistral/data"
CAPTURE = "capture/mistral/data"


@pytest.fixture
def work(copied: Path) -> Path:
    """A work directory in which all is done up to the alignment."""
    return runs.cut(copied / "work", "capture")


def vouch(step: Path) -> None:
    """Makes the manifest of a step, and those of the steps that depend on it, say that its files are as they should be."""
    manifest = json.loads((step / MANIFEST).read_text())
    manifest["outputs"] = {}
    for file in step.iterdir():
        if file.name != MANIFEST:
            data = file.read_bytes()
            manifest["outputs"][file.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_checked(step / MANIFEST, manifest)
    above = step.parents[2] / "capture" / step.parent.name / step.name / MANIFEST
    if step.parents[1].name == "prepare":
        captured = json.loads(above.read_text())
        captured["built_from"] = {"prepare": digest_json(manifest["outputs"])}
        write_checked(above, captured)
    if step.parents[1].name == "prepare" and step.parent.name == "pivot":  # sources prepare what the pivot can use
        for other in step.parents[1].glob(f"*/{step.name}/{MANIFEST}"):
            if other.parents[1].name != "pivot":
                prepared = json.loads(other.read_text())
                prepared["built_from"] = {"pivot": digest_json(manifest["outputs"])}
                write_checked(other, prepared)


def tamper_prepared(work: Path, name: str, change: Callable[[Prepared], Prepared]) -> str:
    """Changes one prepared conversation; returns its id."""
    rows = list(PreparedSet(work / name))
    rows[VICTIM] = change(rows[VICTIM])
    write_prepared(work / name / FILE, rows)
    vouch(work / name)
    return rows[VICTIM].id


def tamper_captured(work: Path, change: Callable[[SparseDistribution], SparseDistribution]) -> str:
    """Changes the distributions of one conversation; returns its id."""
    victim = PreparedSet(work / SOURCE).ids[VICTIM]
    store = open_distributions(work / CAPTURE)
    everything = {identity: store[identity] for identity in store.index}
    everything[victim] = change(everything[victim])
    rewrite(work / CAPTURE, everything)
    return victim


def rewrite(capture: Path, rows: dict[str, SparseDistribution]) -> None:
    """Puts other distributions into a finished capture, under a name that is theirs."""
    for shard in capture.glob("shard-*.arrow"):
        shard.unlink()
    write_shard(capture, 0, rows.items(), vocabulary=1 << 20)
    vouch(capture)


def complaint(finished: Path, work: Path) -> str:
    """The one line with which alignment ends. Nothing before it is done again."""
    recipe = finished / "recipe.yaml"
    steps = build_steps(load_recipe(recipe), work)
    states = {step.label: step.state() for step in steps if step.stage in ("prepare", "capture")}
    assert all(states[name.replace("/", " ", 1)] == ("done", "") for name in (PIVOT, SOURCE, CAPTURE)), states
    [line] = complaints("run", recipe, "--workdir", work, "--until", "align", "--only", "mistral")
    assert not (work / "align" / "mistral" / MANIFEST).exists()
    return line


def changed(array: np.ndarray, at: Any, value: int) -> np.ndarray:
    copy = np.array(array)
    copy[at] = value
    return copy


def test_an_unharmed_copy_aligns(finished: Path, work: Path) -> None:
    """What the other tests do to the files is what makes them fail."""
    tamper_prepared(work, SOURCE, lambda rows: rows)
    tamper_captured(work, lambda rows: rows)
    assert run(load_recipe(finished / "recipe.yaml"), work, until="align", only="mistral") == 1


@pytest.mark.parametrize("name", [PIVOT, SOURCE])
def test_a_prepared_token_past_the_vocabulary(finished: Path, work: Path, models: dict[str, Path], name: str) -> None:
    kind = "llama" if name == PIVOT else "mistral"
    size = json.loads((models[kind] / "config.json").read_text())["vocab_size"]
    victim = tamper_prepared(
        work, name, lambda rows: replace(rows, input_ids=changed(rows.input_ids, rows.position[0], size))
    )
    line = complaint(finished, work)
    assert line.startswith(f"{name.split('/')[1]} ({models[kind]}): conversation {victim}")
    assert f"token {size}, past the model's vocabulary of {size} tokens" in line


def test_a_captured_token_past_the_vocabulary(finished: Path, work: Path, models: dict[str, Path]) -> None:
    victim = tamper_captured(work, lambda rows: replace(rows, ids=changed(rows.ids, (2, 1), 123456)))
    line = complaint(finished, work)
    assert line.startswith(f"mistral ({models['mistral']}): conversation {victim}")
    assert "distributions hold token 123456, past the model's vocabulary" in line


@pytest.mark.parametrize("cut", [slice(1, None), slice(0, 0)], ids=["one less", "none"])
def test_distributions_that_were_captured_from_another_text(
    finished: Path, work: Path, models: dict[str, Path], cut: slice
) -> None:
    victim = tamper_captured(work, lambda rows: SparseDistribution(rows.ids[cut], rows.logprobs[cut], rows.nll[cut]))
    line = complaint(finished, work)
    assert line.startswith(f"mistral ({models['mistral']}): conversation {victim}")
    assert "they were captured from another text" in line


def test_distributions_without_the_gold_tokens_nll(finished: Path, work: Path) -> None:
    victim = tamper_captured(work, lambda rows: replace(rows, nll=rows.nll[:0]))
    line = complaint(finished, work)
    assert "mistral" in line
    assert victim in line


@pytest.mark.parametrize("name", [PIVOT, SOURCE])
def test_two_texts_under_one_id(finished: Path, work: Path, tokenizers: dict[str, Any], name: str) -> None:
    """One token in the middle of a response is another of as many bytes."""
    tokenizer = tokenizers["llama" if name == PIVOT else "mistral"]
    digits = {tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"} - {tokenizer.unk_token_id}

    def other_digit(rows: Prepared) -> Prepared:
        at = next(int(p) for p in rows.position[2:] if int(rows.input_ids[p]) in digits)
        return replace(rows, input_ids=changed(rows.input_ids, at, min(digits - {int(rows.input_ids[at])})))

    victim = tamper_prepared(work, name, other_digit)
    line = complaint(finished, work)
    assert line.count("pivot (") == line.count("mistral (") == 1
    assert f"the texts of conversation {victim} differ" in line


@pytest.mark.parametrize(
    "answer", ["Nothing of the kind.", "The answer is 7", "The answer is 7, größer als 3. 🙂 Or is it?"]
)
def test_a_pivot_with_another_answer_under_the_id(
    finished: Path, work: Path, tokenizers: dict[str, Any], answer: str
) -> None:
    """Of another text, a shorter one, a longer one; the answer is `The answer is 7, größer als 3. 🙂`."""
    messages = (Message("user", "What is 3 + 4?"), Message("assistant", answer))
    template = ChatTemplate(tokenizers["llama"], None, "llama")
    other, _ = prepare_conversation(Conversation(messages, "here"), template, max_length=256)
    victim = tamper_prepared(work, PIVOT, lambda rows: replace(other, id=rows.id))
    assert f"the texts of conversation {victim} differ" in complaint(finished, work)


@pytest.mark.parametrize(
    ("kind", "normalizer", "answer"),
    [
        ("mistral", None, "the"),  # a dummy prefix on the only token
        ("mistral", None, "12 </s>the"),  # on the last one
        ("mistral", None, "  the capital\u3000\n"),
        ("llama", normalizers.NFC(), "the \uf900 capital"),  # one ideograph becomes another
        ("llama", normalizers.Lowercase(), "The Capital"),
        ("gemma", None, "the\x00\x00"),
        ("gemma", normalizers.Replace("\x00", ""), "the\x00\x00"),
    ],
)
def test_a_tokenizer_that_changes_the_text_still_has_the_same_text(kind: str, normalizer: Any, answer: str) -> None:
    """Of a template that strips answers, and puts them right after an added token."""
    sides, rows = [], []
    for each in ("llama", kind):
        tokenizer = tiny.tokenizer_of(each)
        if normalizer is not None and len(rows):
            steps = [step for step in (tokenizer.backend_tokenizer.normalizer, normalizer) if step is not None]
            tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
        ending = "{{ message['content'] + eos_token }}" if not rows else "{{ message['content'] | trim + eos_token }}"
        template = "{% for message in messages %}{{ eos_token }}" + ending + "{% endfor %}"
        chat = ChatTemplate(tokenizer, template, each)
        messages = (Message("user", "Say it."), Message("assistant", answer))
        rows.append(prepare_conversation(Conversation(messages, "here"), chat, max_length=256)[0])
        sides.append(Side.of(token_bytes(tokenizer), chat.end_of_turn))
    pair = Pair(*sides, Strategy())
    for one, other, sides_of in ((*rows, pair), (*reversed(rows), Pair(*reversed(sides), Strategy()))):
        check_conversation(one, other, None, pair=sides_of, names=("one", "other"), sizes=(10_000, 10_000))


@pytest.mark.parametrize("name", [PIVOT, SOURCE])
def test_a_conversation_without_response_tokens(finished: Path, work: Path, models: dict[str, Path], name: str) -> None:
    def without(rows: Prepared) -> Prepared:
        names = ("position", "response", "begin", "end", "end_of_turn")
        return replace(rows, **{each: getattr(rows, each)[:0] for each in names})

    victim = tamper_prepared(work, name, without)
    line = complaint(finished, work)
    assert line.startswith(f"{name.split('/')[1]} ({models['llama' if name == PIVOT else 'mistral']})")
    assert f"conversation {victim} has no response tokens" in line


def test_the_line_is_the_same_from_another_process(finished: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusechat.align.blocks import Blocks

    victim = tamper_captured(work, lambda rows: replace(rows, ids=changed(rows.ids, (2, 1), 123456)))
    line = complaint(finished, work)
    monkeypatch.setitem(Blocks.__init__.__kwdefaults__, "size", 3)
    arguments = ("run", finished / "recipe.yaml", "--workdir", work, "--until", "align", "--only", "mistral")
    assert complaints(*arguments, "--set", "align.processes=2") == [line]
    assert victim in line


# -- damaged files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"{SOURCE}/{FILE}", f"{CAPTURE}/shard-00000-*.arrow"])
def test_a_truncated_file_is_made_again(finished: Path, work: Path, name: str) -> None:
    recipe = load_recipe(finished / "recipe.yaml")
    assert run(recipe, work, until="align", only="mistral") == 1
    before = runs.digests(work)
    (file,) = work.glob(name)
    file.write_bytes(file.read_bytes()[:-100])
    assert run(recipe, work, until="align", only="mistral") == 1, "only that step"
    assert runs.digests(work) == before


@pytest.mark.parametrize("name", [f"{SOURCE}/{FILE}", f"{CAPTURE}/shard-00000-*.arrow"])
@pytest.mark.parametrize("end", [b"", bytes(200)], ids=["cut short", "end of zeros"])
def test_a_damaged_file_of_the_size_that_was_written(finished: Path, work: Path, name: str, end: bytes) -> None:
    (file,) = work.glob(name)
    file.write_bytes(file.read_bytes()[:-200] + end)
    vouch(file.parent)
    assert str(file) in complaint(finished, work)


# -- tokenizers ---------------------------------------------------------------------------------------------------------


def test_a_slow_tokenizer_has_no_spans() -> None:
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer()
    for spans in (token_spans, encode_with_spans):
        with pytest.raises(ModelError, match=r"ByT5Tokenizer: a slow tokenizer has no spans") as raised:
            spans(slow, "a text")
        assert len(raised.value.messages) == 1


@pytest.mark.parametrize("role", ["pivot", "mistral"])
def test_a_model_with_a_slow_tokenizer_is_refused(tmp_path: Path, models: dict[str, Path], role: str) -> None:
    from transformers import ByT5Tokenizer

    kind = "llama" if role == "pivot" else role
    slow = Path(shutil.copytree(models[kind], tmp_path / "slow", ignore=shutil.ignore_patterns("*token*")))
    ByT5Tokenizer().save_pretrained(slow)
    recipe = runs.write_recipe(tmp_path, models | {kind: slow})
    [line] = complaints("run", recipe, "--workdir", tmp_path / "work", "--until", "align")
    assert str(slow) in line
    assert "slow tokenizer" in line


def test_tokens_that_only_a_padded_model_has_go_to_the_tail(
    finished: Path, work: Path, tokenizers: dict[str, Any]
) -> None:
    """In one conversation nothing else is likely."""
    size = len(tokenizers["mistral"])
    padding = np.arange(size, size + 6)
    assert len(padding) <= tiny.PADDED
    victim = tamper_captured(work, lambda rows: replace(rows, ids=np.broadcast_to(padding, rows.ids.shape)))
    recipe = load_recipe(finished / "recipe.yaml", ["align.unaligned=skip"])
    assert run(recipe, work, until="align", only="mistral") == 1
    aligned = open_distributions(work / "align" / "mistral")
    filled = {identity: int((aligned[identity].ids >= 0).sum()) for identity in aligned.index}
    assert filled.pop(victim) == 0
    assert min(filled.values()) > 0
    assert all(aligned[identity].ids.max() < len(tokenizers["llama"]) for identity in aligned.index)
    figures = json.loads((work / "align" / "mistral" / "figures.json").read_text())
    assert figures["mass_by_origin"]["tail"] > 0.02
