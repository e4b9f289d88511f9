"""What is merged in which way: one configuration in mergekit's format, which both tools read, and its output's exactness."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import safe_open

from fusechat.merge.random import keep_mask, tensor_key
from merging.models import BASE, TARGETS, WEIGHTS, Shape
from merging.reference import Difference, reference

# Fractions of two, which are what they are in bfloat16 too: what differs is arithmetic, and a sum of zero is zero.
SHARES = [0.375, 0.25, 0.1875, 0.125, 0.0625]


@dataclass(frozen=True)
class Case:
    """`weights`: one for every model of the configuration's list."""

    name: str
    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    weights: list[float] = field(default_factory=list)
    targets: int = len(TARGETS)
    in_mergekit: bool = True

    def inputs(self, models: Path) -> list[Path]:
        return [models / name for name in (BASE, *TARGETS[: self.targets])]

    @property
    def random(self) -> bool:
        return self.method.startswith("dare")

    def write_configuration(self, file: Path, models: Path) -> None:
        base, *targets = map(str, self.inputs(models))
        listed: list[dict[str, Any]] = [{"model": model} for model in targets]
        content: dict[str, Any] = {"merge_method": self.method, "base_model": base, "dtype": "bfloat16"}
        if self.method == "linear":  # the base is an input like any other
            del content["base_model"]
            listed.insert(0, {"model": base})
        for model, weight in zip(listed, self.weights, strict=False):
            model["parameters"] = {"weight": weight}
        content |= {"models": listed, "parameters": self.parameters}
        file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


CASES = [
    Case("sce-0.1", "sce", {"select_topk": 0.1}),
    Case("sce-1.0", "sce", {"select_topk": 1.0}),
    Case("varm", "varm", in_mergekit=False),
    Case("linear", "linear", weights=[0.5, *(share / 2 for share in SHARES)]),
    Case("task_arithmetic", "task_arithmetic", weights=SHARES),
    Case("ties", "ties", {"density": 0.6}, SHARES),
    Case("dare_linear", "dare_linear", {"density": 0.6}, SHARES),
    Case("dare_ties", "dare_ties", {"density": 0.6}, SHARES),
    Case("slerp", "slerp", {"t": 0.4}, targets=1),
]


def sample(shape: Shape, count: int) -> list[str]:
    """The embedding and `count` other tensors, drawn at random but always the same ones."""
    first, *others = shape.tensors()
    drawn = np.random.default_rng(0).permutation(len(others))[:count]
    return [first, *(others[place] for place in sorted(drawn))]


def compare(case: Case, models: Path, outputs: dict[str, Path], tensors: list[str]) -> dict[str, Difference]:
    """How far each tool's output (tool → directory) is from the float64 reference, over `tensors`.

    Of a method with random masks, the reference has FuseChat's.
    """
    differences = {tool: Difference() for tool in outputs}
    with ExitStack() as stack:
        inputs = [Stored(stack, model / WEIGHTS) for model in case.inputs(models)]
        stored = {tool: Stored(stack, *sorted(output.glob("*.safetensors"))) for tool, output in outputs.items()}
        for name in tensors:
            base, *targets = arrays = [each[name] for each in inputs]
            masks = list(dare_masks(case, name, base.shape)) if case.random else None
            expected = reference(case.method, case.parameters, base, targets, weights=case.weights, masks=masks)
            scale = np.maximum.reduce([abs(array) for array in arrays])
            for tool, difference in differences.items():
                difference.add(stored[tool][name], expected, scale)
    return differences


def dare_masks(case: Case, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Which updates FuseChat keeps, target by target, with the seed that it has when none is given."""
    for target in range(case.targets):
        mask = np.empty(int(np.prod(shape)), np.bool_)
        keep_mask(tensor_key(0, name), target, 0, case.parameters["density"], mask)
        yield mask.reshape(shape)


class Stored:
    """The tensors of a model's safetensors files by name, as float64."""

    def __init__(self, stack: ExitStack, *files: Path) -> None:
        opened = [stack.enter_context(safe_open(str(file), framework="pt")) for file in files]
        self._of = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (it is no dict)

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._of[name].get_tensor(name)
        assert tensor.dtype == torch.bfloat16, f"{name} is stored as {tensor.dtype}"
        array: np.ndarray = tensor.double().numpy()
        return array
