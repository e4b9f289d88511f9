"""Texts that are hard to cut into tokens, and conversations with them: those for which the vocabularies here were cut."""

import json
from pathlib import Path

import tiny

EXAMPLES = Path(__file__).parents[1] / "examples" / "data"
ODD = (
    "```python\ndef größer(a, b):\n    return a if a > b else b  # 👍🏽\n```\n\n- 北京是中国的首都。\n- 日本の首都は東京です。",
    "  Ça va ? Über 12,345.67 €… naïve café — Москва, שלום, 한국어 🏳️‍🌈👩‍👩‍👧!\r\n\tif (x) {\n\t\treturn {'a': [0]};\n\t}",
    "Internationalization and counterrevolutionaries: 3.14159265358979, 2024-11-22.",
)
PIECES = [
    *("Hello", " world", "  ", "   x", "\t", "\r\n", "\n\n", "2024", "3.14", "31415926535897932384626433"),
    *("▁", "Ġ", "<0x41>", "<0x3C>", "Ċ", "##ing", "ﬁ", "Ａ", "İ", "if (x):\n\treturn {'a': [0]}  # ok\n    "),
    *("日本語", "你好，", "한국어", "👍🏽", "👩‍👩‍👧", "🏳️‍🌈", "👨🏿‍🚀", "שלום", "مرحبا", "भाषा", "ไทย"),
    *("e\u0301", "a\u0323\u0307", "\u1100\u1161\u11a8", "\u0958"),
    *("\u200f", "\u202e", "\x00", "\x1b", "\x1c", "\x7f", "\x85", "\u00a0", "\u2028", "\u3000", "\ufeff", "\ufffd"),
    *("𝄞", "\U0010ffff", "\ue000"),
    *("<s>", "</s>", "<unk>", "<|im_end|>", "<|im_start|>", "<eos>", "<bos>", "<pad>"),
    *("<|endoftext|>", "<|end_of_turn|>"),
]
PROMPTS = ("Go on.", "Be short.", "Schreibe „Größe“ auf 日本語 und 🙂.", "And مرحبا?", "You are a helpful assistant")
NAMES = ("system\n", "user\n", "assistant\n", "GPT4 Correct User: ", "GPT4 Correct Assistant: ", "[INST] ", " [/INST]")


def conversations() -> list[list[dict[str, str]]]:
    """A few of this project's own: sums in English, questions in ten languages."""
    files = ("knowledge.train", 12), ("arithmetic.train", 6)
    lines = [(EXAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count] for name, count in files]
    return [json.loads(line)["messages"] for few in lines for line in few]


def every() -> list[str]:
    messages = [message["content"] for one in conversations() for message in one]
    pieces = ["".join(PIECES), " ".join(PIECES), *PIECES, *(f" {piece}" for piece in PIECES)]
    return [*ODD, *PROMPTS, *NAMES, *tiny.LINES, *messages, *pieces]
