"""Token views on a terminal, or as plain text in a pipe: the pivot's tokens, marks, the source's tokens."""

import os
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from fusechat.show.columns import LOWER, SHARED, UPPER, Column, lines
from fusechat.show.passages import AlignedText, Token, TokenView, bytes_per_token

_GUTTER = 8
_PIPED = 80  # columns without a terminal
# By whether a token of the other model starts at the same byte, then alternating. With a foreground colour, for dark and light
# terminals.
_FILLS = {
    True: ("bright_white on rgb(0,75,135)", "bright_white on rgb(0,100,95)"),
    False: ("bright_white on rgb(140,70,0)", "bright_white on rgb(110,55,40)"),
}
_LEGEND = f"{SHARED} both start a token here   {UPPER} the pivot only   {LOWER} the source only"
_STANDS_IN, _SPECIAL, _EMPTY = "dim", "bold reverse", "dim italic"


def console() -> Console:
    """A console as wide as the terminal; in a pipe 80 columns without colours, unless COLUMNS is set."""
    found = Console(highlight=False, emoji=False, markup=False)
    return found if found.is_terminal else Console(width=_width_in_pipe(), highlight=False, emoji=False, markup=False)


def print_drawing(shown: TokenView, to: Console) -> None:
    """Prints both token rows of every text."""
    for passage in shown.passages:
        if passage.title:
            to.print(Text(passage.title, style="bold"), end="\n\n")
        for line in drawing(passage, width=to.width):
            _print(line, to)
    to.print(Text(_LEGEND, style="dim"), soft_wrap=True)
    print_summary(shown, to)


def print_summary(shown: TokenView, to: Console) -> None:
    """Prints counts of tokens and coverage."""
    for line in summary(shown):
        to.print(Text(line), soft_wrap=True)


def drawing(passage: AlignedText, *, width: int) -> Iterator[Text]:
    """Lines of at most `width` columns: three for each line of tokens, and an empty one."""
    room = max(width - _GUTTER, 1)
    partners = passage.partner, passage.partner_of_source
    for columns in lines(passage.columns(limit=room), width=room, breaks=passage.breaks):
        yield _row("pivot", columns, 0, passage.pivot, partners[0])
        yield _marks(columns)
        yield _row("source", columns, 1, passage.source, partners[1])
        yield Text()


def summary(shown: TokenView) -> Iterator[str]:
    """The lines of `print_summary`."""
    rows = (("pivot", shown.pivot, shown.tokens("pivot")), ("source", shown.source, shown.tokens("source")))
    for row, model, tokens in rows:
        average = bytes_per_token(tokens)
        per_token = f", {average:.2f} bytes per token" if average is not None else ""
        yield f"{row:<{_GUTTER}}{model.label}: {len(tokens):,} {'token' if len(tokens) == 1 else 'tokens'}{per_token}"
    share = f", {shown.coverage:.1%} of the pivot's tokens" if shown.coverage is not None else ""
    yield f"shared starts: {shown.shared:,}{share}"
    yield f"pivot tokens that begin inside a source token: {shown.inside:,}"
    for row, model, _ in rows:
        if not model.exact:
            yield f"the {row}'s tokenizer changes this text: its spans come from character offsets"
    yield from shown.notes


def _row(name: str, columns: Sequence[Column], side: int, tokens: Sequence[Token], partners: Sequence[int]) -> Text:
    line = Text(f"{name:<{_GUTTER}}", style="", no_wrap=True)
    line.stylize("dim")
    for column in columns:
        index = column.segment.tokens[side]
        if index < 0:
            line.append(" " * column.width)
            continue
        token = tokens[index]
        style = _style(token, alternate=index % 2, partner=partners[index])
        for glyph in column.glyphs[side]:
            line.append(glyph.text, f"{style} {_STANDS_IN}" if glyph.stands_in and not token.special else style)
        line.append(" " * (column.width - sum(glyph.width for glyph in column.glyphs[side])), style)
    return line


def _marks(columns: Sequence[Column]) -> Text:
    """The marks, after the byte at which the line begins."""
    line = Text(f"{columns[0].segment.begin:>{_GUTTER - 2}}  ", style="")
    line.stylize("dim")
    for column in columns:
        mark = column.segment.mark
        line.append(mark + " " * (column.width - 1), "bold" if mark == SHARED else "dim")
    line.rstrip()
    return line


def _style(token: Token, *, alternate: int, partner: int) -> str:
    if token.special:
        return _SPECIAL
    return _FILLS[partner >= 0][alternate] if token.end > token.begin else _EMPTY


def _print(line: Text, to: Console) -> None:
    if not to.is_terminal:
        line.rstrip()
    to.print(line, soft_wrap=True)


def _width_in_pipe() -> int:
    given = os.environ.get("COLUMNS", "")
    return int(given) if given.isdecimal() and int(given) else _PIPED
