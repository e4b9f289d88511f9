"""Finished steps whose files were altered: what is found, what is remembered of files, and what is kept."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from fusechat.run import cache
from fusechat.run.steps import Step


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSECHAT_CACHE", str(tmp_path / "cache"))


def step(directory: Path, settings: dict[str, Any] | None = None, **changes: Any) -> Step:
    def work(directory: Path) -> dict[str, Any]:
        (directory / "out.txt").write_text("whole")
        return {"written": 5}

    return Step("capture", "pivot", directory, settings or {"k": 10}, changes.pop("work", work), **changes)


class KilledError(BaseException):
    """As a signal ends a run."""


def killed(directory: Path) -> dict[str, Any]:
    raise KilledError


def counts(one: Step) -> Any:
    return (one.manifest() or {})["counts"]


def outputs(one: Step) -> Any:
    return (one.manifest() or {})["outputs"]


def alter(file: Path) -> None:
    """Other bytes of the same number, and the time of change put back."""
    before = file.stat()
    time.sleep(0.05)  # file systems count time in ticks
    file.write_text("".join(reversed(file.read_text())))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_altered_contents_are_found_though_size_and_time_are_as_before(tmp_path: Path) -> None:
    one = step(tmp_path / "s")
    one.run()
    alter(tmp_path / "s" / "out.txt")
    assert one.state() == ("damaged", "out.txt is not what was written (its checksum differs)")
    one.run()
    assert (tmp_path / "s" / "out.txt").read_text() == "whole"
    assert one.state()[0] == "done"


def test_contents_are_read_once_as_long_as_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, read = step(tmp_path / "s"), []
    digest = cache.digest
    monkeypatch.setattr(cache, "digest", lambda file: read.append(file.name) or digest(file))
    one.run()
    assert [one.state()[0] for _ in range(3)] == ["done"] * 3
    assert read == ["out.txt"]
    os.utime(tmp_path / "s" / "out.txt", ns=(0, 0))
    assert [one.state()[0] for _ in range(2)] == ["done"] * 2, "another time alone is no damage"
    assert read == ["out.txt"] * 2


def test_what_is_remembered_is_not_trusted_where_it_is_damaged_or_gone(tmp_path: Path) -> None:
    """Nor where the remembered checksum was altered itself."""
    one = step(tmp_path / "s")
    one.run()
    [memo] = (tmp_path / "cache" / "digests").glob("*.json")
    sha, told = outputs(one)["out.txt"]["sha256"], memo.read_text()
    wrong = [sha[:digit] + ("1" if sha[digit] == "0" else "0") + sha[digit + 1 :] for digit in range(0, 64, 21)]
    for text in (
        "",
        "{",
        "[]",
        '["sha256"]',
        "null",
        '{"sha256": "0"}',
        *(told.replace(sha, other) for other in wrong),
    ):
        memo.write_text(text)
        assert one.state()[0] == "done", text
    memo.unlink()
    assert one.state()[0] == "done"


def test_a_finished_step_may_be_moved(tmp_path: Path) -> None:
    step(tmp_path / "a").run()
    (tmp_path / "a").rename(tmp_path / "b")
    assert step(tmp_path / "b").state()[0] == "done"
    alter(tmp_path / "b" / "out.txt")
    assert step(tmp_path / "b").state()[0] == "damaged"


# -- files that stand for themselves, and work that several processes share ---------------------------------------------


def shards(directory: Path) -> dict[str, Any]:
    """Makes what is missing; each file says how many were made in one go."""
    missing = [f"shard-{number}" for number in range(4) if not (directory / f"shard-{number}").exists()]
    for name in missing:
        (directory / name).write_text(f"{name} of {len(missing)}")
    return {"made": len(missing)}


def test_of_a_damaged_step_of_whole_files_the_sound_ones_are_kept(tmp_path: Path) -> None:
    one = step(tmp_path / "s", work=shards, whole_files=True)
    one.run()
    alter(tmp_path / "s" / "shard-1")
    (tmp_path / "s" / "shard-3").unlink()
    assert one.state() == ("damaged", "shard-1 is not what was written (its checksum differs), and 1 more")
    one.run()
    assert [(tmp_path / "s" / f"shard-{number}").read_text()[-4:] for number in range(4)] == [
        *("of 4", "of 2", "of 4", "of 2")
    ]
    assert one.state()[0] == "done"
    assert counts(one) == {"made": 2}


def test_of_others_or_of_other_settings_nothing_is_kept(tmp_path: Path) -> None:
    one = step(tmp_path / "s", work=shards)
    one.run()
    alter(tmp_path / "s" / "shard-1")
    one.run()
    assert counts(one) == {"made": 4}
    step(tmp_path / "w", work=shards, whole_files=True).run()
    changed = step(tmp_path / "w", {"k": 3}, work=shards, whole_files=True)
    changed.run()
    assert counts(changed) == {"made": 4}


def test_a_kill_while_damage_is_mended_loses_nothing(tmp_path: Path) -> None:
    one = step(tmp_path / "s", work=shards, whole_files=True)
    one.run()
    alter(tmp_path / "s" / "shard-2")
    with pytest.raises(KilledError):
        step(tmp_path / "s", work=killed, whole_files=True).run()
    assert one.state() == ("partial", "begun, not finished")
    one.run()
    assert counts(one) == {"made": 1}


def test_join_is_given_the_counts_of_each_process(tmp_path: Path) -> None:
    given: list[Any] = []
    one = step(tmp_path / "s", join=lambda each: given.append(each) or {"joined": len(each)})
    one.run()
    assert given == [[{"written": 5}]]
    assert counts(one) == {"joined": 1}
    assert not one.run()
    assert len(given) == 1
