"""A merged model's files besides its weights: the donor's configuration, tokenizer, template and licence, and a model card."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fusechat.merge.card import portable, render_card
from fusechat.merge.checkpoint import read_config
from fusechat.merge.plan import CODES, OutputTensor, Plan
from fusechat.models.companion_files import beside
from fusechat.models.facts import front_matter
from fusechat.run.files import atomic_file, write_text
from fusechat.run.progress import log


def copy_files(donor: Path, output: Path, plan: Plan) -> None:
    """Copies the files, and writes the configuration with the weights' main dtype and untied embeddings."""
    for file in beside(donor):
        (output / file.relative_to(donor)).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(output / file.relative_to(donor)) as temporary:
            temporary.write_bytes(file.read_bytes())
        if file.suffix in (".safetensors", ".bin"):  # of further modules of sentence-transformers
            log.warning("%s: is copied from %s as it is, and not merged", file.relative_to(donor), donor)
    config = read_config(donor)
    dtype = _main_dtype(plan.pieces) or config.get("dtype", config.get("torch_dtype"))
    for part in (config, *(config[key] for key in ("text_config",) if isinstance(config.get(key), dict))):
        for key in ("torch_dtype", "dtype"):
            if key in part:
                part[key] = dtype
        if plan.untied:
            part["tie_word_embeddings"] = False
    if dtype and "torch_dtype" not in config:
        config["dtype"] = dtype
    write_text(output / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _main_dtype(pieces: list[OutputTensor]) -> str | None:
    """PyTorch's name for the dtype of most elements; None if all are integers."""
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts[piece.dtype] += piece.size
    names = {code: name for name, code in CODES.items()}
    return next((names[code] for code, _ in counts.most_common() if code in names), None)


def merge_card(
    name: str,
    *,
    base: str | None,
    targets: list[str],
    donor: str,
    donor_card: Path,
    config: Mapping[str, Any],
    report: dict[str, Any],
) -> str:
    """The model card in Markdown, with the hub's metadata header; licence and languages are the donor's."""
    metadata = {key: value for key, value in front_matter(donor_card).items() if key in _KEPT}
    models = [*([base] if base else []), *targets]
    metadata |= {"library_name": "transformers", "tags": ["merge", "fusechat"], "base_model": portable(models)}
    return render_card(
        "merge_card.md.j2",
        name=name,
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        method=report["method"],
        base=base,
        targets=targets,
        donor=donor,
        coefficients=report["mean_coefficients"],
        config=yaml.safe_dump(portable(dict(config)), sort_keys=False, allow_unicode=True, width=100),
    )


_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
