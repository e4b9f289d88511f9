"""`make miniature`: schools six tiny models, fuses them by every row of every table, and writes docs/results.md and
docs/results/miniature.md.

    python -m miniature [--workdir DIR] [--docs DIR] [--table NAME]… [--quick] [--done]

Whatever was done stays in the work directory, so that an interrupted run goes on, and a row can be made again alone: delete its
files there. `--done` computes nothing, and writes what is done. `--quick` does the same with models of little schooling, few
questions and small tables, in minutes; its figures mean nothing.
"""

import argparse
import sys
import time
from pathlib import Path

from fusechat.run.extras import is_installed, not_installed
from miniature import pool

if not (is_installed("kaleido") and is_installed("scipy")):
    print(not_installed("miniature: kaleido or scipy", "figures"), file=sys.stderr)
    sys.exit(2)
pool.one_thread()

from miniature import figures, page, rows  # noqa: E402
from miniature.jobs import Place  # noqa: E402
from miniature.scores import Scores  # noqa: E402

QUICK_STEPS, QUICK_QUESTIONS = 80, 3


def main() -> None:
    parser = argparse.ArgumentParser(prog="miniature", description="The paper in miniature: see docs/results.md.")
    parser.add_argument(
        "--workdir", type=Path, default=Path("runs/miniature"), help="where models and all else are kept"
    )
    parser.add_argument(
        "--docs",
        type=Path,
        help="where results.md, results/miniature.md and the figures go; without it, tables go to the terminal",
    )
    parser.add_argument("--table", action="append", help="only this one, as often as wanted")
    parser.add_argument("--quick", action="store_true", help="a small form of two tables, in minutes")
    parser.add_argument("--done", action="store_true", help="compute nothing: write the pages with what is done")
    given = parser.parse_args()
    every = {table.name: table for table in (rows.quick_tables() if given.quick else rows.tables())}
    unknown = sorted(set(given.table or ()) - set(every))
    if unknown:
        parser.error(f"--table {unknown[0]}: there is none of this name; there are {', '.join(every)}")
    if given.docs and given.table:
        parser.error("--docs: the page needs all tables; leave out --table")
    wanted = {name: every[name] for name in given.table or every}
    place = Place(given.workdir.resolve(), *((QUICK_STEPS, QUICK_QUESTIONS) if given.quick else ()))
    for name, table in wanted.items():
        began = time.monotonic()
        if given.done:
            wanted[name] = table = page.done(table, place)
        else:
            run(table, place)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
        print(f"\n{table.title}\n\n{page.table_text(table, place)}")
    if given.docs:
        scores = Scores(place, "test")
        drawn = {
            name: figures.figure(table, page.chosen(table, place), scores)
            for name, table in wanted.items()
            if table.rows
        }
        figures.write(drawn, given.docs / "results")
        pages = {"results.md.j2": given.docs / "results.md", "miniature.md.j2": given.docs / "results" / "miniature.md"}
        page.write(wanted, place, {"plain.md.j2": given.docs / "results.md"} if given.quick else pages)


def run(table: rows.Table, place: Place) -> None:
    """Does all that the table rests on and is not done, one seed after the other."""
    beside = [table.beside(label) for label in table.rows]
    every = [row(seed) for seed in range(table.seeds) for row in (*table.rows.values(), rows.PIVOT_ROW, *beside)]
    pool.run(every, place, table.name)


if __name__ == "__main__":
    main()
