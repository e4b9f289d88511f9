"""The vocabularies that were cut: the tests' texts have the tokens of the whole ones."""

from pathlib import Path

from tokenizers import Tokenizer

import cut_vocabularies
import texts

WHOLE = Path(__file__).parents[2] / "shared" / "tokenizers"  # next to some checkouts


def test_what_was_cut_still_holds_every_text() -> None:
    """No token is unknown; where the whole vocabularies are at hand, all are theirs."""
    for folder in sorted(path for path in cut_vocabularies.HERE.iterdir() if path.is_dir()):
        file, whole = folder / "tokenizer.json", WHOLE / folder.name / "tokenizer.json"
        tokenizer = Tokenizer.from_file(str(file))
        assert not [text for text in texts.every() if "<unk>" in tokenizer.encode(text).tokens and "<unk>" not in text]
        if whole.is_file():
            assert cut_vocabularies.differences(whole, file, texts.every()) == [], folder.name
