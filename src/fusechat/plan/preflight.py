"""What a run checks before any work, of the steps that wait: settings and the launch, then configurations and tokenizers. No
weights are read, and none are fetched."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from fusechat.errors import FuseChatError, RecipeError
from fusechat.fuse import stage as fuse
from fusechat.models.load import check_causal, choose_device, read_configuration
from fusechat.plan import checks
from fusechat.plan.metadata import WithoutWeights
from fusechat.plan.shapes import on_meta
from fusechat.recipe.rounds import taught_targets
from fusechat.recipe.schema import PIVOT
from fusechat.run import ranks
from fusechat.run.steps import Step

_RUNS = ("generate", "capture", "fuse", "rounds", "evaluate")  # stages that run models
_TRAINS = ("fuse", "rounds")


def _in_rounds(recipe: Any, waiting: Sequence[Step]) -> set[str]:
    """The models that run in the rounds of waiting targets; the target has the pivot's settings."""
    targets = {step.name.partition("/")[0] for step in waiting if step.stage == "rounds"}
    teachers = {name for target, names in taught_targets(recipe).items() if target in targets for name in names}
    return {PIVOT, *teachers} if targets else set()


def check_settings(recipe: Any, waiting: Sequence[Step]) -> None:
    """Raises RecipeError or ModelError, with all that is wrong, for what this machine or this launch cannot do."""
    found: list[Callable[[], object]] = []
    if any(step.stage in _RUNS for step in waiting):
        found.append(lambda: choose_device(recipe.device))
    if any(step.stage in _TRAINS for step in waiting):
        found.append(lambda: fuse.check(recipe, here=True))
    run = dict.fromkeys(step.name.partition("/")[0] for step in waiting if step.stage in ("generate", "capture"))
    run |= dict.fromkeys(_in_rounds(recipe, waiting))
    captured = [name for name in (PIVOT, *recipe.models) if name in run]
    found.append(lambda: _refuse(checks.of_backend(recipe, captured, devices=_gpus(), here=True)))
    if any(step.stage == "generate" for step in waiting):
        servers = [name for name in recipe.sources if name in run and name not in recipe.models]
        found.append(lambda: _refuse(checks.of_servers(recipe, servers)))
    stages = {step.stage for step in waiting}
    found.append(lambda: _refuse(checks.of_verifiers(recipe, stages)))
    found.append(lambda: _refuse(checks.of_processes(recipe, captured, ranks.world())))
    _together(found)


def check_models(recipe: Any, waiting: Sequence[Step]) -> None:
    """Raises a FuseChatError, with all that is wrong, for models that the waiting steps could not use."""
    names = {step.name.partition("/")[0] for step in waiting if step.stage in ("generate", "prepare", "capture")}
    names |= {name for step in waiting if step.stage == "align" for name in (PIVOT, step.name)}
    names |= _in_rounds(recipe, waiting)
    trained = any(step.stage in _TRAINS for step in waiting)
    found: list[Callable[[], object]] = [
        lambda name=name: _check_model(recipe, name)  # type: ignore[misc]
        for name in (PIVOT, *recipe.models)
        if name in names or (name == PIVOT and trained)
    ]
    if any(step.stage == "generate" for step in waiting) and recipe.generate.choose.reward is not None:
        found.append(lambda: _check_reward(recipe))
    if trained:
        found += [lambda: fuse.check_pivot(recipe), lambda: _check_lora(recipe)]
    _together(found)


def _check_model(recipe: Any, name: str) -> None:
    """Its configuration, tokenizer and template, and that the tokens of the template have embeddings."""
    chat_model = recipe.chat_model(name)
    if not chat_model.reference.is_directory:
        chat_model = WithoutWeights.of(chat_model)
    rows = chat_model.vocabulary_size()
    if name == PIVOT or recipe.capture_for(name).backend == "transformers":  # vLLM has models of its own
        check_causal(chat_model.directory, trust_remote_code=chat_model.reference.trust_remote_code)
    needs = checks.of_package(recipe, name, chat_model.directory) if name != PIVOT else []  # which may not be quantised
    _refuse([*needs, *checks.of_template(name, chat_model.template(), rows)])


def _check_reward(recipe: Any) -> None:
    """Its configuration, tokenizer and template."""
    chat_model = recipe.reward_model()
    if not chat_model.reference.is_directory:
        chat_model = WithoutWeights.of(chat_model)
    rows = chat_model.vocabulary_size()
    who = f"generate.choose.reward ({chat_model.reference})"
    _refuse([*checks.of_reward(chat_model), *checks.of_template(who, chat_model.template(), rows)])


def _check_lora(recipe: Any) -> None:
    """That the adapters fit the pivot."""
    if recipe.fuse.lora is None:
        return
    from fusechat.fuse.lora import with_adapters

    pivot = WithoutWeights.of(recipe.chat_model(PIVOT))
    trust = pivot.reference.trust_remote_code
    try:
        empty = on_meta(read_configuration(pivot.directory, trust_remote_code=trust), trust_remote_code=trust)
    except Exception:  # code of a model's own may not do without memory; then fine-tuning says what does not fit
        return
    with_adapters(empty, recipe.fuse.lora, seed=recipe.seed)


def _gpus() -> int | None:
    return torch.cuda.device_count() if torch.cuda.is_available() else None


def _refuse(problems: Iterable[str]) -> None:
    problems = list(problems)
    if problems:
        raise RecipeError(*problems)


def _together(several: Iterable[Callable[[], object]]) -> None:
    """Does them all, and then raises what they raised, as one error."""
    failed: list[FuseChatError] = []
    for one in several:
        try:
            one()
        except FuseChatError as error:
            failed.append(error)
    if failed:
        raise type(failed[0])(*dict.fromkeys(message for error in failed for message in error.messages))
