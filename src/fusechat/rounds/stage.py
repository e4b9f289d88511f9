"""rounds/<target>/<i>/: `answers/`, those of the target as it is then; `teachers/<source>/`, these as conversations of the target
(`student`) and of the source (`prepared`), the source's distributions (`captured`) and these in the target's tokens (`aligned`);
`kept/`, what is learnt; `trained/`, the model. rounds/<target>/sound/: `model/`, the last one that is sound.

After the last round stands one more without training, on a few prompts, for its answers alone tell whether the last model is sound.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusechat.models.chat_model import ChatModel
from fusechat.models.reference import Reference
from fusechat.recipe.rounds import Teacher, taught_targets, training_of
from fusechat.recipe.schema import PIVOT, Recipe
from fusechat.recipe.training_arguments import counted
from fusechat.rounds.sound import STOPPED
from fusechat.run import ranks
from fusechat.run.manifests import which_device
from fusechat.run.progress import log
from fusechat.run.steps import Step

STAGE, FORMAT, CHECKED = "rounds", 1, 100  # prompts whose answers tell of the last model
MODEL = "model"
Align = Callable[[str, tuple[str, str, Path], Mapping[str, Step], "Counted"], Step]


@dataclass(frozen=True)
class Counted:
    """Conversations that a map is counted on: directories of what `pivot` and `source` have of them; `steps` that made these."""

    pivot: list[Path]
    source: list[Path]
    steps: dict[str, Step]


@dataclass(frozen=True)
class Parts:
    """What other stages do of a round: `open_model`, who answers; `capture`, the step that runs a source over conversations;
    `align`; `train`, which trains a part; `counted`, what each source's map was first counted on."""

    open_model: Callable[..., Any]
    capture: Callable[[ChatModel, Step], Step]
    align: Align
    train: Callable[..., dict[str, Any]]
    counted: Mapping[str, Counted]


def step(recipe: Recipe, workdir: Path, target: str, fused: Step, chosen: Step | None, parts: Parts) -> Step:
    """The step that ends a target's rounds. `fused`: its first training; `chosen`: what chose its answers."""
    return _Rounds(recipe, workdir, target, fused, chosen, parts).sound()


class _Rounds:
    """The steps of one target's rounds."""

    def __init__(
        self, recipe: Recipe, workdir: Path, target: str, fused: Step, chosen: Step | None, parts: Parts
    ) -> None:
        assert recipe.rounds is not None
        self.recipe, self.how, self.workdir, self.target, self.parts = recipe, recipe.rounds, workdir, target, parts
        self.fused, self.chosen = fused, None if isinstance(self.how.teacher, Teacher) else chosen
        self.teachers = taught_targets(recipe)[target]
        self.trained = [fused]  # the model that each round begins with
        self.kept: list[Step] = []
        self.counted = {name: parts.counted[name] for name in self.teachers}
        for number in range(1, self.how.count + 1):
            self._round(number)
            self.trained.append(self._train(number))
        self._round(self.how.count + 1)

    def sound(self) -> Step:
        upstream = {f"model/{number}": step for number, step in enumerate(self.trained)}
        upstream |= {f"kept/{number}": step for number, step in enumerate(self.kept, start=1)}
        settings = {"stop_on_alarm": self.how.stop_on_alarm}
        directory = self._directory / "sound"
        # What is learnt may be cleared away: its manifests tell.
        return Step(STAGE, self.target, directory, settings, self._choose, upstream, FORMAT, reads_bulk=False)

    @property
    def _directory(self) -> Path:
        return self.workdir / STAGE / self.target

    def _place(self, number: int, *names: str) -> tuple[str, str, Path]:
        return STAGE, "/".join((self.target, str(number), *names)), self._directory.joinpath(str(number), *names)

    def _step(self, place: tuple[str, str, Path], settings: Mapping[str, Any], work: Any, **more: Any) -> Step:
        stage, name, directory = place
        return Step(stage, name, directory, settings, work, format=FORMAT, **more)

    def student(self, number: int) -> ChatModel:
        """The target as a round begins with it."""
        trust, directory = self.recipe.pivot.reference.trust_remote_code, self.trained[number - 1].directory / MODEL
        return ChatModel(PIVOT, Reference((str(directory),), trust_remote_code=trust), date=self.recipe.date)

    def _round(self, number: int) -> None:
        """All steps of a round but its training."""
        answers = self._answers(number)
        judged = {name: self._teacher(number, name, answers) for name in self.teachers}
        self.kept.append(self._kept(number, answers, judged))
        for name, steps in judged.items():
            before = self.counted[name]
            self.counted[name] = Counted(
                [*before.pivot, self.kept[-1].directory / name],
                [*before.source, steps["source"].directory],
                {**before.steps, f"kept/{number}": self.kept[-1], f"prepared/{number}": steps["source"]},
            )

    def _prompts(self, number: int) -> tuple[list[Any], dict[str, int]]:
        from fusechat.rounds.prompts import of_round, taught_prompts

        every, left_out = taught_prompts(self.recipe, self.target, self.chosen.directory if self.chosen else None)
        most = CHECKED if number > self.how.count else None
        return of_round(every, self.how.prompts, number, seed=self.recipe.seed, most=most), left_out

    def _answers(self, number: int) -> Step:
        from fusechat.rounds.prompts import sets_of

        recipe, before = self.recipe, self.trained[number - 1]
        settings = {
            **self.how.model_dump(include={"prompts", "temperature", "max_new_tokens", "teacher"}),
            "teachers": self.teachers,
            "data": [data.identity() for data in sets_of(recipe, self.target)],
            "max_length": recipe.data.max_length,
            "shard_prompts": recipe.capture.shard_conversations,
            "seed": recipe.seed,
            "device": recipe.device,
            "dtype": recipe.capture.dtype,
            "backend": recipe.capture.backend,
        }
        if number > self.how.count:
            settings["checked"] = CHECKED

        def work(directory: Path) -> dict[str, Any]:
            from fusechat.rounds.answers import answer

            if ranks.from_first(lambda: _counts(before).get(STOPPED)):
                return {"answers": 0, "tokens": 0, "left_out": {}, STOPPED: True}
            prompts, left_out = self._prompts(number)
            found = answer(directory, recipe, self.student(number), prompts, number, self.parts.open_model)
            return {**found, "prompts": len(prompts), "without_teacher": left_out}

        upstream = {"model": before} | ({"chosen": self.chosen} if self.chosen else {})
        shared: dict[str, Any] = {"counted": _on_its_device, "whole_files": True, "join": _join}
        return self._step(self._place(number, "answers"), settings, work, upstream=upstream, **shared)

    def _teacher(self, number: int, name: str, answers: Step) -> dict[str, Step]:
        """A source on the answers that it teaches."""
        recipe, where, chat_model = self.recipe, ("teachers", name), self.recipe.chat_model(name)

        def work_of(make: str, model: Callable[[], ChatModel]) -> Callable[[Path], dict[str, Any]]:
            def work(directory: Path) -> dict[str, Any]:
                from fusechat.rounds import answers as module

                rows = module.rows_of(answers.directory, name)
                prompts = {one.id: one for one, _ in self._prompts(number)[0]} if rows else {}
                return dict(getattr(module, make)(directory, recipe, model(), prompts, rows, number))

            return work

        above, length = {"answers": answers}, {"max_length": recipe.data.max_length}
        student = self._step(
            self._place(number, *where, "student"),
            length,
            work_of("student_rows", lambda: self.student(number)),
            upstream=above,
        )
        source = self._step(
            self._place(number, *where, "prepared"),
            {"model": chat_model.tokenizer_identity, **length},
            work_of("teacher_rows", lambda: chat_model),
            upstream=above,
        )
        stage, label, directory = self._place(number, *where, "captured")
        captured = replace(self.parts.capture(chat_model, source), stage=stage, name=label, directory=directory)
        found = {"pivot": student, "source": source, "capture": captured}
        place = self._place(number, *where, "aligned")
        return {**found, "aligned": self.parts.align(name, place, found, self.counted[name])}

    def _kept(self, number: int, answers: Step, judged: Mapping[str, Mapping[str, Step]]) -> Step:
        first = self.kept[0] if self.kept else None

        def work(directory: Path) -> dict[str, Any]:
            from fusechat.rounds.alarms import alarms
            from fusechat.rounds.answers import rows_of
            from fusechat.rounds.kept import Judged, keep

            places = {
                name: Judged(*(steps[part].directory for part in ("pivot", "source", "capture", "aligned")))
                for name, steps in judged.items()
            }
            found = keep(directory, places, rows_of(answers.directory), self.how.until_wrong)
            lost = [_counts(answers)["left_out"], *(_counts(steps["source"])["rejected"] for steps in judged.values())]
            found["left_out"] = dict(sum(map(Counter, lost), Counter[str]()))
            if _counts(answers).get(STOPPED):
                return {**found, STOPPED: True, "alarms": []}
            lines = alarms(found, _counts(first) if first is not None else found)
            self._tell(number, found, _counts(answers)["without_teacher"], lines)
            return {**found, "alarms": lines}

        upstream: dict[str, Step] = {"answers": answers}
        for name, steps in judged.items():
            upstream |= {f"{name}/{part}": one for part, one in steps.items()}
        upstream |= {"first": first} if first is not None else {}
        settings = {"until_wrong": self.how.until_wrong}
        return self._step(self._place(number, "kept"), settings, work, upstream=upstream, bulk="*.arrow")

    def _tell(self, number: int, found: Mapping[str, Any], untaught: Mapping[str, int], lines: list[str]) -> None:
        what = f"rounds {self.target}: " + (f"round {number}" if number <= self.how.count else "afterwards")
        if number == 1:  # the same prompts in every round
            for reason, count in untaught.items():
                log.warning("%s: %d prompts are not asked: %s", what, count, reason)
        for reason, count in found["left_out"].items():
            log.warning("%s: %d answers teach nothing: %s", what, count, reason)
        share = found["share_kept"] or 0.0
        numbers = found["kept"], found["rows"], found["answers"], 100 * share
        log.info("%s: %d of %d rows of %d answers are kept (%.0f%%)", what, *numbers)
        for line in lines:
            log.warning("%s: alarm: %s", what, line)

    def _train(self, number: int) -> Step:
        recipe, before, kept = self.recipe, self.trained[-1], self.kept[-1]
        training = training_of(recipe)
        aligned = {key: step for key, step in kept.upstream.items() if key.endswith(("/source", "/capture"))}
        settings = {
            "training": training,
            "loss": self.how.loss,
            "count": self.how.count,
            "stop_on_alarm": self.how.stop_on_alarm,
            "lora": recipe.fuse.lora,
            "seed": recipe.seed,
            "device": recipe.device,
        }

        def work(directory: Path) -> dict[str, Any]:
            from fusechat.rounds.sound import why_stopped

            stop = self.how.stop_on_alarm
            why = ranks.from_first(lambda: why_stopped(_counts(before), _counts(kept), stop_on_alarm=stop))
            if why:
                return {STOPPED: why}
            taught = {
                name: (kept.directory / name, aligned[f"{name}/source"].directory, aligned[f"{name}/capture"].directory)
                for name in self.teachers
                if _counts(kept)["taught_by"][name]
            }
            last = None if number == 1 else before.directory
            return self.parts.train(
                directory,
                recipe,
                self.student(1),
                taught=taught,
                name=f"rounds {self.target}/{number}",
                training=training,
                loss=self.how.loss,
                place=(number, self.how.count, last),
                answers=_counts(kept)["answers"],
                own_prompt=bool(_counts(self.fused).get("own_prompt")),
                logs=self.workdir / "logs" / f"{self.target}-round-{number}",
            )

        upstream = {"before": before, "fused": self.fused, "kept": kept, **aligned}
        more: dict[str, Any] = {"counted": _counted_training, "join": lambda counts: counts[0], "bulk": "checkpoint-*"}
        return self._step(self._place(number, "trained"), settings, work, upstream=upstream, **more)

    def _choose(self, directory: Path) -> dict[str, Any]:
        from fusechat.rounds.sound import link_model, sound_round

        trained, kept = ([_counts(step) for step in each] for each in (self.trained, self.kept))
        number = sound_round(trained, kept, stop_on_alarm=self.how.stop_on_alarm)
        if number < self.how.count:
            log.warning("rounds %s: the model of round %d is the target, of %d", self.target, number, self.how.count)
        link_model(self.trained[number].directory / MODEL, directory / MODEL)
        own = {"own_prompt": True} if trained[0].get("own_prompt") else {}
        return {"round": number, "of": self.how.count, "rounds": kept, **own}


def _counts(step: Step) -> dict[str, Any]:
    return dict((step.manifest() or {}).get("counts", {}))


def _on_its_device(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings, **which_device(settings)}


def _counted_training(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that change no weight."""
    return {**_on_its_device(settings), "training": counted(settings.get("training", {}))}


def _join(counts: list[dict[str, Any]]) -> dict[str, Any]:
    """One of the counts of all processes."""
    joined = dict(counts[0])
    joined |= {key: sum(one[key] for one in counts) for key in ("answers", "tokens")}
    joined["left_out"] = dict(sum((Counter(one["left_out"]) for one in counts), Counter[str]()))
    return joined
