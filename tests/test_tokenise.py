"""Rows of a prepared conversation: which tokens they are, and where in the response's bytes those begin and end."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import normalizers

import tiny
from cases import each
from fusechat.data.conversations import Conversation, Message
from fusechat.data.prepared import Prepared, PreparedSet, write_prepared
from fusechat.models.templates import ChatTemplate
from fusechat.models.tokenise import RejectedError, prepare_conversation

END_OF_TURN = {"llama": "<|im_end|>", "mistral": "</s>", "gemma": "<eos>"}
Row = tuple[int, int, int, int, bool, bool]  # position, response, begin, end, end of turn, lead


def conversation(*turns: str) -> Conversation:
    """User and assistant in turn."""
    return Conversation(
        tuple(Message(("user", "assistant")[index % 2], turn) for index, turn in enumerate(turns)), "here"
    )


def template_of(tokenizers: dict[str, Any], kind: str) -> ChatTemplate:
    return ChatTemplate(tokenizers[kind], tiny.TEMPLATES[kind], kind)


def rows_of(prepared: Prepared) -> list[Row]:
    columns = tuple(getattr(prepared, name) for name in ("position", "response", "begin", "end", "end_of_turn", "lead"))
    return list(zip(*(column.tolist() for column in columns), strict=True))


def naive_text(kind: str, turns: tuple[str, ...]) -> tuple[str, list[tuple[int, int, int, int]]]:
    """The rendered text, and of each response: where the model is asked, where the content begins and ends in bytes, and the
    bytes stripped from its front."""
    text = {"llama": f"<|im_start|>system\n{tiny.DEFAULT_SYSTEM}<|im_end|>\n", "mistral": "<s>", "gemma": "<bos>"}[kind]
    places = []
    for user, answer in zip(turns[::2], turns[1::2], strict=True):
        text += {
            "llama": f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n",
            "mistral": f"[INST] {user} [/INST] ",
            "gemma": f"Question: {user}\n\nAnswer: ",
        }[kind]
        written = answer.strip() if kind == "mistral" else answer
        asked, begin = len(text.rstrip(" ").encode()), len(text.encode())
        text += written
        stripped = len(answer.encode()) - len(answer.lstrip().encode()) if kind == "mistral" else 0
        places.append((asked, begin, len(text.encode()), stripped))
        text += END_OF_TURN[kind] + {"llama": "\n", "mistral": "", "gemma": "\n\n"}[kind]
    return text, places


def token_sizes(tokenizer: Any, ids: list[int], text: str) -> list[int]:
    """Bytes of the text that each token stands for, by decoding; good for text without marks in it."""
    sizes, at, data = [], 0, text.encode()
    for index, token in enumerate(ids):
        piece = tokenizer.convert_ids_to_tokens(token)
        if token in tokenizer.get_added_vocab().values():
            size = len(piece.encode())
        elif piece.startswith("<0x"):
            size = 1
        elif "ByteLevel" in str(tokenizer.backend_tokenizer.decoder):
            size = len(piece)  # a character a byte
        else:
            size = len(piece.replace("▁", " ").encode())
            after_added = index == 0 or ids[index - 1] in tokenizer.get_added_vocab().values()
            if after_added and tokenizer.backend_tokenizer.normalizer and piece.startswith("▁"):
                size -= 1  # the dummy prefix
        sizes.append(size)
        at += size
    assert at == len(data)
    return sizes


def naive_rows(tokenizer: Any, kind: str, turns: tuple[str, ...]) -> tuple[list[int], list[Row]]:
    """Every token against every response, by looking."""
    text, places = naive_text(kind, turns)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ending = tokenizer.convert_tokens_to_ids(END_OF_TURN[kind])
    starts = np.concatenate([[0], np.cumsum(token_sizes(tokenizer, ids, text))]).tolist()
    rows: list[Row] = []
    for number, (asked, begin, end, skipped) in enumerate(places):
        for position in range(len(ids)):
            first, last = starts[position], starts[position + 1]
            inside = first == last and asked <= first < end
            before = first < last and all(asked <= byte < begin for byte in range(first, last))
            if inside or before or (first < last and any(begin <= byte < end for byte in range(first, last))):
                place = first - begin + skipped, min(last, end) - begin + skipped
                rows.append((position, number, *place, False, last <= begin))
        position = next(p for p in range(len(ids)) if starts[p] >= end and ids[p] == ending)
        rows.append((position, number, end - begin + skipped, end - begin + skipped, True, False))
    return ids, rows


ANSWERS = st.text(st.sampled_from("the ab\n日é.1"), min_size=1, max_size=12).filter(lambda text: text.strip() != "")


@given(turns=st.lists(st.tuples(ANSWERS, ANSWERS), min_size=1, max_size=3).map(lambda pairs: sum(pairs, ())))
@example(turns=("the", "the", "the", "the"))
@example(turns=("a", " the "))
@example(turns=("a", "日</s>the"))
@example(turns=("a", "b</s>日"))  # a token without width inside the response
def test_rows_are_those_that_a_search_over_all_tokens_finds(tokenizers: dict[str, Any], turns: tuple[str, ...]) -> None:
    for kind in tiny.KINDS:
        prepared, done = prepare_conversation(conversation(*turns), template_of(tokenizers, kind), max_length=10_000)
        ids, rows = naive_rows(tokenizers[kind], kind, turns)
        assert prepared.input_ids.tolist() == ids
        assert rows_of(prepared) == rows
        assert prepared.gold.tolist() == [ids[row[0]] for row in rows]
        assert prepared.content_bytes.tolist() == [end - begin for _, begin, end, _ in naive_text(kind, turns)[1]]
        done.pop("control_tokens", None)  # some texts have names of such tokens
        assert done == {"truncated": False, "system_folded": False, "offsets": False, "other_class": False}


def test_a_token_that_takes_the_templates_space_begins_before_the_content(tokenizers: dict[str, Any]) -> None:
    """`[/INST] the`: the template's space and the content's first letters are one token of mistral's."""
    prepared, _ = prepare_conversation(conversation("Hi", "the"), template_of(tokenizers, "mistral"), max_length=99)
    assert tokenizers["mistral"].convert_ids_to_tokens(prepared.gold.tolist()) == ["▁the", "</s>"]
    assert [row[2:] for row in rows_of(prepared)] == [(-1, 3, False, False), (3, 3, True, False)]


def test_a_token_that_runs_past_the_content_ends_with_it(tokenizers: dict[str, Any]) -> None:
    """`a he the he `: the answer is the `t` of the token ` the`, which takes template text on both sides."""
    template = ChatTemplate(tokenizers["llama"], "{% for m in messages %}{{ m.content }}he {% endfor %}", "llama")
    prepared, _ = prepare_conversation(conversation("a ", "t"), template, max_length=99)
    assert tokenizers["llama"].convert_ids_to_tokens(prepared.gold.tolist()) == ["Ġthe"]
    assert [row[2:] for row in rows_of(prepared)] == [(-1, 1, False, False)]
    assert prepared.content_bytes.tolist() == [1]


def test_bytes_count_from_the_start_of_the_original_content_where_a_template_strips_it(
    tokenizers: dict[str, Any],
) -> None:
    """Spans of a model that keeps the content and of one that strips it compare."""
    turns = conversation("Hi", "\n\u3000x 1")  # four bytes are stripped
    kept, _ = prepare_conversation(turns, template_of(tokenizers, "llama"), max_length=99)
    stripped, _ = prepare_conversation(turns, template_of(tokenizers, "mistral"), max_length=99)
    assert kept.content_bytes.tolist() == [7]
    assert stripped.content_bytes.tolist() == [3]
    assert (int(kept.begin[0]), int(kept.end[-1])) == (0, 7)
    assert (int(stripped.begin.min()), int(stripped.end[-1])) in ((4, 7), (3, 7))  # 3: with the template's space
    assert stripped.end_of_turn.tolist()[-1]


def test_a_template_that_writes_its_begin_of_sequence_gets_no_second(tokenizers: dict[str, Any]) -> None:
    for kind in ("mistral", "gemma"):
        tokenizer = tokenizers[kind]
        prepared, _ = prepare_conversation(conversation("Hi", "Yo"), template_of(tokenizers, kind), max_length=99)
        assert prepared.input_ids.tolist().count(tokenizer.bos_token_id) == 1
        assert prepared.input_ids[0] == tokenizer.bos_token_id


def test_a_template_without_end_of_turn_gives_no_such_row(tokenizers: dict[str, Any]) -> None:
    template = ChatTemplate(tokenizers["gemma"], tiny.TEMPLATE_WITHOUT_END, "gemma")
    prepared, _ = prepare_conversation(conversation("a", "b", "c", "d"), template, max_length=99)
    assert not prepared.end_of_turn.any()
    assert prepared.content_bytes.tolist() == [1, 1]


@each("kind", tiny.KINDS)
def test_truncation_drops_whole_responses(tokenizers: dict[str, Any], kind: str) -> None:
    turns = ("Hi", "the one", "and", "the other one")
    template = template_of(tokenizers, kind)
    ids, rows = naive_rows(tokenizers[kind], kind, turns)
    last = {number: max(row[0] for row in rows if row[1] == number) for number in (0, 1)}
    for max_length in range(1, len(ids) + 3):
        if max_length <= last[0]:
            with pytest.raises(RejectedError, match=rf"first response ends after max_length \({max_length} tokens\)"):
                prepare_conversation(conversation(*turns), template, max_length=max_length)
            continue
        prepared, done = prepare_conversation(conversation(*turns), template, max_length=max_length)
        whole = max_length > last[1]
        assert rows_of(prepared) == [row for row in rows if whole or row[1] == 0]
        assert done["truncated"] is not whole
        expected = min(len(ids), max_length) if whole else last[0] + 1  # what follows the last response serves nothing
        assert prepared.input_ids.tolist() == ids[:expected]
        assert prepared.content_bytes.tolist() == [len(answer) for answer in turns[1::2]][: 2 if whole else 1]


@each("turns, reason", [
    ((), "it is empty"),
    (("Hi",), "no assistant turn"),
    (("Hi", ""), "an assistant turn is empty"),
    (("Hi", "Yo", "More", " \n"), "an assistant turn is empty"),
])  # fmt: skip
def test_reasons_of_rejection(tokenizers: dict[str, Any], turns: tuple[str, ...], reason: str) -> None:
    for kind in tiny.KINDS:
        with pytest.raises(RejectedError, match=reason):
            prepare_conversation(conversation(*turns), template_of(tokenizers, kind), max_length=99)


def test_what_cannot_be_rendered_or_predicted_is_rejected_with_its_reason(tokenizers: dict[str, Any]) -> None:
    lonely = Conversation((Message("system", "Be brief."), Message("assistant", "Yo")), "here")
    with pytest.raises(RejectedError, match="Only user and assistant roles"):
        prepare_conversation(lonely, template_of(tokenizers, "mistral"), max_length=99)
    bare = ChatTemplate(tokenizers["llama"], "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "bare")
    first = Conversation((Message("assistant", "Yo"), Message("user", "Hi")), "here")
    with pytest.raises(RejectedError, match="begins the text"):
        prepare_conversation(first, bare, max_length=99)


@each("answer, changed", [("cafe\u0301", True), ("caf\u00e9", False)])
def test_a_tokenizer_that_changes_the_text_is_reported(answer: str, changed: bool) -> None:
    tokenizer = tiny.tokenizer_of("llama")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    _, done = prepare_conversation(conversation("Hi", answer), ChatTemplate(tokenizer, None, "llama"), max_length=99)
    assert done == {"truncated": False, "system_folded": False, "offsets": changed, "other_class": False}


def test_prepared_conversations_survive_their_file(tokenizers: dict[str, Any], tmp_path: Any) -> None:
    written = [
        prepare_conversation(conversation(*turns), template_of(tokenizers, kind), max_length=999)[0]
        for kind in tiny.KINDS
        for turns in (("Hi", "Yo"), ("a", "日 b", "c", "d e"))
    ]
    assert write_prepared(tmp_path / "conversations.arrow", written) == 6
    found = PreparedSet(tmp_path)
    assert found.ids == [one.id for one in written]
    assert found.lengths().tolist() == [len(one.input_ids) for one in written]
    for one, other in zip(written, found, strict=True):
        assert other.input_ids.tolist() == one.input_ids.tolist()
        assert other.content_bytes.tolist() == one.content_bytes.tolist()
        assert rows_of(other) == rows_of(one)
