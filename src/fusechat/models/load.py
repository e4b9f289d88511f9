"""Loads models with Transformers. Never runs remote code that the recipe does not trust, and never unpickles."""

import os
from collections.abc import Iterable
from functools import cache
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch

from fusechat.errors import ModelError, first_line
from fusechat.models.forward import keeps_logits
from fusechat.models.library_internals import cpu_multiplies_bfloat16
from fusechat.run import ranks
from fusechat.run.extras import not_installed
from fusechat.run.files import read_json
from fusechat.run.progress import log

DeviceMap = str | dict[str, int | str]  # `auto` and others, or a device (or `disk`) for every module
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def quiet_transformers() -> None:
    """Silences the libraries' progress bars and advice; errors are still shown."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("accelerate.big_modeling").setLevel(ERROR)  # the user chose the device map


def vocabulary_size(directory: Path, *, trust_remote_code: bool = False) -> int:
    """The number of rows of the embedding, by the configuration; reads no weights."""
    try:
        return int(read_configuration(directory, trust_remote_code=trust_remote_code).get_text_config().vocab_size)
    except AttributeError as error:
        raise ModelError(f"{directory}: its configuration has no vocab_size") from error


def check_causal(directory: Path, *, trust_remote_code: bool = False) -> None:
    """Raises ModelError if the configuration is not of a causal language model of Transformers or of trusted code."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = read_configuration(directory, trust_remote_code=trust_remote_code)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in (
        getattr(config, "auto_map", None) or {}
    ):
        raise ModelError(f"{directory}: its configuration makes no causal language model: {type(config).__name__}")


def read_configuration(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """Transformers' configuration of a model directory. Raises ModelError."""
    quiet_transformers()
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise model_error(directory, "its configuration", error) from error


def without_embedding(tokens: Iterable[int], rows: int, tokenizer: Any) -> str | None:
    """The end of a message if one of `tokens` has no row in an embedding of `rows`, else None."""
    greatest = max(tokens, default=-1)
    if greatest < rows:
        return None
    return (
        f"token {greatest} ({tokenizer.convert_ids_to_tokens(int(greatest))}), and its configuration {rows} embeddings; model "
        "and tokenizer do not belong together"
    )


def padding(tokenizer: Any, rows: int) -> int:
    """The token at masked places of a batch: the tokenizer's padding, or another if that has no row in an embedding of `rows`."""
    token = tokenizer.pad_token_id
    return token if token is not None and token < rows else 0


def quantised(directory: Path) -> str | None:
    """The quantisation method in a model's configuration: bitsandbytes, gptq, awq, …; None for full weights."""
    try:
        found = read_json(directory / "config.json").get("quantization_config")
    except (OSError, ValueError, AttributeError):  # reported when the model is loaded
        return None
    return str(found.get("quant_method", "in some way")) if isinstance(found, dict) else None


def missing_package(directory: Path) -> str | None:
    """The message for quantised weights that need a package that is not installed, else None."""
    if not quantised(directory):
        return None
    quiet_transformers()
    from transformers.quantizers import AutoHfQuantizer

    try:
        how = read_json(directory / "config.json")["quantization_config"]
        AutoHfQuantizer.from_config(how, pre_quantized=True).validate_environment()
    except ImportError as error:
        return _reason(directory, error)
    except Exception:  # of many types; reported when the model is loaded
        pass
    return None


def _reason(directory: Path, error: Exception) -> str:
    """An error as one line, with the extra that installs a missing package for quantised weights."""
    if isinstance(error, ImportError) and quantised(directory) == "bitsandbytes":
        return not_installed("its weights are quantised by bitsandbytes, which", "bitsandbytes")
    return first_line(error)


def load_model(
    directory: Path,
    *,
    dtype: str,
    device: torch.device,
    device_map: DeviceMap | None = None,
    offload: Path | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Loads a causal language model in evaluation mode, in `dtype`, on `device` or as `device_map` says. Raises ModelError.

    With a `device_map` Accelerate spreads it, and may keep some weights in memory or on disk until needed; `offload`: a
    directory for those that must be written again. Quantised weights stay as stored. Do not move quantised or spread models.
    """
    quiet_transformers()
    from transformers import AutoModelForCausalLM

    if is_slow(dtype, device):
        _say_slow(device.type.upper())
    where: Any = device_map or ({"": device} if quantised(directory) else None)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            device_map=where,
            offload_folder=offload,
            dtype=DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below with their names
            output_loading_info=True,
        )
    except Exception as error:
        raise model_error(directory, "the model", error) from error
    refuse_missing(report, str(directory))
    if not keeps_logits(model):
        log.warning("%s computes logits at every position, not only at responses, which takes more memory", directory)
    return (model if where else model.to(device)).eval()


def refuse_missing(report: dict[str, Any], name: str) -> None:
    """Raises ModelError for weights that are missing, or have another shape. Transformers would initialise them at random."""
    for tensor, found, expected in sorted(report["mismatched_keys"]):
        raise ModelError(f"{name}: {tensor} is {list(found)} in the weights, and {list(expected)} by config.json")
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(f"{name}: lacks weights of its architecture: {', '.join(missing[:3])}{more}")


def choose_device(name: str | None) -> torch.device:
    """The device of the recipe, else CUDA, Apple's MPS or the CPU. Each of several processes on a machine has its own GPU.
    Raises ModelError for an unavailable device."""
    if torch.cuda.is_available() and name in (None, "cuda"):
        return torch.device("cuda", ranks.local_rank())
    if name:
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"device: {name!r} is unavailable ({str(error).splitlines()[0]})") from error
        return device
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device) -> str:
    """The default dtype of a model: bfloat16 on CUDA, for half the memory, else float32."""
    return "bfloat16" if device.type == "cuda" else "float32"


def fast_dtype(device: str | None) -> str:
    """bfloat16, or float32 if the recipe's device is here and has no bfloat16 arithmetic."""
    try:
        place = choose_device(device)
    except ModelError:
        return "bfloat16"
    return "bfloat16" if computes_bfloat16(place) else "float32"


def is_slow(dtype: str, device: torch.device) -> bool:
    """Whether float32 is known to be faster."""
    return dtype == "bfloat16" and device.type in ("cpu", "cuda") and not computes_bfloat16(device)


@cache
def _say_slow(device: str) -> None:
    log.info("this %s has no arithmetic for bfloat16: float32 is several times faster (dtype: auto chooses)", device)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16 without conversion. Some of Apple's do; this is not relied on."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return cpu_multiplies_bfloat16()
    return False


def generation_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """A model's own generation settings, from their file or from its configuration."""
    from transformers import GenerationConfig

    if (directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(directory)
    return GenerationConfig.from_model_config(read_configuration(directory, trust_remote_code=trust_remote_code))


def stop_tokens(generation_config: Any, tokenizer: Any, end_of_turn: int | None) -> set[int]:
    """Tokens that end an answer: the template's end of turn, and the end of sequence of tokenizer and model."""
    own = getattr(generation_config, "eos_token_id", None)
    every = (end_of_turn, tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]))
    return {token for token in every if token is not None}


def model_error(directory: Path, what: str, error: Exception) -> Exception:
    """A ModelError of one line if the user's model failed; other errors, of the disk or of FuseChat, unchanged."""
    if isinstance(error, MemoryError | AttributeError | NameError):
        return error
    reason = _reason(directory, error)
    if "trust_remote_code" in str(error):
        reason = "it needs custom code; set trust_remote_code: true for it if you trust that code"
    return ModelError(f"{directory}: {what} cannot be loaded: {reason}")
