"""Steps: what their fingerprints depend on, in what state they are, and what of their directories survives."""

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusechat.run.files import digest_json, read_json
from fusechat.run.steps import MANIFEST, STARTED, Step, with_upstream

SHA256_OF_WHOLE = "5d5766cf2d78701614200418ee1450690d9af12c84d52545e4802f001ad53099"  # printf whole | sha256sum


def writing(name: str = "out.txt", text: str = "whole") -> Callable[[Path], dict[str, Any]]:
    def work(directory: Path) -> dict[str, Any]:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
        return {"written": len(text)}

    return work


def step(directory: Path, settings: dict[str, Any] | None = None, **changes: Any) -> Step:
    given = {"stage": "capture", "name": "pivot", "work": writing(), **changes}
    return Step(directory=directory, settings={"k": 10} if settings is None else settings, **given)


class KilledError(BaseException):
    """As a signal ends a run."""


def killed_after(*names: str) -> Callable[[Path], dict[str, Any]]:
    def work(directory: Path) -> dict[str, Any]:
        for name in names:
            writing(name)(directory)
        raise KilledError

    return work


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of files of other tests plays no part."""
    monkeypatch.setenv("FUSECHAT_CACHE", str(tmp_path / "cache"))


# -- fingerprints -------------------------------------------------------------------------------------------------------


def test_a_fingerprint_changes_with_what_the_work_depends_on(tmp_path: Path) -> None:
    above, other_above = step(tmp_path / "up", {"x": 1}), step(tmp_path / "up", {"x": 2})
    variants = [
        step(tmp_path),
        step(tmp_path, {"k": 11}),
        step(tmp_path, {"k": 10, "dtype": None}),
        step(tmp_path, {"k": "10"}),
        step(tmp_path, stage="align"),
        step(tmp_path, format=2),
        step(tmp_path, upstream={"pivot": above}),
        step(tmp_path, upstream={"source": above}),
        step(tmp_path, upstream={"pivot": other_above}),
        step(tmp_path, upstream={"pivot": step(tmp_path / "m", upstream={"a": above})}),
        step(tmp_path, upstream={"pivot": step(tmp_path / "m", upstream={"a": other_above})}),
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)


def test_a_fingerprint_does_not_change_with_the_order_of_settings_or_where_the_work_is_done(tmp_path: Path) -> None:
    one = step(tmp_path / "a", {"k": 10, "dtype": "float32"})
    other = step(tmp_path / "b", {"dtype": "float32", "k": 10}, work=writing("other.txt"))
    assert one.fingerprint == other.fingerprint


def test_settings_that_json_cannot_tell_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        digest_json({"temperature": float("nan")})


# -- states -------------------------------------------------------------------------------------------------------------


def test_absent_then_done_then_skipped(tmp_path: Path) -> None:
    calls: list[Path] = []

    def work(directory: Path) -> dict[str, Any]:
        calls.append(directory)
        return writing()(directory)

    one = step(tmp_path / "s", work=work)
    assert one.state() == ("absent", "not begun")
    (tmp_path / "s").mkdir()
    assert one.state()[0] == "absent", "an empty directory is no finished stage"
    assert one.run()
    assert one.state() == ("done", "")
    assert not one.run()
    assert calls == [tmp_path / "s"]
    manifest = read_json(tmp_path / "s" / MANIFEST)
    assert manifest["counts"] == {"written": 5}
    assert manifest["outputs"] == {"out.txt": {"bytes": 5, "sha256": SHA256_OF_WHOLE}}
    assert not (tmp_path / "s" / STARTED).exists()


def test_partial_after_a_kill_and_what_was_finished_is_kept(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        step(tmp_path / "s", work=killed_after("shard-0")).run()
    again = step(tmp_path / "s")
    assert again.state() == ("partial", "begun, not finished")
    assert again.run()
    assert again.state()[0] == "done"
    assert set(read_json(tmp_path / "s" / MANIFEST)["outputs"]) == {"shard-0", "out.txt"}


def test_what_a_run_with_other_settings_left_is_cleared(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        step(tmp_path / "s", {"k": 5}, work=killed_after("shard-0", "shards/1")).run()
    again = step(tmp_path / "s")
    assert again.state()[0] == "absent"
    again.run()
    assert not (tmp_path / "s" / "shard-0").exists()
    assert not (tmp_path / "s" / "shards").exists()


def test_parts_survive_while_what_they_rest_on_is_the_same(tmp_path: Path) -> None:
    """`a.json` depends on the step above that is called a, `b.json` on b; a third comes, then one of them comes out different."""

    def work(directory: Path) -> dict[str, Any]:
        made = [name for name in "abc" if not (directory / f"{name}.json").is_file()]
        for name in made:
            writing(f"{name}.json", name)(directory)
        return {"made": "".join(made)}

    def scored(names: str, changed: str = "", settings: dict[str, Any] | None = None) -> Step:
        above = {
            name: step(tmp_path / name, {"k": int(name == changed)}, work=writing(text=f"{name == changed}"))
            for name in names
        }
        for one in above.values():
            one.run()
        parts = {f"{name}.json": [name] for name in names}
        return step(tmp_path / "s", settings, work=work, upstream=above, parts=parts)

    def made(scores: Step) -> str:
        assert scores.run()
        assert scores.state() == ("done", "")
        return str(read_json(tmp_path / "s" / MANIFEST)["counts"]["made"])

    assert made(scored("ab")) == "abc"
    assert scored("abc").state() == ("stale", "upstream.c is new")
    assert made(scored("abc")) == "c", "nothing said before on what c.json rests"
    assert made(scored("abc", changed="b")) == "b"
    assert made(scored("ac", changed="a")) == "ab", "b is no part any more"
    assert made(scored("ac", changed="a", settings={"k": 11})) == "abc"
    again = scored("ac", changed="a", settings={"k": 11})
    (tmp_path / "c" / MANIFEST).unlink()
    step(tmp_path / "c", {"k": 0}, work=writing(text="otherwise")).run()
    assert again.state() == ("stale", "capture pivot was made again and came out different")
    assert made(again) == "bc"
    (tmp_path / "s" / "a.json").write_text("spoilt")
    assert made(scored("abc", changed="a", settings={"k": 11})) == "ab", "what is damaged is not kept"


def test_stale_says_what_changed_and_is_done_again(tmp_path: Path) -> None:
    above = step(tmp_path / "up")
    step(tmp_path / "s", {"k": 10, "dtype": "float32"}, work=writing("old.txt"), upstream={"pivot": above}).run()
    changed = step(tmp_path / "s", {"k": 5, "dtype": "float32"}, upstream={"pivot": step(tmp_path / "up", {"k": 3})})
    assert changed.state() == ("stale", "settings.k changed; upstream.pivot changed")
    changed.run()
    assert changed.state()[0] == "done"
    assert not (tmp_path / "s" / "old.txt").exists()


def test_damaged_names_the_file_and_is_done_again(tmp_path: Path) -> None:
    one, file = step(tmp_path / "s", work=writing("shards/0.arrow")), tmp_path / "s" / "shards" / "0.arrow"
    one.run()
    for damage in (Path.unlink, lambda file: file.write_text("who")):
        damage(file)
        state, why = one.state()
        assert state == "damaged"
        assert "shards/0.arrow" in why
        one.run()
        assert one.state()[0] == "done"
        assert file.read_text() == "whole"


def test_a_manifest_that_is_no_manifest_is_not_done(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    one = step(tmp_path / "s")
    for text in ("", "{", "null", "[]", '"x"', "[1, 2]"):
        (tmp_path / "s" / MANIFEST).write_text(text)
        assert one.state()[0] != "done", text
        one.run()
        assert one.state()[0] == "done"


def test_a_manifest_with_one_bit_flipped_never_fails_and_never_changes_what_is_there(tmp_path: Path) -> None:
    """The work is done again, or the bit changes nothing."""
    one = step(tmp_path / "s")
    one.run()
    file, found = tmp_path / "s" / MANIFEST, one.manifest()
    data, states = file.read_bytes(), set()
    for place in range(len(data)):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        states.add(one.state()[0])
        assert one.state()[0] == "absent" or {**(one.manifest() or {}), **(found or {})} == one.manifest()
    assert states <= {"absent", "done"}
    assert "absent" in states


def test_redo_does_the_work_again(tmp_path: Path) -> None:
    step(tmp_path / "s", work=writing(text="first")).run()
    step(tmp_path / "s", work=writing(text="second")).redo()
    assert (tmp_path / "s" / "out.txt").read_text() == "second"
    assert step(tmp_path / "s").state()[0] == "done"


def test_a_failing_work_leaves_no_manifest(tmp_path: Path) -> None:
    def work(directory: Path) -> dict[str, Any]:
        writing()(directory)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        step(tmp_path / "s", work=work).run()
    assert not (tmp_path / "s" / MANIFEST).exists()


def test_a_manifest_holds_no_times_but_under_timings(tmp_path: Path) -> None:
    for name in ("a", "b"):
        step(tmp_path / name).run()
    one, other = (read_json(tmp_path / name / MANIFEST) for name in ("a", "b"))
    assert one.pop("timings").keys() | other.pop("timings").keys() <= {"seconds", "peak_memory_bytes", "peak_gpu_bytes"}
    del one["checksum"], other["checksum"]  # which are of the timings too
    assert json.dumps(one) == json.dumps(other)


# -- steps inside the directory of another ------------------------------------------------------------------------------


def nested(tmp_path: Path, settings: dict[str, Any]) -> tuple[Step, Step]:
    inner = step(tmp_path / "evaluate" / "pivot", {"x": 1}, name="pivot", work=writing("scores.json"))
    outer = step(tmp_path / "evaluate", settings, name="results", work=writing("results.json"), upstream={"a": inner})
    return inner, outer


def test_steps_inside_survive_the_clearing_of_the_outer_one(tmp_path: Path) -> None:
    inner, outer = nested(tmp_path, {"k": 1})
    inner.run()
    outer.run()
    assert set(read_json(tmp_path / "evaluate" / MANIFEST)["outputs"]) == {"results.json"}
    inner, outer = nested(tmp_path, {"k": 2})
    assert outer.state()[0] == "stale"
    outer.run()
    assert inner.state()[0] == outer.state()[0] == "done"
    assert (tmp_path / "evaluate" / "pivot" / "scores.json").read_text() == "whole"


def test_a_step_inside_that_was_killed_can_go_on(tmp_path: Path) -> None:
    inner, outer = nested(tmp_path, {"k": 1})
    killed = step(inner.directory, {"x": 1}, name="pivot", work=killed_after("shard-0"))
    with pytest.raises(KilledError):
        killed.run()
    outer.run()
    assert inner.state()[0] == "partial"
    assert (inner.directory / "shard-0").exists()


def test_with_upstream_gives_each_step_once_upstream_first(tmp_path: Path) -> None:
    a = step(tmp_path / "a")
    b, c = (step(tmp_path / name, upstream={"a": a}) for name in "bc")
    d = step(tmp_path / "d", upstream={"b": b, "c": c})
    assert [one.directory.name for one in with_upstream([d, c])] == ["a", "b", "c", "d"]


def test_contents_that_came_out_different_are_passed_on(tmp_path: Path) -> None:
    """One fingerprint, other bytes (as a GPU may give): what was built from the old ones is stale."""
    written = iter(["first", "second", "second"])

    def above(directory: Path) -> dict[str, Any]:
        (directory / "out").write_text(next(written))
        return {}

    def below(directory: Path) -> dict[str, Any]:
        (directory / "copy").write_text((upper.directory / "out").read_text())
        return {}

    upper = Step("capture", "above", tmp_path / "above", {}, above)
    lower = Step("align", "below", tmp_path / "below", {}, below, {"above": upper})
    for step in (upper, lower):
        assert step.run()
    (upper.directory / "out").unlink()
    assert upper.run()
    assert lower.state() == ("stale", "capture above was made again and came out different")
    assert lower.run()
    assert (lower.directory / "copy").read_text() == "second"
    (upper.directory / "out").unlink()
    assert upper.run()
    assert lower.state()[0] == "done", "the same bytes again change nothing"


# -- continuing -----------------------------------------------------------------------------------------------------------


def heard(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return lines


@pytest.fixture
def telling(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("fusechat"), "propagate", True)
    caplog.set_level(logging.INFO, logger="fusechat")
    return caplog


def test_a_step_done_anew_with_the_same_files_makes_nothing_after_it_stale(tmp_path: Path) -> None:
    """Another setting, or format, of the first; while it is not done again, nobody knows."""
    calls: list[str] = []

    def noted(directory: Path) -> dict[str, Any]:
        calls.append(directory.name)
        return writing()(directory)

    def chain(text: str = "whole", **changes: Any) -> list[Step]:
        above = step(tmp_path / "a", work=writing(text=text), **changes)
        between = step(tmp_path / "b", work=noted, upstream={"above": above})
        return [above, between, step(tmp_path / "c", work=noted, upstream={"between": between, "above": above})]

    for one in chain():
        one.run()
    again = chain(format=7)
    assert [each.state()[0] for each in again] == ["stale", "stale", "stale"]
    assert [each.run() for each in again] == [True, False, False]
    assert [each.state()[0] for each in chain(format=7)] == ["done", "done", "done"]
    assert calls == ["b", "c"]
    reader = step(tmp_path / "r", upstream={"above": again[0]}, reads_bulk=False)
    assert reader.run()
    anew = chain(format=9)
    anew[0].run()
    reader = step(tmp_path / "r", upstream={"above": anew[0]}, reads_bulk=False)
    assert reader.state()[0] == "stale", "who reads manifests reads other ones"
    other = chain("other", format=8)
    assert [each.run() for each in other] == [True, True, True]
    assert calls == ["b", "c", "b", "c"]


def test_settings_that_do_not_count_make_nothing_stale(tmp_path: Path) -> None:
    def without_pace(settings: Any) -> dict[str, Any]:
        return {key: value for key, value in settings.items() if key != "pace"}

    def of(k: int, pace: int, **changes: Any) -> Step:
        return step(tmp_path / "s", {"k": k, "pace": pace}, counted=without_pace, **changes)

    assert of(1, 1).fingerprint == of(1, 2).fingerprint != of(2, 1).fingerprint
    with pytest.raises(KilledError):
        of(1, 1, work=killed_after("shard-0")).run()
    assert of(1, 2).state()[0] == "partial"
    of(1, 2).run()
    assert of(1, 3).state() == ("done", "")
    assert read_json(tmp_path / "s" / MANIFEST)["inputs"]["settings"] == {"k": 1, "pace": 2}, "all are written down"
    assert of(2, 3).state() == ("stale", "settings.k changed")


def test_what_was_begun_from_other_contents_is_not_gone_on_from(
    tmp_path: Path, telling: pytest.LogCaptureFixture
) -> None:
    """One fingerprint, other bytes above: what a killed run, or a damaged step of whole files, has of the old ones goes."""
    texts = iter(["first", "second", "third"])
    above = step(tmp_path / "up", {"x": 1}, name="above", work=lambda directory: writing(text=next(texts))(directory))

    def lower(work: Any = None) -> Step:
        return step(tmp_path / "s", upstream={"up": above}, whole_files=True, work=work or shards)

    def shards(directory: Path) -> dict[str, Any]:
        for name in ("shard-0", "shard-1"):
            if not (directory / name).exists():
                writing(name, (tmp_path / "up" / "out.txt").read_text())(directory)
        return {}

    def read() -> list[str]:
        return [(tmp_path / "s" / f"shard-{number}").read_text() for number in (0, 1)]

    def again() -> None:
        (tmp_path / "up" / "out.txt").unlink()
        assert above.run()

    def killed(directory: Path) -> dict[str, Any]:
        shards(directory)
        (directory / "shard-1").unlink()
        raise KilledError

    above.run()
    with pytest.raises(KilledError):
        lower(killed).run()
    assert lower().state()[0] == "partial"
    again()
    why = "capture above was made again and came out different"
    assert lower().state() == ("absent", f"begun, not finished; since then {why}")
    telling.clear()
    lower().run()
    assert read() == ["second", "second"]
    [line] = heard(telling)
    assert re.sub(r"[\d.]+ s", "0 s", line) == (
        f"capture pivot cannot be continued (begun, not finished; since then {why}): doing it again"
        "; removed: shard-0 (5 bytes, of 0 s)"
    )
    again()
    (tmp_path / "s" / "shard-1").unlink()
    assert lower().state() == ("stale", why), "not damaged: the other file would be kept"
    lower().run()
    assert read() == ["third", "third"]


def test_a_manifest_tells_what_the_work_began_from(tmp_path: Path) -> None:
    """Not what lies there when it ends: another process may have made it again meanwhile."""
    above = step(tmp_path / "up", {"x": 1}, work=writing(text="first"))
    above.run()

    def work(directory: Path) -> dict[str, Any]:
        made = writing("copy", (tmp_path / "up" / "out.txt").read_text())(directory)
        (tmp_path / "up" / "out.txt").unlink()
        step(tmp_path / "up", {"x": 1}, work=writing(text="other")).run()
        return made

    below = step(tmp_path / "s", upstream={"up": above}, work=work)
    below.run()
    assert below.state() == ("stale", "capture pivot was made again and came out different")


def test_what_is_done_again_is_told_with_how_long_it_took(tmp_path: Path, telling: pytest.LogCaptureFixture) -> None:
    """Of all runs that were at it: two that were killed, an hour and two minutes of work, and the last one's."""
    directory = tmp_path / "s"
    for seconds in (3600, 120):
        with pytest.raises(KilledError):
            step(directory, work=killed_after(f"shard-{seconds}")).run()
        began = read_json(directory / STARTED)["began"]
        for file in directory.glob("shard-*"):
            os.utime(file, (0, began + seconds if file.name == f"shard-{seconds}" else began))
    assert step(directory, {"k": 2}).state()[1] == "begun, not finished; since then settings.k changed"
    step(directory).run()
    timings = read_json(directory / MANIFEST)["timings"]
    assert timings["seconds_before"] == pytest.approx(3720, abs=1)
    telling.clear()
    step(directory, {"k": 2}).run()
    [line] = heard(telling)
    names = "out.txt, shard-120, shard-3600"
    assert (
        line
        == f"capture pivot is stale (settings.k changed): doing it again; removed: {names} (15 bytes, of 1 h 2 min)"
    )
    (directory / MANIFEST).write_text("{")
    step(directory, {"k": 2}).run()
    [line] = heard(telling)
    assert line.startswith(
        "capture pivot cannot be continued (its manifest is damaged): doing it again; removed: out.txt"
    )
