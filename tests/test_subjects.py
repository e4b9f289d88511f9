"""The models of `fusechat eval`, as the command line names them."""

from pathlib import Path

import pytest

from cases import each
from fusechat.errors import ModelError, RecipeError
from fusechat.evaluate.subjects import Server, Subject, check_labels, parse_model
from fusechat.models.reference import Reference


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("models/tiny", "a=b"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "tiny.Q4_K_M.gguf").touch()
    return tmp_path


@each("text, label, path", [
    ("models/tiny", "models/tiny", "models/tiny"),
    ("models/tiny/", "models/tiny", "models/tiny"),
    ("./models/../models/tiny", "./models/../models/tiny", "models/tiny"),
    ("first=models/tiny", "first", "models/tiny"),
    ("v1.0-b_2=models/tiny", "v1.0-b_2", "models/tiny"),
    ("größer=models/tiny", "größer", "models/tiny"),
    ("home=~/models/tiny", "home", "models/tiny"),
    ("a=b", "a=b", "a=b"),  # a directory of this name, and no model b
    ("c=a=b", "c", "a=b"),
    ("tiny.Q4_K_M.gguf", "tiny", "tiny.Q4_K_M.gguf"),
    ("small=tiny.Q4_K_M.gguf", "small", "tiny.Q4_K_M.gguf"),
])  # fmt: skip
def test_what_is_here(here: Path, text: str, label: str, path: str) -> None:
    found = parse_model(text)
    assert (found.role, found.label, found.server) == ("", label, None)
    assert found.chat_model is not None
    assert found.chat_model.name == label
    assert found.chat_model.reference == Reference((str(here / path),))
    assert found.local("harness") is found.chat_model


@each("text, label, reference", [
    ("somebody/model", "model", "somebody/model"),
    ("somebody/model@main", "model", "somebody/model@main"),
    ("theirs=somebody/model@main", "theirs", "somebody/model@main"),
    ("wheel:some-model==1.0/some_model/x-Q8_0.gguf", "x", "wheel:some-model==1.0/some_model/x-Q8_0.gguf"),
    ("w=wheel:some-model==1.0/some_model/x.gguf", "w", "wheel:some-model==1.0/some_model/x.gguf"),
])  # fmt: skip
def test_what_is_elsewhere(text: str, label: str, reference: str) -> None:
    found = parse_model(text)
    assert found.chat_model is not None
    assert (found.label, found.chat_model.reference) == (label, Reference((reference,)))


@each("text, label, server", [
    ("http://127.0.0.1:8000/v1#mixtral", "mixtral", Server("http://127.0.0.1:8000/v1", "mixtral")),
    ("https://host/v1#some/model-1", "some/model-1", Server("https://host/v1", "some/model-1")),
    ("mine=https://host/v1#some/model-1", "mine", Server("https://host/v1", "some/model-1")),
    ("https://host/v1#a#b=c", "a#b=c", Server("https://host/v1", "a#b=c")),
])  # fmt: skip
def test_what_a_server_has(text: str, label: str, server: Server) -> None:
    found = parse_model(text)
    assert (found.role, found.label, found.chat_model, found.server) == ("", label, None, server)
    assert found.identity == f"served:{server.name}"
    with pytest.raises(RecipeError) as refused:
        found.local("harness")
    assert str(refused.value) == f"{label}: harness needs the model itself, not a server; name its directory"


@each("text, error, line", [
    ("nothing", ModelError, "'nothing' is neither a directory, a .gguf file, a wheel: reference nor a hub id"),
    ("x=nothing", ModelError, "'nothing' is neither a directory, a .gguf file, a wheel: reference nor a hub id"),
    ("", RecipeError, "MODEL is empty"),
    ("=models/tiny", ModelError, "'=models/tiny' is neither"),
    ("x=", ModelError, "'x=' is neither"),
    ("two words=models/tiny", ModelError, "'two words=models/tiny' is neither"),
    ("gone.gguf", ModelError, "gone.gguf: no such file"),
    ("wheel:x/y.gguf", ModelError, "'wheel:x/y.gguf' is not of the form wheel:DIST==VERSION/path/in/wheel"),
    ("http://h:1/v1", RecipeError, "http://h:1/v1: does not say which model; add its name, as in http://h:1/v1#NAME"),
    ("x=http://h/v1#", RecipeError, "http://h/v1: does not say which model; add its name, as in http://h/v1#NAME"),
    ("nul\0", ModelError, "is neither"),
])  # fmt: skip
def test_what_is_no_model(text: str, error: type[Exception], line: str) -> None:
    with pytest.raises(error) as refused:
        parse_model(text)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_key_in_an_address_is_not_told() -> None:
    with pytest.raises(RecipeError) as refused:
        parse_model("https://user:sesame@host/v1")
    assert "sesame" not in str(refused.value)


def test_names_for_files() -> None:
    labels = {
        "some/model-1.5": "some_model-1.5",
        "../../etc": "etc",
        "größer 2": "größer_2",
        "..": "model",
        "🙂": "model",
    }
    assert {label: Subject("", label).folder for label in labels} == labels


def test_two_models_of_one_name_are_refused() -> None:
    for labels in (("one", "one"), ("a/b", "x", "a_b"), ("..", "🙂")):
        with pytest.raises(RecipeError) as refused:
            check_labels([Subject("", label) for label in labels])
        assert str(refused.value) == f"{labels[-1]}: two models of this name; give one another name, as in LABEL=MODEL"
    check_labels([Subject("", label) for label in ("one", "two", "One/two")])
    check_labels([])
