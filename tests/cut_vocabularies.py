"""Cuts real vocabularies to the tokens that the texts of the tests need: `python tests/cut_vocabularies.py DIRECTORY`.

DIRECTORY has a folder NAME with a `tokenizer.json` (BPE, of bytes or with byte fallback) for each folder of `tests/vocabularies`.
Kept are all merges that take place in the texts, and the first ones, which any other text has most: a merge that never takes place
can be left out without any change to what the others do. So the texts have the very tokens of the whole vocabulary.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

import texts

HERE = Path(__file__).with_name("vocabularies")
FIRST = 600  # merges that are kept in any case


def merges_of(word: list[str], rank: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """The merges that byte-pair encoding makes of these symbols, one after the other."""
    made = set()
    while True:
        found = min(
            ((rank[pair], at) for at, pair in enumerate(itertools.pairwise(word)) if pair in rank), default=None
        )
        if found is None:
            return made
        at = found[1]
        made.add((word[at], word[at + 1]))
        word = [*word[:at], word[at] + word[at + 1], *word[at + 2 :]]


def words_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """What the model is given: normalised, cut into words where the tokenizer does that."""
    normalised = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    if tokenizer.pre_tokenizer is None:
        return [normalised]
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalised)]


def between(text: str, added: list[str]) -> list[str]:
    """The parts of a text before, between and after tokens that are looked for in it."""
    parts = [text]
    for token in added:
        parts = [piece for part in parts for piece in part.split(token)]
    return [part for part in parts if part]


def cut(state: dict[str, Any], samples: list[str]) -> dict[str, Any]:
    """A `tokenizer.json` with the tokens that the samples need; their ids are the old ones' order."""
    tokenizer, model = Tokenizer.from_str(json.dumps(state)), state["model"]
    rank = {tuple(pair): place for place, pair in enumerate(model["merges"])}
    kept, symbols = set(list(rank)[:FIRST]), {token for token in model["vocab"] if token.startswith("<0x")}
    symbols |= {
        token for token in model["vocab"] if len(token) == 1 and (not model["byte_fallback"] or token.isascii())
    }
    added = [token["content"] for token in state["added_tokens"]]
    for word in {word for text in samples for part in between(text, added) for word in words_of(tokenizer, part)}:
        kept |= merges_of(list(word), rank)
        symbols |= set(word)
    tokens = {*symbols, *added, *(part for pair in kept for part in (*pair, "".join(pair)))}
    names = sorted((token for token in tokens if token in model["vocab"]), key=model["vocab"].__getitem__)
    number = {token: place for place, token in enumerate(names)}
    for token in state["added_tokens"]:
        number.setdefault(token["content"], len(number))
    merges = [list(pair) for pair in rank if pair in kept]
    vocabulary = {token: place for token, place in number.items() if token in model["vocab"]}
    listed = [{**token, "id": number[token["content"]]} for token in state["added_tokens"]]
    return {**state, "added_tokens": listed, "model": {**model, "vocab": vocabulary, "merges": merges}}


def differences(whole: Path, cut_one: Path, samples: list[str]) -> list[str]:
    """The texts that the two cut into different tokens."""
    one, other = (Tokenizer.from_file(str(file)) for file in (whole, cut_one))
    return [text for text in samples if one.encode(text).tokens != other.encode(text).tokens]


def main() -> None:
    for folder in sorted(path for path in HERE.iterdir() if path.is_dir()):
        whole, file = Path(sys.argv[1]) / folder.name / "tokenizer.json", folder / "tokenizer.json"
        state = cut(json.loads(whole.read_text(encoding="utf-8")), texts.every())
        file.write_text(json.dumps(state, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{folder.name}: {len(state['model']['vocab'])} tokens, {file.stat().st_size:,} bytes")
        if lost := differences(whole, file, texts.every()):
            sys.exit(f"{folder.name}: {len(lost)} texts have other tokens, {lost[0]!r}")


if __name__ == "__main__":
    main()
