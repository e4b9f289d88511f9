"""Models whose tensors fit, and whose tokenizers or configurations say that they mean something else: told, and merged."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import pre_tokenizers

from checkpoints import configuration, read, relative, write
from fusechat.merge import merge
from fusechat.merge.compatibility import vocabulary


@pytest.fixture
def pair(models: dict[str, Path], tmp_path: Path) -> list[Path]:
    base = write(tmp_path / "base", read(models["llama"]), models["llama"])
    return [base, relative(base, tmp_path / "one", 1)]


@pytest.fixture
def said(pair: list[Path], tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Merges, and returns what is said next to progress; paths without the directory that all is in."""
    monkeypatch.setattr(logging.getLogger("fusechat"), "propagate", True)

    def run(name: str) -> list[str]:
        caplog.clear()
        merge(configuration("task_arithmetic", pair, {"weight": 0.5}), tmp_path / name)
        found = [record for record in caplog.records if record.levelno == logging.WARNING]
        return [record.getMessage().replace(f"{tmp_path}/", "") for record in found]

    return run


def words(*names: str) -> Any:
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0])
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=names[0])


def test_ids_of_other_tokens_are_named(pair: list[Path], said: Any) -> None:
    """Added tokens in another order, and a token that only one has."""
    names = ["<unk>", *(f"w{number}" for number in range(9))]
    for path, added in zip(pair, (["<|im_end|>", "<|im_start|>"], ["<|pad|>", "<|im_start|>", "<tool>"]), strict=True):
        tokenizer = words(*names)
        tokenizer.add_special_tokens({"additional_special_tokens": added})
        tokenizer.save_pretrained(path)
        assert vocabulary(path) == {number: token for token, number in tokenizer.get_vocab().items()}
    assert said("out") == [
        "one: 1 ids are other tokens' than in base (10 is '<|pad|>' and not '<|im_end|>'); rows of different tokens are merged "
        "with each other",
        "one: 1 tokens are not in base's tokenizer ('<tool>'), and that is the merged model's",
    ]
    words("<unk>", "a", "b", *names[1:]).save_pretrained(pair[1])
    [line] = said("shifted")
    assert line.startswith("one: 11 ids are other tokens' than in base (1 is 'a' and not 'w0', ")
    assert " and 8 more)" in line


def test_vocabularies_in_every_form(models: dict[str, Path], tmp_path: Path) -> None:
    """As Transformers reads them; of older tokenizers too, and none where there is none."""
    for directory in models.values():
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        assert vocabulary(directory) == {number: token for token, number in tokenizer.get_vocab().items()}
    (tmp_path / "vocab.txt").write_text("[PAD]\nwas\n")
    (tmp_path / "added_tokens.json").write_text('{"[X]": 2}')
    assert vocabulary(tmp_path) == {0: "[PAD]", 1: "was", 2: "[X]"}
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    assert vocabulary(tmp_path) == {0: "a", 1: "b", 2: "[X]"}
    for spoilt in ("[]", "{", '{"model": [], "added_tokens": 3}'):
        (tmp_path / "tokenizer.json").write_text(spoilt)
        vocabulary(tmp_path)
    assert vocabulary(tmp_path / "nowhere") == {}


def test_configurations_that_compute_otherwise_are_named(pair: list[Path], said: Any) -> None:
    """Position scaling by its older name and its present one; defaults are filled in; what computes the same is not spoken of."""
    assert said("same") == []
    file = pair[1] / "config.json"
    config = json.loads(file.read_text())
    harmless = {
        "use_cache": False,
        "eos_token_id": 1,
        "transformers_version": "4.0",
        "attention_dropout": 0.1,
        "rms_norm_eps": 1e-6,
    }
    older = {key: value for key, value in config.items() if key != "rope_parameters"} | {"rope_theta": 10000.0}
    file.write_text(json.dumps(older | harmless))
    assert said("older") == []
    file.write_text(json.dumps(older | {"rope_theta": 500000.0, "hidden_act": "gelu"}))
    expected = "hidden_act is 'gelu' and not 'silu', rope_parameters.rope_theta is 500000.0 and not 10000.0"
    assert said("other") == [f"one: its configuration differs from base's, which is kept: {expected}"]
    for path in pair:  # a class of its own, whose defaults nobody knows
        own = json.loads((path / "config.json").read_text()) | {"model_type": "own"}
        (path / "config.json").write_text(json.dumps(own))
    assert said("own") == [
        "one: its configuration differs from base's, which is kept: hidden_act is 'gelu' and not 'silu'"
    ]
