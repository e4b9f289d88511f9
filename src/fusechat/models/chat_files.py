"""Writes the tokenizer and chat template of a model directory, so that other programs can chat with it."""

import copy
from pathlib import Path

from fusechat.models.chat_model import ChatModel
from fusechat.models.saved_template import asking
from fusechat.run.files import read_json, write_json
from fusechat.run.progress import log


def how_to_ask(chat_model: ChatModel, *, own_prompt: bool) -> str | None:
    """What a user must know to prompt a model trained on these conversations; mostly None."""
    return asking(chat_model.template(), own_prompt=own_prompt).note


def write_chat_files(chat_model: ChatModel, directory: Path, *, own_prompt: bool, name: str) -> None:
    """Writes the tokenizer to the directory of a trained model, with a chat template that prompts as it was trained. Adds the
    end of turn to the tokens that end generation. `own_prompt`: as for `asking`; `name`: the model's name in messages."""
    template = chat_model.template()
    found = asking(template, own_prompt=own_prompt)
    tokenizer = copy.deepcopy(template.tokenizer)  # it is shared
    tokenizer.chat_template = found.template
    ends = template.end_of_turn
    if (chat_model.chat_template is not None or chat_model.template_name) and ends is not None:
        end = tokenizer.convert_ids_to_tokens(ends)
        if tokenizer.eos_token != end and "eos_token" in found.template:
            log.warning(
                "%s: answers end with %s, but the template uses eos_token, which stays %s",
                name,
                end,
                tokenizer.eos_token,
            )
        else:
            tokenizer.eos_token = end
    tokenizer.save_pretrained(directory)
    if ends is not None:
        _add_end(directory, ends)
    if found.note is not None:
        (log.info if found.exact else log.warning)("%s: %s", name, found.note)


def _add_end(directory: Path, token: int) -> None:
    """Adds a token to those that end generation."""
    file = directory / "generation_config.json"
    if file.is_file():
        settings = read_json(file)
    else:  # without this file Transformers reads the model's configuration
        configuration = read_json(directory / "config.json")
        places = (configuration.get("text_config") or {}, configuration)
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        settings = {name: place[name] for place in places for name in names if place.get(name) is not None}
    ends = settings.get("eos_token_id")
    known = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if token not in known:
        write_json(file, settings | {"eos_token_id": [*known, token] if known else token})
