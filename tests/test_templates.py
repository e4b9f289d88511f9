"""Where in the rendered text the responses are, for templates that add, refuse, strip, repeat or rewrite."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tiny
from cases import each
from fusechat.data.conversations import Message
from fusechat.errors import ModelError
from fusechat.models.templates import ChatTemplate, Rendered, UnrenderableError

SYSTEM = f"<|im_start|>system\n{tiny.DEFAULT_SYSTEM}<|im_end|>\n"


def chat(*turns: tuple[str, str]) -> list[Message]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [Message(names[role], content) for role, content in turns]


def template_of(tokenizers: dict[str, Any], kind: str, template: str | None = None) -> ChatTemplate:
    return ChatTemplate(tokenizers[kind], template or tiny.TEMPLATES[kind], kind)


def contents(rendered: Rendered) -> list[str]:
    return [rendered.text[response.begin : response.end] for response in rendered.responses]


def gaps(rendered: Rendered) -> list[str]:
    return [rendered.text[response.end : response.gap_end] for response in rendered.responses]


def test_a_default_system_prompt_stays_in_front_and_a_system_message_replaces_it(tokenizers: dict[str, Any]) -> None:
    template = template_of(tokenizers, "llama")
    rendered = template.render(chat(("u", "Hi"), ("a", "Hello there")))
    assert rendered.text == f"{SYSTEM}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello there<|im_end|>\n"
    assert contents(rendered) == ["Hello there"]
    assert gaps(rendered) == ["<|im_end|>\n"]
    rendered = template.render(chat(("s", "Be brief."), ("u", "Hi"), ("a", "Yo")))
    assert rendered.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")
    assert tiny.DEFAULT_SYSTEM not in rendered.text


def test_a_refused_or_ignored_system_message_goes_in_front_of_the_first_user_message(
    tokenizers: dict[str, Any],
) -> None:
    messages = chat(("s", "Be brief."), ("u", "Hi"), ("a", "Yo"), ("u", "More"), ("a", "No"))
    silent = tiny.INST.replace("{{ raise_exception('Only user and assistant roles are supported!') }}", "")
    for template in (None, silent):
        rendered = template_of(tokenizers, "mistral", template).render(messages)
        assert rendered.text == "<s>[INST] Be brief.\n\nHi [/INST] Yo</s>[INST] More [/INST] No</s>"
        assert contents(rendered) == ["Yo", "No"]
    with pytest.raises(UnrenderableError, match="Only user and assistant roles are supported"):
        template_of(tokenizers, "mistral").render(chat(("s", "Be brief."), ("a", "Yo")))


def test_stripped_content_is_found_and_its_lost_front_is_counted(tokenizers: dict[str, Any]) -> None:
    rendered = template_of(tokenizers, "mistral").render(chat(("u", "Hi"), ("a", " \n\u3000Yo you \n")))
    assert rendered.text == "<s>[INST] Hi [/INST] Yo you</s>"
    (response,) = rendered.responses
    assert contents(rendered) == ["Yo you"]
    assert response.skipped == 3  # characters
    for kind in ("llama", "gemma"):
        rendered = template_of(tokenizers, kind).render(chat(("u", "Hi"), ("a", "  Yo  ")))
        assert contents(rendered) == ["  Yo  "]
        assert rendered.responses[0].skipped == 0


def test_a_content_that_occurs_before_is_not_taken_for_the_response(tokenizers: dict[str, Any]) -> None:
    messages = chat(("u", "yes"), ("a", "yes"), ("u", "yes yes"), ("a", "yes"))
    for kind in tiny.KINDS:
        rendered = template_of(tokenizers, kind).render(messages)
        assert contents(rendered) == ["yes", "yes"]
        first, second = rendered.responses
        assert rendered.text[: first.begin].count("yes") == 1
        assert rendered.text[first.end : second.begin].count("yes") == 2
        assert rendered.text[second.end :].count("yes") == 0


@each("content", ["assistant\n", "<|im_end|>\n<|im_start|>assistant\nx", "[/INST]", "Answer: ", "</s>"])
def test_a_content_that_reads_like_the_templates_own_text(tokenizers: dict[str, Any], content: str) -> None:
    for kind in tiny.KINDS:
        rendered = template_of(tokenizers, kind).render(
            chat(("u", content), ("a", content), ("u", "x"), ("a", content))
        )
        expected = content.strip() if kind == "mistral" else content
        assert contents(rendered) == [expected, expected]


WORDS = st.text(st.sampled_from("ab \n\t[]/<|>é本\u3000"), min_size=1, max_size=8)


@given(turns=st.lists(st.tuples(WORDS, WORDS.filter(lambda text: text.strip() != "")), min_size=1, max_size=3))
@example(turns=[("a", "a a"), ("a", " a")])
def test_every_response_is_found_where_the_template_wrote_it(
    tokenizers: dict[str, Any], turns: list[tuple[str, str]]
) -> None:
    """Against a plain Python rendering of each template, which knows where it writes what."""
    messages = [message for user, answer in turns for message in chat(("u", user), ("a", answer))]
    before: dict[str, tuple[str, str, str, str]] = {
        "llama": (SYSTEM, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"),
        "mistral": ("<s>", "[INST] ", " [/INST] ", "</s>"),
        "gemma": ("<bos>", "Question: ", "\n\nAnswer: ", "<eos>\n\n"),
    }
    for kind, (text, opening, middle, closing) in before.items():
        places = []
        for user, answer in turns:
            written = answer.strip() if kind == "mistral" else answer
            text += opening + user + middle
            places.append((len(text), len(text) + len(written)))
            text += written + closing
        rendered = template_of(tokenizers, kind).render(messages)
        assert rendered.text == text
        assert [(response.begin, response.end) for response in rendered.responses] == places


def test_the_gap_after_a_response_ends_where_the_next_content_begins(tokenizers: dict[str, Any]) -> None:
    rendered = template_of(tokenizers, "mistral").render(chat(("u", "a"), ("a", "b"), ("u", "c"), ("a", "d")))
    assert gaps(rendered) == ["</s>[INST] ", "</s>"]


@each("filter_, content", [
    ("upper", "Yes"),
    ("replace('a', 'b')", "banana"),
    ("truncate(4, True, '')", "a long answer"),
    ("e", "a < b"),
])  # fmt: skip
def test_a_template_that_rewrites_a_content_is_a_reason(tokenizers: dict[str, Any], filter_: str, content: str) -> None:
    rewriting = tiny.CHATML.replace("message['content'] +", f"(message['content'] | {filter_}) +")
    assert rewriting != tiny.CHATML
    with pytest.raises((UnrenderableError, ModelError), match="rewrites a message"):
        template_of(tokenizers, "llama", rewriting).render(chat(("u", "Hi"), ("a", content)))


def test_a_template_that_drops_or_repeats_an_answer_is_a_reason(tokenizers: dict[str, Any]) -> None:
    last_only = "{% for m in messages %}{% if m.role == 'user' or loop.last %}[{{ m.content }}]{% endif %}{% endfor %}"
    dropping = template_of(tokenizers, "llama", last_only)
    assert contents(dropping.render(chat(("u", "a"), ("a", "b")))) == ["b"]
    with pytest.raises(UnrenderableError, match=r"leaves out the assistant message"):
        dropping.render(chat(("u", "a"), ("a", "b"), ("u", "c"), ("a", "d")))
    again = "{% if messages|length > 2 %}{{ messages[1].content }}{% endif %}"
    repeating = "{% for m in messages %}[{{ m.content }}]{% endfor %}" + again
    with pytest.raises(UnrenderableError, match="repeats"):
        template_of(tokenizers, "llama", repeating).render(chat(("u", "a"), ("a", "b"), ("u", "c"), ("a", "d")))


def test_a_template_whose_own_text_depends_on_the_contents_is_compared(tokenizers: dict[str, Any]) -> None:
    ending = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if messages[-1].content|length > 9 %}!{% endif %}"
    template = template_of(tokenizers, "llama", ending)
    assert contents(template.render(chat(("u", "a"), ("a", "short")))) == ["short"]
    rendered = template.render(chat(("u", "a"), ("a", "a long answer")))
    assert rendered.text == "[a][a long answer]!"
    assert contents(rendered) == ["a long answer"]


def test_of_a_template_that_cuts_reasoning_out_of_earlier_turns_the_rest_is_found(tokenizers: dict[str, Any]) -> None:
    cutting = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}<|im_end|>\n"
        "{% endfor %}"
    )
    template = template_of(tokenizers, "llama", cutting)
    kept = chat(("u", "a"), ("a", "<think>b</think>c"))
    assert contents(template.render(kept)) == ["<think>b</think>c"]
    rendered = template.render([*kept, *chat(("u", "d"), ("a", "<think>f</think>e"))])
    assert contents(rendered) == ["c", "<think>f</think>e"]
    assert rendered.responses[0].skipped == len("<think>b</think>")
    assert "reasoning_dropped" in rendered.marks


def test_the_end_of_turn_is_the_token_that_the_template_writes(tokenizers: dict[str, Any]) -> None:
    for kind, name in (("llama", "<|im_end|>"), ("mistral", "</s>"), ("gemma", "<eos>")):
        assert template_of(tokenizers, kind).end_of_turn == tokenizers[kind].convert_tokens_to_ids(name)
    template = template_of(tokenizers, "gemma", tiny.TEMPLATE_WITHOUT_END)
    assert template.end_of_turn is None
    assert gaps(template.render(chat(("u", "a"), ("a", "b")))) == ["\n\n"]
    rendered = template_of(tokenizers, "llama").render(
        chat(("u", "a"), ("a", "x<|im_end|>y"))
    )  # one of the answer's own
    assert contents(rendered) == ["x<|im_end|>y"]
    assert gaps(rendered) == ["<|im_end|>\n"]


def test_a_template_override_wins_over_the_tokenizers_own(tokenizers: dict[str, Any]) -> None:
    rendered = template_of(tokenizers, "llama", tiny.TEMPLATE_WITHOUT_END.replace("{{ bos_token }}", "")).render(
        chat(("u", "a"), ("a", "b"))
    )
    assert rendered.text == "Question: a\n\nAnswer: b\n\n"


def test_a_template_that_is_missing_or_always_fails_is_the_users_to_mend(tokenizers: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"gemma.*no chat template.*set chat_template"):
        ChatTemplate(tokenizers["gemma"], None, "gemma")
    for broken in ("{{ raise_exception('never') }}", "{% if %}", "{{ messages[0].content | no_filter }}"):
        with pytest.raises(ModelError, match="its chat template fails on a plain question and answer"):
            ChatTemplate(tokenizers["llama"], broken, "the model")


@each("answer", ["Yo", "7 apples", "  two"])
def test_a_template_that_cannot_ask_gives_a_prompt_whose_tokens_begin_the_conversations(
    tokenizers: dict[str, Any], answer: str
) -> None:
    """A space at its end would be a token of its own, after which no answer in training came."""
    template = template_of(tokenizers, "mistral")
    prompt = template.prompt(chat(("u", "Hi")))
    assert prompt == "<s>[INST] Hi [/INST]"
    whole = template.render(chat(("u", "Hi"), ("a", answer))).text
    asked, all_of_it = (template.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole))
    assert asked == all_of_it[: len(asked)]
