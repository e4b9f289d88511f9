"""A chat template whose generation prompt is the one that the model was trained on, for other programs.

Some templates write text between their generation prompt and the answer of a whole conversation. A model trained on whole
conversations would then be prompted in a form that it never saw, so a changed template is saved with it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusechat.data.messages import Message
from fusechat.models.templates import OWN_PROMPT, ChatTemplate, UnrenderableError

_SWITCHES = ("enable_thinking", "thinking")  # variables in templates of reasoning models
_USER, _ANSWER = Message("user", "Why?"), Message("assistant", "So it is.")
_PROBES = ([_USER], [Message("system", "Be brief."), _USER], [_USER, _ANSWER, _USER])


@dataclass(frozen=True)
class Asking:
    """`template`: the chat template to save. `note`: what a user of the model should know about it, None if unchanged. `exact`:
    its generation prompt is the one of training."""

    template: str
    note: str | None = None
    exact: bool = True


def asking(template: ChatTemplate, *, own_prompt: bool = False) -> Asking:
    """The template if it prompts as in training, else with the least change that makes it so and keeps conversations unchanged.

    If no change does, the template and a note. Other programs do not set a recipe's variables. `own_prompt`: most answers were
    trained after the template's own generation prompt, which plain answers do not follow.
    """
    if own_prompt and template.is_ambiguous:
        return Asking(
            OWN_PROMPT + _with_defaults(template.template, template.variables),
            "it was trained on answers that begin with reasoning, right after its chat template's generation prompt",
        )
    pairs = [(probe, prompt) for probe in _PROBES if (prompt := _prompt(template, probe)) is not None]
    texts = [_render(template, probe) for probe, _ in pairs]
    for changed, note in _candidates(template, pairs) if pairs else ():  # nothing to compare without a probe
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
    """The prompt of a conversation; None if the template refuses it, or takes it only with its system text moved."""
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
    """The template with defaults for variables that a program does not set."""
    lines = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in variables.items()
    ]
    return "".join(lines) + template


def _literal(value: Any) -> str:
    return "none" if value is None else json.dumps(value)
