"""The parameters of merge methods, named as in mergekit."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method. `kind` is float, bool or int. Without a `default` it is required. `per_model`: each input may
    have its own value. Numbers lie in [`low`, `high`]."""

    name: str
    kind: type = float
    default: Any = None
    per_model: bool = False
    low: float | None = None
    high: float | None = None

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is None


# Values by parameter name, for one tensor: a number or bool, or a list with one for each input.
Values = dict[str, Any]

# Granularities: what shares the coefficients of a method that computes them from updates.
SCOPES = ("tensor", "layer", "model")
WEIGHT = Parameter("weight", per_model=True)
DENSITY = Parameter("density", default=1.0, per_model=True, low=0, high=1)
LAMBDA = Parameter("lambda", default=1.0)
SEED = Parameter("seed", kind=int, default=0, low=0)
