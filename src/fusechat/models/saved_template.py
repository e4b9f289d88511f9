"""A chat template whose generation prompt is the asked prompt, for other programs than this one.

Some templates write text between their generation prompt and the answer of a whole conversation, so that a model that learned from
whole conversations is asked in a form that it never saw. What is saved with such a model is a template that asks as it was taught.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusechat.data.messages import Message
from fusechat.models.templates import OWN_PROMPT, ChatTemplate, UnrenderableError

_SWITCHES = ("enable_thinking", "thinking")  # variables that templates of reasoning models ask for
_USER, _ANSWER = Message("user", "Why?"), Message("assistant", "So it is.")
_PROBES = ([_USER], [Message("system", "Be brief."), _USER], [_USER, _ANSWER, _USER])


@dataclass(frozen=True)
class Asking:
    """`template`: the chat template to save. `note`: what a user of the model should know of it, None where it is as it was.
    `exact`: whether its generation prompt is what the model was trained after."""

    template: str
    note: str | None = None
    exact: bool = True


def asking(template: ChatTemplate, *, own_prompt: bool = False) -> Asking:
    """The template itself if it asks as it teaches, else with as little changed as makes it do so and leaves conversations as they
    are; where nothing does, the template itself and a note. Other programs set no variables of a recipe. `own_prompt`: the model
    learned most of its answers after the template's own generation prompt, though plain answers stand elsewhere."""
    if own_prompt and template.is_ambiguous:
        return Asking(
            OWN_PROMPT + _with_defaults(template.template, template.variables),
            "it was trained on answers that begin with reasoning, right after its chat template's generation prompt",
        )
    pairs = [(probe, prompt) for probe in _PROBES if (prompt := _prompt(template, probe)) is not None]
    texts = [_render(template, probe) for probe, _ in pairs]
    for changed, note in _candidates(template, pairs) if pairs else ():  # without a probe nothing is known
        other = template.elsewhere(changed)
        asks = all(_render(other, probe, ask=True) == prompt for probe, prompt in pairs)
        if asks and [_render(other, probe) for probe, _ in pairs] == texts:
            return Asking(changed, note)
    shown = json.dumps(template.prompt([_USER]), ensure_ascii=False)
    return Asking(
        template.template,
        f"its chat template's own generation prompt is not what it was trained after; ask it after the text {shown}, "
        "with the question in the place of Why?",
        exact=False,
    )


def _candidates(template: ChatTemplate, pairs: Sequence[tuple[list[Message], str]]) -> Iterator[tuple[str, str | None]]:
    """Templates to try, the least changed first, each with its note."""
    yield template.template, None
    own = _with_defaults(template.template, template.variables)
    if template.variables:
        given = ", ".join(f"{name} = {json.dumps(value)}" for name, value in template.variables.items())
        yield own, f"its chat template has {given} unless a program sets it: so it was trained"
    for name in _SWITCHES:
        yield (
            _with_defaults(own, {name: False}),
            f"its chat template has {name} set to false unless a program sets it: it was trained on answers without reasoning",
        )
    for probe, prompt in pairs[:1]:
        text = _render(template.elsewhere(own), probe, ask=True) or ""
        if prompt.startswith(text):
            yield (
                f"{own}{{% if add_generation_prompt %}}{{{{ {json.dumps(prompt[len(text) :])} }}}}{{% endif %}}",
                "its chat template's generation prompt ends with what stood before the answers that it was trained on",
            )
        if text.rstrip(" ") == prompt:
            yield (
                f"{{% set fusechat_text %}}{own}{{% endset %}}"
                "{{ fusechat_text.rstrip(' ') if add_generation_prompt else fusechat_text }}",
                "its chat template's generation prompt ends without a space: tokens begin with theirs",
            )


def _prompt(template: ChatTemplate, probe: Sequence[Message]) -> str | None:
    """What the model is asked by; None for a conversation that the template refuses, or takes only with its system text moved."""
    try:
        prompt = template.prompt(probe)
    except UnrenderableError:
        return None
    answered = _render(template, [*probe, _ANSWER])
    return prompt if answered is not None and answered.startswith(prompt) else None


def _render(template: ChatTemplate, probe: Sequence[Message], *, ask: bool = False) -> str | None:
    try:
        return template.text(probe, ask=ask)
    except UnrenderableError:
        return None


def _with_defaults(template: str, variables: Mapping[str, Any]) -> str:
    """The template with values for variables that a program does not set."""
    lines = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in variables.items()
    ]
    return "".join(lines) + template


def _literal(value: Any) -> str:
    return "none" if value is None else json.dumps(value)
