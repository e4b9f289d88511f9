"""A token view as one self-contained HTML page without scripts, which works offline."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from fusechat.show.columns import Segment
from fusechat.show.glyphs import Glyph
from fusechat.show.passages import AlignedText, Token, TokenView
from fusechat.show.terminal import summary


@dataclass(frozen=True)
class Block:
    """A token in its group: its `first` column of the grid, from 1, and its width in columns."""

    token: Token
    index: int
    row: int
    first: int
    width: int
    partner: int

    @property
    def runs(self) -> list[tuple[str, bool]]:
        """Its glyphs as strings of one kind, and whether these are stand-ins."""
        return _runs(self.token.glyphs)

    @property
    def classes(self) -> str:
        """CSS classes."""
        token = self.token
        kind = "special" if token.special else "empty" if token.end == token.begin else ""
        alone = "alone" if self.partner < 0 and token.end > token.begin else ""
        return " ".join(filter(None, ("token", ("pivot", "source")[self.row], f"t{self.index % 2}", kind, alone)))


@dataclass(frozen=True)
class Group:
    """The tokens between two shared starts. `shared`: it begins with one. `new_line`: a line of the text ended before."""

    blocks: tuple[Block, ...]
    width: int
    shared: bool
    new_line: bool


def render_page(shown: TokenView) -> str:
    """The page as HTML, with all text escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        shown=shown,
        summary=list(summary(shown)),
        passages=[(passage, list(groups(passage))) for passage in shown.passages],
    )


def groups(passage: AlignedText) -> Iterator[Group]:
    """The tokens split at shared starts, which no token crosses, so that lines may break there."""
    waiting: list[Segment] = []
    for segment in passage.segments:
        if segment.shared and waiting:
            yield _group(passage, waiting)
            waiting = []
        waiting.append(segment)
    if waiting:
        yield _group(passage, waiting)


def _group(passage: AlignedText, inside: Sequence[Segment]) -> Group:
    blocks = []
    for row, (tokens, partners) in enumerate(
        ((passage.pivot, passage.partner), (passage.source, passage.partner_of_source))
    ):
        columns: dict[int, list[int]] = {}
        for column, segment in enumerate(inside, 1):
            columns.setdefault(segment.tokens[row], []).append(column)
        blocks += [
            Block(tokens[index], index, row, at[0], at[-1] - at[0] + 1, partners[index])
            for index, at in columns.items()
            if index >= 0
        ]
    begins = inside[0].begin
    return Group(tuple(blocks), len(inside), inside[0].shared, inside[0].shared and begins in passage.breaks)


def _runs(glyphs: Sequence[Glyph]) -> list[tuple[str, bool]]:
    result: list[tuple[str, bool]] = []
    for glyph in glyphs:
        if result and result[-1][1] == glyph.stands_in:
            result[-1] = result[-1][0] + glyph.text, glyph.stands_in
        else:
            result.append((glyph.text, glyph.stands_in))
    return result
