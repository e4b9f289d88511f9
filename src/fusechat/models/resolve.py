"""Resolves a model reference to a local directory of safetensors, and to a fingerprint of its content."""

import re
from glob import escape
from pathlib import Path

from fusechat.data.conversations import DataSet
from fusechat.errors import ModelError, first_line, unreadable
from fusechat.models import gguf
from fusechat.models.companion_files import read_json_of, to_fetch, weight_files
from fusechat.models.reference import COMMIT, Reference
from fusechat.models.wheels import wheel_digest
from fusechat.run.cache import known_digest
from fusechat.run.files import digest_json

_ASKED = 10.0  # seconds for the hub to return the newest commit
_CONTENT = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py")  # files that determine a model
ADAPTER = "adapter_model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def identity(reference: Reference) -> str:
    """A fingerprint of the model's content. Cheap for a stated checksum or an unchanged file. Raises ModelError."""
    if reference.is_wheel:
        return f"sha256:{wheel_digest(reference)}"
    if reference.is_file:
        return f"sha256:{known_digest(Path(reference.checked().parts[0]))}"
    path = Path(reference.checked().parts[0])
    if path.is_dir():
        return f"dir:{_directory_digest(path)}"
    return f"hub:{reference.parts[0]}@{reference.commit or _hub_snapshot(reference, weights=False).name}"


def local_directory(reference: Reference) -> Path:
    """A directory with configuration, tokenizer and safetensors, fetched and converted if needed. Raises ModelError."""
    if reference.is_file:
        return gguf.converted(reference)
    path = Path(reference.checked().parts[0])
    directory = path if path.is_dir() else _hub_snapshot(reference, weights=True)
    _check_weights(directory, reference)
    return directory


def configuration(reference: Reference) -> Path:
    """A directory with configuration and tokenizer. Fetches no weights from the hub; converts GGUF files. Raises ModelError."""
    if reference.is_file:
        return local_directory(reference)
    path = Path(reference.checked().parts[0])
    return path if path.is_dir() else _hub_snapshot(reference, weights=False)


def find_cached(reference: Reference) -> Path | None:
    """The directory of `local_directory` if it exists on this machine; fetches and converts nothing, without network access."""
    if reference.is_file:
        return gguf.find_cached(reference)
    path = Path(reference.parts[0])
    if path.is_dir():
        return path
    return _find_fetched(reference)


def _find_fetched(reference: Reference) -> Path | None:
    """The directory of files fetched from the hub before, which may be incomplete."""
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = reference.parts[0].partition("@")
    for file in ("config.json", "adapter_config.json", "tokenizer.json"):
        try:
            found = try_to_load_from_cache(name, file, revision=reference.commit or revision or None)
        except Exception:  # not a valid id
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def current_commit(kind: str, asked: str) -> str:
    """The current commit of a hub id, with or without a revision. `kind`: `model` or `dataset`. Raises ModelError or DataError."""
    revision = asked.partition("@")[2]
    if re.fullmatch(COMMIT, revision):
        return revision
    if kind == "model":
        return _hub_snapshot(Reference((asked,)), weights=False).name
    return DataSet("", asked).local().name


def newest_commit(kind: str, asked: str) -> str | None:
    """As `current_commit`, from the hub only; None without an answer."""
    from huggingface_hub import HfApi

    name, _, revision = asked.partition("@")
    try:
        return HfApi().repo_info(name, repo_type=kind, revision=revision or None, timeout=_ASKED).sha
    except Exception:  # of many types: no network, a deleted branch
        return None


def _check_weights(directory: Path, reference: Reference) -> None:
    weights = {file.name for file in directory.glob("*.safetensors")} - {ADAPTER}
    if (directory / "adapter_config.json").is_file() and not weights:
        of = read_json_of(directory / "adapter_config.json").get("base_model_name_or_path") or "a model"
        raise ModelError(
            f"{reference}: is an adapter to {of} (it has adapter_config.json); merge it into its model first"
        )
    if not (directory / "config.json").is_file():
        raise ModelError(f"{reference}: no config.json in {directory}")
    unread = [line for file in _content(directory) if (line := unreadable(file)) is not None]
    if unread:
        raise ModelError(*unread)
    if not any(directory.glob("*.safetensors")):
        pickled = [file.name for pattern in _PICKLES for file in directory.glob(pattern)]
        if pickled:
            raise ModelError(
                f"{reference}: has pickled weights only ({pickled[0]}), which can run code; convert to safetensors"
            )
        raise ModelError(f"{reference}: no safetensors weights in {directory}")


def _hub_snapshot(reference: Reference, *, weights: bool) -> Path:
    """Fetches a repository's top-level files first, then the files that they name: the files that a copy of the model has."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    name, _, branch = reference.parts[0].partition("@")
    at = reference.commit or branch or None
    try:
        try:
            files = [part.rfilename for part in HfApi().model_info(name, revision=at).siblings or ()]
        except Exception as error:  # of many types: no network, offline mode; use the cache
            gone = isinstance(error, RepositoryNotFoundError | RevisionNotFoundError)
            fetched = None if gone else _find_fetched(reference)
            if fetched is None:
                raise
            return fetched
        snapshot = Path(snapshot_download(name, revision=at, allow_patterns=_exactly(to_fetch(files))))
        at = snapshot.name  # the same commit, even if the branch moves
        wanted = [*to_fetch(files, snapshot), *(weight_files(files, snapshot) if weights else [])]
        return Path(snapshot_download(name, revision=at, allow_patterns=_exactly(wanted)))
    except Exception as error:  # of many types; all mean that the model is unavailable
        reason = first_line(error)
        raise ModelError(f"{reference}: no such directory, and the hub gave no such model ({reason})") from error


def _exactly(files: list[str]) -> list[str]:
    """Glob patterns that match exactly these names."""
    return [escape(file) for file in files]


def _directory_digest(directory: Path) -> str:
    return digest_json({file.name: known_digest(file) for file in _content(directory)})


def _content(directory: Path) -> list[Path]:
    return sorted({file for pattern in _CONTENT for file in directory.glob(pattern)})
