"""What `fusechat merge` prints at the end."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fusechat.merge.standalone import Summary
from fusechat.run.progress import in_bytes


def print_summary(summary: Summary, out: Path, *, as_json: bool) -> None:
    """Prints a table of the targets and totals, or all as JSON, to standard output."""
    report, tensors = summary.report, summary.report["tensors"]
    merged = [entry for entry in tensors.values() if "coefficients" in entry]
    figures = {
        "out": str(out),
        "method": report["method"],
        "tensors": len(tensors),
        "merged": len(merged),
        "bytes_read": summary.read,
        "bytes_written": summary.written,
        "seconds": None if summary.seconds is None else round(summary.seconds, 3),
        "mean_coefficients": report["mean_coefficients"],
    }
    if as_json:
        print(json.dumps(figures, indent=1))
        return
    console = Console(markup=False)  # names and paths are shown as they are
    table = Table("model", "mean coefficient", "update (rms)")
    for name, coefficient in report["mean_coefficients"].items():
        sizes = [entry["updates"][name] for entry in merged if "updates" in entry]
        table.add_row(name, f"{coefficient:.4f}", f"{sum(sizes) / len(sizes):.3g}" if sizes else "")
    console.print(table)
    took = "" if summary.seconds is None else f" in {summary.seconds:.1f} s"
    console.print(
        f"{report['method']}: {len(merged)} tensors merged, {len(tensors) - len(merged)} copied; "
        f"{in_bytes(summary.read)} read, {in_bytes(summary.written)} written{took}",
        soft_wrap=True,
    )
    console.print(f"merged model: {out}", soft_wrap=True)
