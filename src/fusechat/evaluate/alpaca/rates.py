"""Win rate, and win rate as it would be if the answers were as long as the baseline's (Dubois et al., 2024, section 3), both in
percent and as the library computes them."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fusechat.errors import RecipeError, first_line
from fusechat.evaluate.alpaca.data import INSTRUCTIONS, Annotation, is_official
from fusechat.evaluate.alpaca.library import Library, library
from fusechat.evaluate.records import Measurement

WIN_RATE, CONTROLLED = "win_rate", "length_controlled_win_rate"
_FEWEST = 5  # judgements for a fit: the folds of its cross-validation


def win_rate(annotations: Sequence[Annotation]) -> Measurement:
    """The mean of preference - 1 over what was judged, in percent; items are named by the place of their instruction."""
    items = {
        str(index): (100 * ((one.preference or 1.5) - 1), 1.0)  # the library: 0 is a draw, 1.5
        for index, one in enumerate(annotations)
        if one.preference is not None
    }
    missing = len(annotations) - len(items)
    if not items:
        return Measurement("all", WIN_RATE, {}, missing, why=_no_judgements(annotations))
    with library() as using:
        found = using.glm.get_winrate(
            [{"preference": one.preference} for one in annotations if one.preference is not None]
        )
    return Measurement(
        "all", WIN_RATE, items, missing, value=float(found["win_rate"]), standard_error=_number(found["standard_error"])
    )


def why_not_controlled(instructions: Sequence[str]) -> str | None:
    """Why these instructions can have no length-controlled rate: difficulties are known by their places in the official list."""
    if is_official(instructions):
        return None
    return f"needs AlpacaEval's {INSTRUCTIONS} instructions, all of them and in their order"


def length_controlled(annotations: Sequence[Annotation], gamed: Path) -> Measurement:
    """The mean of what a logistic regression on length, difficulty and model predicts at equal length. Instructions with an answer
    but no judgement are left out of the fit and predicted, as the library does; those without an answer are left out of both."""
    judged = sum(one.preference is not None for one in annotations)
    missing = len(annotations) - judged
    if not judged:
        return Measurement("all", CONTROLLED, {}, missing, why=_no_judgements(annotations))
    if judged < _FEWEST:
        return Measurement("all", CONTROLLED, {}, missing, why=f"{judged} judgements are too few for a fit")
    try:
        _, found = fit(annotations, gamed)
    except RecipeError:
        raise
    except Exception as error:  # of pandas, patsy or scikit-learn: mostly of lengths that are all the same
        return Measurement("all", CONTROLLED, {}, missing, why=f"the fit fails ({first_line(error)})")
    value = _number(found["length_controlled_winrate"])
    if value is None:
        return Measurement("all", CONTROLLED, {}, missing, why="the fit gives no number")
    # No items: what the fit predicts for each instruction is not measured there, and two fits differ by more than these tell.
    spread = _number(found["lc_standard_error"])
    return Measurement("all", CONTROLLED, {}, missing, value=value, standard_error=spread, n=judged)


def fit(annotations: Sequence[Annotation], gamed: Path) -> tuple[dict[int, float], dict[str, float]]:
    """What the library predicts for each instruction with an answer, by its place, as shares of wins at equal length; and its
    rates. Raises what the library does where it cannot be fitted."""
    rows = [(index, one) for index, one in enumerate(annotations) if one.output_2 is not None]
    columns = ("preference", "output_1", "output_2", "generator_1", "generator_2")
    with library() as using, _difficulties(using, gamed):
        # Without missing answers' rows, whose length is unknown; the index still tells the instruction's place.
        frame = using.pandas.DataFrame(
            {name: [getattr(one, name) for _, one in rows] for name in columns}, index=[index for index, _ in rows]
        )
        frame["preference"] = frame["preference"].astype(float)
        found = using.glm.get_length_controlled_winrate(frame, save_weights_dir=None, is_warn_extreme_changes=False)
    return {int(index): float(value) for index, value in frame["glm_preference"].dropna().items()}, found


def not_controlled(annotations: Sequence[Annotation], why: str) -> Measurement:
    missing = sum(one.preference is None for one in annotations)
    return Measurement("all", CONTROLLED, {}, missing, why=why)


@contextmanager
def _difficulties(using: Library, gamed: Path) -> Iterator[None]:
    """The library asks the hub for df_gamed.csv and has no parameter for a file: the function that it calls for it is replaced."""
    original = using.glm.hf_hub_download
    using.glm.hf_hub_download = lambda **_: str(gamed)
    try:
        yield
    finally:
        using.glm.hf_hub_download = original


def _no_judgements(annotations: Sequence[Annotation]) -> str:
    reasons = Counter(one.missing for one in annotations if one.missing).most_common(1)
    return f"no judgements: {reasons[0][0]}" if reasons else "no judgements"


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
