"""`merge_report.json`: what was done with each tensor, and totals."""

from collections.abc import Mapping
from typing import Any

from fusechat.merge.card import portable
from fusechat.merge.engine import MergeJob


def make_report(job: MergeJob, tensors: dict[str, Any]) -> dict[str, Any]:
    """The report, from one entry for each tensor.

    An entry has `coefficients` of each target; `selected`, the share of entries not dropped; `erased`, the share of kept updates
    zeroed by sign; `updates` and `merged_update`, root mean squares; or `copied`, and whether the models differ there.
    `mean_coefficients` is over the merged tensors.
    """
    merged = [entry["coefficients"] for entry in tensors.values() if "coefficients" in entry]
    return {
        "format": 1,
        "method": job.method,
        "granularity": job.granularity,
        "base": portable(job.inputs[0].label) if len(job.inputs) > len(job.names) else None,
        "targets": job.names,
        "mean_coefficients": {name: sum(entry[name] for entry in merged) / len(merged) for name in job.names}
        if merged
        else {},
        "left_out": job.plan.left_out,
        "only_in_base": job.plan.only_base,
        "tensors": tensors,
    }


def is_copy(report: Mapping[str, Any]) -> bool:
    """Whether the merged model is its one target, entry for entry."""
    return len(report["targets"]) == 1 and report["method"] == "sce"
