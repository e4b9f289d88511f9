"""A few conversations of each source as the alignment saw them, small enough for the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fusechat.data.conversations import DataSet
from fusechat.show.conversation import Branch
from fusechat.show.page import Group, groups
from fusechat.show.passages import AlignedText, Token

EACH, TOKENS, CANDIDATES = 3, 80, 4  # conversations of a source, pivot tokens of one, tokens of a distribution
_ALL = 720  # pivot tokens on the page: what its size allows
_FEWEST = 12
_ASKED = 2000  # characters of what was asked
_SEARCHED = 500  # conversations among which the worst aligned one is looked for


@dataclass(frozen=True)
class Sample:
    """`why` it was chosen; `coverage` of the whole conversation, `shown` and `tokens`: how many of its pivot tokens are drawn."""

    conversation: str
    why: str
    coverage: float | None
    shown: int
    tokens: int
    passages: tuple[tuple[AlignedText, tuple[Group, ...]], ...]
    notes: tuple[str, ...]


def samples(branches: Mapping[str, tuple[Branch, Sequence[DataSet]]]) -> dict[str, list[Sample]]:
    """By source, of those that have any. With many sources each has fewer conversations, and shorter ones."""
    each = max(1, min(EACH, _ALL // TOKENS // max(1, len(branches))))
    room = max(_FEWEST, min(TOKENS, _ALL // max(1, each * len(branches))))
    found = {name: _of(branch, sets, each=each, room=room) for name, (branch, sets) in branches.items()}
    return {name: some for name, some in found.items() if some}


def _of(branch: Branch, sets: Sequence[DataSet], *, each: int, room: int) -> list[Sample]:
    chosen = dict(list(choose(branch).items())[:each])
    found = branch.shown(sets, list(chosen))
    result = []
    for shown, (identity, why) in zip(found, chosen.items(), strict=True):
        passages: list[AlignedText] = []
        left = room
        for passage in shown.passages:
            if left > 0:
                passages.append(_small(passage.beginning(left)))
                left -= len(passages[-1].pivot)
        drawn = tuple((passage, tuple(groups(passage))) for passage in passages)
        total, seen = (sum(len(passage.pivot) for passage in some) for some in (shown.passages, passages))
        result.append(Sample(identity, why, branch.coverage(identity), seen, total, drawn, shown.notes))
    return result


def choose(branch: Branch) -> dict[str, str]:
    """Conversations and why: the worst aligned one, the first, one from the middle; fewer where these are the same."""
    ids = branch.ids[:_SEARCHED]
    coverage = {identity: branch.coverage(identity) for identity in ids}
    known = [identity for identity in ids if coverage[identity] is not None]
    if not known:
        return {}
    worst = min(known, key=lambda identity: (coverage[identity], identity))
    among = f" of the first {_SEARCHED}" if len(branch.ids) > _SEARCHED else ""
    picked = [
        (worst, f"the lowest coverage{among}"),
        (known[0], "the first one"),
        (known[len(known) // 2], "one from the middle"),
    ]
    return {identity: why for identity, why in picked if identity != worst or why == picked[0][1]}


def _small(passage: AlignedText) -> AlignedText:
    asked = passage.asked if len(passage.asked) <= _ASKED else passage.asked[:_ASKED] + "…"
    pivot, source = (tuple(map(_short, tokens)) for tokens in (passage.pivot, passage.source))
    return replace(passage, asked=asked, pivot=pivot, source=source)


def _short(token: Token) -> Token:
    return token if token.forecast is None else replace(token, forecast=token.forecast.likeliest(CANDIDATES))
