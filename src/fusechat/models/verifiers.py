"""The verifiers that come with FuseChat: `verifier: exact`, `final_number` and `contains`.

A verifier takes a mapping: `messages` (role and content of what was asked), `answer`, `reference` (the answer in the record, a list
where several are right, or None) and `record`; it gives true, false or a number, of which more is better and 0 is wrong.
"""

import re
import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

NAMES = ("exact", "final_number", "contains")  # all need a reference
_NUMBER = re.compile(r"(?:(?<![\w)])[-−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def exact(asked: Mapping[str, Any]) -> bool:
    """Whether answer and reference are the same text, white space around them and Unicode's forms (NFC) aside."""
    return _plain(asked["answer"]) in map(_plain, _references(asked))


def contains(asked: Mapping[str, Any]) -> bool:
    """Whether the reference stands in the answer as whole words, in capitals or not."""
    answer = _plain(asked["answer"]).casefold()
    words = (re.escape(_plain(one).casefold()) for one in _references(asked))
    return any(re.search(rf"(?<!\w){one}(?!\w)", answer) for one in words)


def final_number(asked: Mapping[str, Any]) -> bool:
    """Whether the last number in the answer is the last one in the reference. Raises ValueError for a reference without one."""
    references = [last_number(one) for one in _references(asked)]
    if None in references:
        raise ValueError("the reference holds no number")
    return last_number(asked["answer"]) in references


def last_number(text: str) -> Decimal | None:
    """Of digits with `.` as the decimal point, `,` between thousands or not, and `-` or `−` before it unless a word is there."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("−", "-")) if found else None


def _references(asked: Mapping[str, Any]) -> list[str]:
    """One of them, or several of which each is right."""
    told = asked["reference"]
    return [told] if isinstance(told, str) else told


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())
