"""The tokenizer of a model is what its tokenizer.json says, whatever class its configuration names."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

import runs
import tiny
from fusechat.commands.run import run
from fusechat.errors import ModelError
from fusechat.models.templates import ChatTemplate
from fusechat.models.tokenizer import class_tokenizer, load_tokenizer
from fusechat.pipeline import load_recipe

TEXTS = ["How many? 4 eggs.", "北京 😀", " two  spaces\n\ndef f(x):\n    return 12345", "naïve café"]
CLASSES = (None, "LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer", "PreTrainedTokenizerFast")


def of_class(model: Path, target: Path, name: str | None, **changes: Any) -> Path:
    """A copy of a model whose tokenizer_config.json names this class."""
    shutil.copytree(model, target)
    config = json.loads((target / "tokenizer_config.json").read_text())
    config.pop("tokenizer_class", None)
    config |= {"legacy": False} | ({} if name is None else {"tokenizer_class": name}) | changes
    (target / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def test_the_file_decides_whatever_the_class(models: dict[str, Path], tmp_path: Path) -> None:
    others = 0
    for kind in tiny.KINDS:
        expected = Tokenizer.from_file(str(models[kind] / "tokenizer.json"))
        plain = load_tokenizer(models[kind])
        for name in CLASSES:
            directory = of_class(models[kind], tmp_path / f"{kind}-{name}", name)
            tokenizer, by_class = load_tokenizer(directory), class_tokenizer(directory)
            for text in TEXTS:
                ids = expected.encode(text, add_special_tokens=False).ids
                assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, (kind, name)
            assert plain.special_tokens_map.items() <= tokenizer.special_tokens_map.items()
            assert tokenizer.chat_template == plain.chat_template
            template = ChatTemplate(tokenizer, tiny.TEMPLATE, "x", by_class=by_class)
            for text in TEXTS:
                ids = np.array(expected.encode(text, add_special_tokens=False).ids)
                others += template.makes_other_tokens(text, ids)
    assert others >= 12, "some classes do make other tokens, or this test shows nothing"


def test_special_tokens_that_only_the_class_knows_are_kept(models: dict[str, Path], tmp_path: Path) -> None:
    directory = of_class(models["gemma"], tmp_path / "gemma", "GemmaTokenizer", bos_token=None)
    assert class_tokenizer(directory) is not None
    assert load_tokenizer(directory).bos_token == "<bos>"


def test_a_file_that_cannot_be_read_is_one_line(models: dict[str, Path], tmp_path: Path) -> None:
    directory = of_class(models["llama"], tmp_path / "broken", None)
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_tokenizer(directory)


def test_a_run_says_where_the_class_would_differ(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed = {**models, "gemma": of_class(models["gemma"], tmp_path / "gemma", None)}
    recipe = load_recipe(runs.write_recipe(tmp_path, changed))
    run(recipe, tmp_path / "work", until="prepare")
    folder = tmp_path / "work" / "prepare" / "gemma" / "gemma"
    count = json.loads((folder / "manifest.json").read_text())["counts"]["other_class"]
    assert count == 8  # all of them
    assert [line for line in caplog.messages if line.startswith("prepare gemma/gemma: the class")] == [
        "prepare gemma/gemma: the class that Transformers takes for this tokenizer would make other tokens of "
        f"{count} conversations; tokenizer.json decides"
    ]
