"""Talking to a model on the terminal."""

import sys
from pathlib import Path
from typing import Any

from fusechat.core.chatters import Chatter
from fusechat.core.references import Reference
from fusechat.errors import ModelError


def talk(
    model: str, *, system: str | None, max_new_tokens: int, temperature: float, seed: int, device: str | None
) -> None:
    """Reads questions until the end of input and streams the answers to stdout, keeping the conversation."""
    import torch
    from transformers import TextStreamer

    from fusechat.core.models import choose_device

    reference = Reference((str(Path(model).resolve()) if Path(model).exists() else model,))
    problem = reference.check()
    if problem:
        raise ModelError(problem)
    chatter = Chatter(model, reference)
    tokenizer = chatter.tokenizer()
    end_of_turn = chatter.template().end_of_turn
    place = choose_device(device)
    network = chatter.model(dtype="bfloat16" if place.type == "cuda" else "float32", device=place)
    torch.manual_seed(seed)
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    for question in _questions():
        messages.append({"role": "user", "content": question})
        inputs = _prompt(tokenizer, messages, place)
        stops = {token for token in (end_of_turn, tokenizer.eos_token_id) if token is not None}
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
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})


def _prompt(tokenizer: Any, messages: list[dict[str, str]], device: Any) -> dict[str, Any]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return dict(tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False).to(device))


def _questions() -> Any:
    """Lines of standard input; on a terminal with a prompt, an empty line or the end of input ends the talk."""
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
