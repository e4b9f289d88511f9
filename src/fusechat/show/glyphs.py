"""Visible forms of a token's bytes, each of known width."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from rich.cells import cell_len

NOTHING = "∅"  # a token without bytes
_OPEN, _CLOSE = "⟦", "⟧"  # around a special token: colours are lost in a pipe
_STAND_INS = {" ": "·", "\n": "⏎", "\t": "→", "\r": "␍", "\x7f": "␡"}
_NAMES = {
    "\u00a0": "NBSP",
    "\u00ad": "SHY",
    "\u2060": "WJ",
    "\ufeff": "BOM",
    **{chr(0x200B + number): name for number, name in enumerate(("ZWSP", "ZWNJ", "ZWJ", "LRM", "RLM"))},
    **{chr(0x202A + number): name for number, name in enumerate(("LRE", "RLE", "PDF", "LRO", "RLO"))},
    **{chr(0x2066 + number): name for number, name in enumerate(("LRI", "RLI", "FSI", "PDI"))},
    **{chr(0xFE00 + number): f"VS{number + 1}" for number in range(16)},
    **{chr(0x1F1E6 + number): f"RI-{chr(ord('A') + number)}" for number in range(26)},
    **{chr(0x1F3FB + number): f"TONE-{number + 2 if number else '1-2'}" for number in range(5)},
}
# Separators, controls, formats, private use, unassigned: terminals hide them, or disagree about their width.
_UNSEEN = {"Zs", "Zl", "Zp", "Cc", "Cf", "Co", "Cn"}


@dataclass(frozen=True)
class Glyph:
    """The drawing of the bytes from `begin` on: a character with combining marks, or a stand-in of known width."""

    text: str
    begin: int
    stands_in: bool = False

    @cached_property
    def width(self) -> int:
        """Columns on a terminal. Spacing marks count as terminals draw them, unlike in Rich."""
        return cell_len(self.text) + sum(
            unicodedata.category(mark) == "Mc" and not cell_len(mark) for mark in self.text
        )


def glyphs_of(data: bytes, begin: int = 0) -> list[Glyph]:
    """The glyphs of a token's bytes, at byte `begin` of the text. Bytes of an incomplete character are hexadecimal, `<E4>`."""
    result: list[Glyph] = []
    for character in data.decode("utf-8", errors="surrogateescape"):
        broken = "\udc80" <= character <= "\udcff"
        text, stands_in = (f"<{ord(character) - 0xDC00:02X}>", True) if broken else _look(character)
        if not stands_in and not cell_len(text):  # combines with the glyph before it, else with a circle
            if result and not result[-1].stands_in:
                result[-1] = replace(result[-1], text=result[-1].text + text)
            else:
                result.append(Glyph("◌" + text, begin))
        else:
            result.append(Glyph(text, begin, stands_in))
        begin += 1 if broken else len(character.encode())
    return result


def bracketed(glyphs: Sequence[Glyph]) -> list[Glyph]:
    """The glyphs of a special token, in brackets."""
    result = list(glyphs)
    if result:
        result[0] = replace(result[0], text=_OPEN + result[0].text)
        result[-1] = replace(result[-1], text=result[-1].text + _CLOSE)
    return result


def visible(data: bytes) -> str:
    """The glyphs of bytes as a string."""
    return "".join(glyph.text for glyph in glyphs_of(data)) or NOTHING


@lru_cache(maxsize=4096)
def _look(character: str) -> tuple[str, bool]:
    """The drawing of one character, and whether it is a stand-in."""
    if character in _STAND_INS:
        return _STAND_INS[character], True
    if character < " ":
        return chr(0x2400 + ord(character)), True
    if character in _NAMES:
        return f"<{_NAMES[character]}>", True
    if unicodedata.category(character) in _UNSEEN:
        return f"<U+{ord(character):04X}>", True
    return character, False
