"""What came of all faults: a table of kinds, a table of kills by stage, and the page's part between its two marks."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from faults.place import LOST, NAMED, SAME, Fault
from fusechat.recipe.schema import STAGES

BEGIN, END = "<!-- figures: make faults writes them -->", "<!-- end of figures -->"


def tables(faults: Sequence[Fault]) -> str:
    """Both tables, in Markdown."""
    kinds = dict.fromkeys((fault.kind, fault.launch) for fault in faults)
    rows = [["fault", "launch", "times", SAME, NAMED, "other files differ", "lost"]]
    for kind, launch in kinds:
        rows.append([kind, launch, *_counts([one for one in faults if (one.kind, one.launch) == (kind, launch)])])
    rows.append(["**all**", "", *_counts(faults)])
    killed = [fault for fault in faults if fault.kind == "SIGKILL"]
    launches = list(dict.fromkeys(fault.launch for fault in killed))
    kills = [["SIGKILL in", *STAGES, "all"]]
    for launch in launches:
        found = Counter(fault.stage for fault in killed if fault.launch == launch)
        kills.append([launch, *(str(found[stage]) for stage in STAGES), str(found.total())])
    return f"{_markdown(rows, left=2)}\n\n{_markdown(kills, left=1)}\n"


def _counts(faults: Iterable[Fault]) -> list[str]:
    faults = list(faults)
    outcomes = Counter(fault.outcome for fault in faults)
    others = sum(bool(fault.others) for fault in faults if fault.outcome != LOST)
    return [str(number) for number in (len(faults), outcomes[SAME], outcomes[NAMED], others, outcomes[LOST])]


def _markdown(rows: Sequence[Sequence[str]], *, left: int) -> str:
    rule = ["---" if column < left else "---:" for column in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def write(page: Path, text: str) -> None:
    """Puts the text between the two marks of a page."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")
