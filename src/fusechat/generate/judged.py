"""What a verifier, or an LLM behind a server, makes of all candidates."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from fusechat.data.conversations import DataSet
from fusechat.data.prompts import Asked, read_asked
from fusechat.generate.answered import Answered
from fusechat.generate.judge import ToJudge, judge
from fusechat.models.verify import verify
from fusechat.recipe.evaluate import SECONDS
from fusechat.recipe.generate import Choose
from fusechat.run.progress import progress
from fusechat.run.shards import slices

_AT_ONCE = 1000  # prompts
_KEY = "generate.choose.verifier"


def put_judgements(answered: Sequence[Answered], sets: Sequence[DataSet], how: Choose, *, journal: Path) -> None:
    """Fills in `judged` of every text, where a verifier or a judge is to choose."""
    if how.verifier is None and how.judge is None:
        return
    asked = read_asked(sets)
    pairs = [(one, text) for one in answered for text in one.samples]
    if how.judge is not None:
        told = [ToJudge(one.prompt, text, asked[one.prompt.id].reference) for one, text in pairs]
        for (one, text), value in zip(pairs, judge(told, how.judge, journal), strict=True):
            one.judged[text] = value
    if how.verifier is not None:
        with progress("verify answers", len(pairs), "answers") as advance:
            for part in slices(pairs, _AT_ONCE):
                told_all = _told(part, asked)
                values = verify(told_all, how.verifier, key=_KEY, seconds=how.seconds or SECONDS, advance=advance)
                for (one, text), value in zip(part, values, strict=True):
                    one.judged[text] = value


def _told(pairs: Sequence[tuple[Answered, str]], asked: dict[str, Asked]) -> Iterator[tuple[dict[str, object], str]]:
    """What a verifier is told of an answer, and where its prompt stands."""
    for one, text in pairs:
        known = asked[one.prompt.id]
        messages = [
            {"role": message.role, "content": message.content, **message.more} for message in one.prompt.messages
        ]
        yield (
            {"messages": messages, "answer": text, "reference": known.reference, "record": known.record},
            known.where,
        )
