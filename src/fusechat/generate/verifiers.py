"""The verifiers that come with FuseChat: `choose: {verifier: exact}` and `{verifier: final_number}`.

A verifier takes a mapping: `messages` (role and content of what was asked), `answer`, `reference` (the answer in the record, or
None) and `record`; it gives true, false or a number, of which more is better and 0 is wrong.
"""

import re
import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

NAMES = ("exact", "final_number")  # both need a reference
_NUMBER = re.compile(r"(?:(?<![\w)])[-−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def exact(asked: Mapping[str, Any]) -> bool:
    """Whether answer and reference are the same text, white space around them and Unicode's forms (NFC) aside."""
    answer, reference = (unicodedata.normalize("NFC", asked[key].strip()) for key in ("answer", "reference"))
    return answer == reference


def final_number(asked: Mapping[str, Any]) -> bool:
    """Whether the last number in the answer is the last one in the reference. Raises ValueError for a reference without one."""
    answer, reference = (last_number(asked[key]) for key in ("answer", "reference"))
    if reference is None:
        raise ValueError("the reference holds no number")
    return answer == reference


def last_number(text: str) -> Decimal | None:
    """Of digits with `.` as the decimal point, `,` between thousands or not, and `-` or `−` before it unless a word is there."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("−", "-")) if found else None
