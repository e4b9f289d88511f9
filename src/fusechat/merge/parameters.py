"""What a merging method can be told: the parameters of its configuration, as mergekit names them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Parameter:
    """`kind` is float, bool or int. Without a `default` it must be given. `per_model`: one value for every input, which may
    differ; else one for all. Numbers lie between `low` and `high`, both allowed."""

    name: str
    kind: type = float
    default: Any = None
    per_model: bool = False
    low: float | None = None
    high: float | None = None

    @property
    def required(self) -> bool:
        return self.default is None


# By parameter name, resolved for one tensor: a number or truth value, or a list of them, one for each input.
Values = dict[str, Any]

# Over what the coefficients of a method that takes them from updates are the same.
SCOPES = ("tensor", "layer", "model")
WEIGHT = Parameter("weight", per_model=True)
DENSITY = Parameter("density", default=1.0, per_model=True, low=0, high=1)
LAMBDA = Parameter("lambda", default=1.0)
SEED = Parameter("seed", kind=int, default=0, low=0)
