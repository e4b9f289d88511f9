"""Write the quickstart's data: questions for a word in another language, from the table `data/words.txt`.

Run `python examples/make_words.py`. For each language of the table it writes, next to it, `data/LANGUAGE.train.jsonl`, prompts
without answers, and `data/LANGUAGE.held-out.jsonl`, the same words asked for in a form that no prompt has; and
`data/new-words.held-out.jsonl`, words that no prompt asks for. References are the table's. The same SEED always gives the same
bytes. With `--validation DIR` it writes held-out files of another form and other words there, on which settings can be chosen.
With `--gold DIR` it writes the prompts with the table's answers there, to compare with.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

SEED = 1
# Words asked for in training, and never; those of the former that are held out in a new form.
TRAINED, NEW, HELD_OUT = 80, 50, 50
PROMPTS = ("What is '{word}' in {language}?", "Translate '{word}' into {language}.", "{language} for '{word}'?")
UNSEEN, VALIDATION = "How do you say '{word}' in {language}?", "Which {language} word means '{word}'?"
DATA = Path(__file__).parent / "data"

Words = list[dict[str, str]]  # language → word; other languages than English: all right ones, with commas between


def read(path: Path) -> Words:
    """The rows of the table in an order of their own."""
    header, *rows = ([cell.strip() for cell in line.split("|")] for line in path.read_text("utf-8").splitlines())
    words = [dict(zip(header, row, strict=True)) for row in rows]
    Random(SEED).shuffle(words)
    return words


def prompts(words: Words, language: str) -> Iterable[dict[str, Any]]:
    for form in PROMPTS:
        for word in words:
            yield {"prompt": form.format(word=word["English"], language=language)}


def answered(words: Words, language: str, *forms: str) -> Iterable[dict[str, Any]]:
    for form in forms:
        for word in words:
            right = word[language].split(", ")
            asked = form.format(word=word["English"], language=language)
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": right[0]}]
            yield {"messages": messages, "reference": right}


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's data.")
    parser.add_argument("--validation", type=Path, metavar="DIR", help="write files to choose settings on, to DIR")
    parser.add_argument("--gold", type=Path, metavar="DIR", help="write the prompts with right answers, to DIR")
    given = parser.parse_args()
    words = read(DATA / "words.txt")
    _, *languages = sorted(words[0], key=lambda language: language != "English")
    trained, new, others = words[:TRAINED], words[TRAINED : TRAINED + NEW], words[TRAINED + NEW :]
    directory = given.gold or given.validation or DATA
    directory.mkdir(exist_ok=True)
    for language in languages:
        records = answered(trained, language, *PROMPTS) if given.gold else prompts(trained, language)
        if not given.validation:
            write(directory / f"{language.lower()}.train.jsonl", records)
    if given.gold:
        return
    form, asked, never = (
        (VALIDATION, trained[-HELD_OUT:], others[:NEW]) if given.validation else (UNSEEN, trained[:HELD_OUT], new)
    )
    for language in languages:
        write(directory / f"{language.lower()}.held-out.jsonl", answered(asked, language, form))
    every = [record for language in languages for record in answered(never, language, form)]
    write(directory / "new-words.held-out.jsonl", every)


if __name__ == "__main__":
    main()
