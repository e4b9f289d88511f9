"""`fuse.training`: any of Transformers' TrainingArguments by name, checked without importing Transformers."""

import ast
import difflib
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# What FuseChat sets itself, and why.
RESERVED = {
    "output_dir": "checkpoints live in the work directory",
    "overwrite_output_dir": "checkpoints live in the work directory",
    "resume_from_checkpoint": "FuseChat resumes by itself",
    "remove_unused_columns": "the batches are FuseChat's own",
    "label_names": "the batches are FuseChat's own",
    "seed": "set seed at the top of the recipe",
    "data_seed": "set seed at the top of the recipe",
    "use_cpu": "set device at the top of the recipe",
    "do_train": "FuseChat decides what runs",
    "do_eval": "FuseChat decides what runs",
    "do_predict": "FuseChat decides what runs",
    "label_smoothing_factor": "the loss is FuseChat's own",
    "disable_tqdm": "the progress bar is FuseChat's own",
    "save_only_model": "an interrupted run could not resume exactly",
}


@lru_cache(maxsize=1)
def known_names() -> frozenset[str]:
    """The fields of TrainingArguments, read from its source: importing it takes seconds."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return frozenset()
    tree = ast.parse((Path(spec.origin).parent / "training_args.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
            return frozenset(
                field.target.id
                for field in node.body
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            )
    return frozenset()


def check_names(training: dict[str, Any]) -> list[str]:
    """A line for each name that cannot be set."""
    problems = []
    for name in training:
        if name in RESERVED:
            problems.append(f"{name} cannot be set: {RESERVED[name]}")
        elif name not in known_names():
            close = difflib.get_close_matches(name, known_names(), n=1)
            problems.append(f"unknown training argument {name}" + (f"; did you mean {close[0]}?" if close else ""))
    return problems
