"""The bytes of every token of a fast tokenizer, as written in the middle of a text.

They are derived from what the tokenizer does to a text and back, not from the look of its vocabulary.
"""

import json
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from fusechat.errors import ModelError

SPACE_MARK = "▁"


class TokenBytes:
    """The bytes of each token in the middle of a text, by id. Raises ModelError for a slow tokenizer.

    `added`: the tokenizer's AddedToken by id. `special` and `byte_tokens` are ids; the latter are written as `<0x41>`, the
    fallback for single bytes. A pickled object has the bytes without the tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.name = str(getattr(tokenizer, "name_or_path", None) or type(tokenizer).__name__)
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(f"{self.name}: a slow tokenizer has no spans; a tokenizer.json is needed")
        self.tokenizer = tokenizer
        backend = tokenizer.backend_tokenizer
        steps = [
            step for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder) for step in _steps_of(part)
        ]
        kinds = {step["type"] for step in steps}
        self.byte_level = "ByteLevel" in kinds
        self.space_mark = None if self.byte_level else _space_mark(steps)
        self.added: dict[int, Any] = backend.get_added_tokens_decoder()
        self.special = frozenset(tokenizer.all_special_ids) | {
            token for token, content in self.added.items() if content.special
        }
        self._byte_of: dict[int, int] = {}
        if "ByteFallback" in kinds:
            spelt = {backend.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
            self._byte_of = {token: byte for token, byte in spelt.items() if token is not None}
        self.byte_tokens = frozenset(self._byte_of)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, token: int) -> bytes:
        """The token's bytes; empty for an id past the tokenizer's, in a padded vocabulary."""
        return self.pieces[token] if 0 <= token < len(self.pieces) else b""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pieces": self.pieces, "tokenizer": None}

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of every token."""
        vocabulary = self.tokenizer.get_vocab()
        found = [b""] * max(len(self.tokenizer), 1 + max(vocabulary.values(), default=-1))
        prefix, suffix = _affixes(self.tokenizer.backend_tokenizer.model)
        for piece, token in vocabulary.items():
            if token not in self.added:
                piece = piece.removeprefix(prefix).removesuffix(suffix)
            found[token] = self._spell(token, piece)
        return found

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 [len(self)]: the length of every token in bytes."""
        return np.fromiter(map(len, self.pieces), dtype=np.int32, count=len(self))

    @cached_property
    def is_added(self) -> np.ndarray:
        """bool [len(self)]: tokens that were added to the tokenizer's vocabulary."""
        return np.isin(np.arange(len(self)), list(self.added))

    def is_byte(self, token: int) -> bool:
        """Whether the token is a byte written as `<0x41>`."""
        return token in self.byte_tokens

    def piece(self, data: str) -> str:
        """`data` in the middle of a text, in the tokenizer's own alphabet."""
        if self.byte_level:
            return "".join(_BYTE_TO_CHARACTER[byte] for byte in data.encode())
        return data.replace(" ", self.space_mark) if self.space_mark else data

    def _spell(self, token: int, piece: str) -> bytes:
        if token in self._byte_of:
            return bytes([self._byte_of[token]])
        if self.byte_level and token not in self.added:
            return _from_byte_alphabet(piece)
        return (piece.replace(self.space_mark, " ") if self.space_mark else piece).encode()


@lru_cache(maxsize=64)
def token_bytes(tokenizer: Any) -> TokenBytes:
    """The cached `TokenBytes` of a tokenizer. Raises ModelError for a slow one."""
    return TokenBytes(tokenizer)


def _steps_of(part: Any) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder as a list of its steps."""

    def flat(state: dict[str, Any]) -> list[dict[str, Any]]:
        inner = [step for key in ("normalizers", "pretokenizers", "decoders") for step in state.get(key, ())]
        return [leaf for step in inner for leaf in flat(step)] if state["type"] == "Sequence" else [state]

    return [] if part is None else flat(json.loads(part.__getstate__()))


def _space_mark(steps: list[dict[str, Any]]) -> str | None:
    """The character that stands for a space in pieces, if it is another one."""
    for step in steps:
        if step["type"] == "Metaspace":
            return str(step["replacement"])
        if step["type"] == "Replace" and step["pattern"].get("String") == SPACE_MARK and step["content"] == " ":
            return SPACE_MARK
    return None


def _affixes(model: Any) -> tuple[str, str]:
    """Marks of pieces inside a word (`##ing`) and at its end (`ing</w>`), which are not text."""
    return (
        getattr(model, "continuing_subword_prefix", None) or "",
        getattr(model, "end_of_word_suffix", None) or "",
    )


def _byte_alphabet() -> dict[int, str]:
    """The printable stand-in of each byte in byte-level BPE: itself if printable, else a letter from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _from_byte_alphabet(piece: str) -> bytes:
    """The bytes of a piece of byte-level BPE; a piece with a character outside the alphabet is literal."""
    try:
        return piece.translate(_TO_LATIN).encode("latin-1")
    except UnicodeEncodeError:
        return piece.encode()


_BYTE_TO_CHARACTER = _byte_alphabet()
# Characters outside the alphabet map outside Latin-1, so that they are not taken for bytes.
_TO_LATIN = dict.fromkeys(range(256), "\ufffd") | {
    ord(character): byte for byte, character in _BYTE_TO_CHARACTER.items()
}
