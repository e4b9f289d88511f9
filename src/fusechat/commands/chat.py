"""Chats with a model on the terminal."""

import sys
from pathlib import Path
from typing import Any

from fusechat.data.conversations import Message
from fusechat.errors import ModelError
from fusechat.models.chat_model import ChatModel, with_template
from fusechat.models.dates import day_of
from fusechat.models.reference import Reference


def talk(
    model: str,
    *,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str | None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Reads questions until the end of input and streams the answers to stdout, with the conversation as context.
    `chat_template`: the name of one of the model's own, or a file. Raises ModelError."""
    import torch
    from transformers import TextStreamer

    from fusechat.models.load import choose_device, default_dtype, stop_tokens, without_embedding
    from fusechat.models.templates import UnrenderableError

    reference = Reference.named(model, trust_remote_code=trust_remote_code)
    chat_model = with_template(ChatModel(model, reference, date=day_of(Path(model).resolve())), chat_template)
    template = chat_model.template()
    tokenizer, place = template.tokenizer, choose_device(device)
    network = chat_model.model(dtype=default_dtype(place), device=place)
    rows = int(network.get_input_embeddings().weight.shape[0])
    stops = stop_tokens(network.generation_config, tokenizer, template.end_of_turn)
    torch.manual_seed(seed)
    messages = [Message("system", system)] if system else []
    for question in _questions():
        messages.append(Message("user", question))
        try:
            text = template.prompt(messages)
        except UnrenderableError as error:
            raise ModelError(f"{model}: {error}") from None
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False).to(place)
        wrong = without_embedding(inputs["input_ids"][0].tolist(), rows, tokenizer)
        if wrong:
            raise ModelError(f"{model}: the question has {wrong}")
        with torch.inference_mode():
            output = network.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                temperature=temperature or None,
                top_p=None,
                top_k=None,
                eos_token_id=sorted(stops) or None,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops, default=0),
                streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            )
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        messages.append(Message("assistant", answer))


def _questions() -> Any:
    """Lines of standard input; on a terminal with a prompt, until an empty line or the end of input."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    print("Ask, and end with an empty line.", file=sys.stderr)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        yield question
