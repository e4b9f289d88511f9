"""The stage `generate`: models answer prompts, score each other's answers, one answer is chosen and teaches."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import runs
import tiny
from answering import (
    KNOWN,
    TRAINING,
    WORDS,
    counts,
    gemma,
    lines,
    question,
    refused,
    rows,
    teach,
    texts,
    write_prompts,
    write_recipe,
)
from fusechat.commands.run import run
from fusechat.pipeline import build_steps, load_recipe
from fusechat.recipe.anchors import links
from fusechat.recipe.generate import Generate
from fusechat.report import stage as report
from fusechat.report.generated import generated as told_of_answers


@pytest.fixture(scope="module")
def whole(taught: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of one whole run."""
    directory = tmp_path_factory.mktemp("generated")
    fuse = {"sft_weight": 0.5, "training": {**TRAINING, "num_train_epochs": 20}}
    run(load_recipe(write_recipe(directory, taught, fuse=fuse)), directory / "work")
    return directory / "work"


def test_each_source_answers_each_prompt(whole: Path, taught: dict[str, Path]) -> None:
    for name, known in KNOWN.items():
        found = rows(whole / "generate/models" / name / "answers")
        assert [row["text"] for row in found] == [known[word] for word in WORDS]
        tokenizer = AutoTokenizer.from_pretrained(taught[name])
        assert [tokenizer.decode(row["tokens"]).strip() for row in found] == [known[word] for word in WORDS]
        assert all(row["complete"] and not row["why"] for row in found)
    files = sorted(file.name for file in (whole / "generate/models/mistral/answers").glob("*.json"))
    assert files == ["answers-00000.json", "answers-00001.json", "manifest.json"], "six prompts, four a shard"


def naive_score(directory: Path, template: str | None, word: str, said: str) -> float:
    """Nats per byte of an answer and its end of turn: one forward pass, tokens found by the template's own text."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = template or tokenizer.chat_template
    asked = [{"role": "user", "content": question(word)}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True).rstrip(" ")
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": said}], tokenize=False)
    end = whole.index(said) + len(said) + len(tokenizer.eos_token)
    ids = tokenizer(whole[:end], add_special_tokens=False)["input_ids"]
    begin = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    assert tokenizer.decode(ids[begin:]).replace(tokenizer.eos_token, "").strip() == said
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(logprobs[at - 1, ids[at]]) for at in range(begin, len(ids))) / (len(said.encode()) + 1)


def test_every_model_scores_every_answer_as_a_plain_forward_pass_does(whole: Path, taught: dict[str, Path]) -> None:
    for model, kind in (("pivot", "llama"), ("mistral", "mistral"), ("gemma", "gemma")):
        for author, known in KNOWN.items():
            found = rows(whole / "generate/models" / model / "scores" / author)
            for row, (word, said) in zip(found, known.items(), strict=True):
                expected = naive_score(taught[kind], tiny.TEMPLATES[kind], word, said)
                assert row["nll"] / row["bytes"] == pytest.approx(expected, rel=1e-4), (model, word, said)


def test_the_answer_that_all_find_most_likely_is_chosen(whole: Path) -> None:
    chosen = lines(whole / "generate/chosen/conversations.jsonl")
    assert [one["messages"][0]["content"] for one in chosen] == [question(word) for word in WORDS]
    by_prompt = {
        (author, row["id"]): row["nll"] / row["bytes"]
        for model in ("pivot", "mistral", "gemma")
        for author in KNOWN
        for row in rows(whole / "generate/models" / model / "scores" / author)
        if model == "pivot"
    }
    for one, word in zip(chosen, WORDS, strict=True):
        answers = {author: known[word] for author, known in KNOWN.items()}
        assert set(one["scores"]) == {"pivot", "mistral", "gemma"}
        assert one["score"] == pytest.approx(sum(one["scores"].values()) / 3)
        assert one["messages"][-1]["content"] == answers[one["author"]]
        assert one["scores"]["pivot"] == pytest.approx(by_prompt[one["author"], one["prompt_id"]])
        if len(set(answers.values())) == 1:
            assert one["scores"][one["author"]] == min(one["scores"][name] for name in KNOWN)
    for one in lines(whole / "generate/chosen/candidates.jsonl"):
        means = [sum(each["scores"].values()) / 3 for each in one["candidates"]]
        assert one["chosen"] == means.index(min(means))
    found = counts(whole, "generate/chosen")
    assert (found["prompts"], found["answers"], found["candidates"], found["chosen"]) == (6, 12, 10, 6)
    assert found["agreement"] == pytest.approx(2 / 6)
    assert sum(found["authors"].values()) == 6
    assert found["score"] == pytest.approx(sum(one["score"] for one in chosen) / 6)


def test_each_answer_is_taught_by_its_author_and_the_one_target_is_copied(whole: Path) -> None:
    authors = counts(whole, "generate/chosen")["authors"]
    taught = counts(whole, "fuse/answers")["chosen"]
    for name in KNOWN:
        assert taught[f"answers-{name}"][name] == authors.get(name, 0)
        assert taught[f"answers-{name}"]["none"] == 0
        assert counts(whole, f"align/{name}")["conversations"] == authors.get(name, 0)
    target, fused = (load_file(whole / place / "model/model.safetensors") for place in ("fuse/answers", "merge"))
    assert target.keys() == fused.keys()
    assert all(torch.equal(target[name], fused[name]) for name in target)
    losses = lines(whole / "fuse/answers/losses.jsonl")
    assert losses[-1]["sft_loss"] < losses[0]["sft_loss"] / 2, "it learns what was chosen"


def test_a_second_run_does_nothing(whole: Path) -> None:
    before = runs.digests(whole)
    assert run(load_recipe(whole.parent / "recipe.yaml"), whole) == 0
    assert runs.digests(whole) == before
    assert load_recipe(whole / "recipe.yaml") == load_recipe(whole.parent / "recipe.yaml").model_copy(
        update={"date": load_recipe(whole / "recipe.yaml").date}
    )


def test_status_and_tokens_know_the_stage(whole: Path) -> None:
    status = runs.here("status", whole)
    assert status.returncode == 0
    assert "generate pivot/scores/mistral" in status.stdout
    author = next(iter(counts(whole, "generate/chosen")["authors"]))
    shown = runs.here("tokens", "pivot", author, "--workdir", whole, "--conversation", "0")
    assert shown.returncode == 0, shown.stderr
    assert "response 1 of 1" in shown.stdout


QUICK = {"max_new_tokens": 16, "choose": "self"}  # nobody scores answers of others


def generated(directory: Path, taught: dict[str, Path], until: str = "generate", **changes: Any) -> Path:
    """The work directory of a run up to a stage."""
    run(load_recipe(write_recipe(directory, taught, **changes)), directory / "work", until=until)
    return directory / "work"


def with_records(directory: Path, **more: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_prompts(directory / "prompts.jsonl", **more)


def test_ways_to_choose(taught: dict[str, Path], tmp_path: Path) -> None:
    """One work directory: what models answered stays, and the choice is made anew."""
    with_records(tmp_path, reference=WORDS)
    first = generated(tmp_path, taught, generate={"max_new_tokens": 16, "choose": "self"})
    scored = [path.name for path in (first / "generate/models/mistral/scores").iterdir() if path.is_dir()]
    assert scored == ["mistral"], "only its own answers"
    answers = (first / "generate/models/mistral/answers/manifest.json").read_bytes()
    for one in lines(first / "generate/chosen/candidates.jsonl"):
        own = [min(each["scores"][name] for name in each["answers"]) for each in one["candidates"]]
        assert one["chosen"] == own.index(min(own))
    ways: dict[str, Any] = {
        "source": {"source": "gemma"},
        "vote": "vote",
        "random": "random",
        "verifier": {"verifier": "exact"},
        "likelihood": "likelihood",
    }
    for name, choose in ways.items():
        work = generated(tmp_path, taught, generate={"max_new_tokens": 16, "choose": choose})
        found = texts(work)
        if name == "source":
            assert found == list(KNOWN["gemma"].values())
            assert counts(work, "generate/chosen")["authors"] == {"gemma": 6}
        elif name == "verifier":
            assert found == list(WORDS.values()), "every word is known to one of them"
            assert counts(work, "generate/chosen")["score"] == 1.0
        else:
            assert all(
                said in (KNOWN["mistral"][word], KNOWN["gemma"][word]) for said, word in zip(found, WORDS, strict=True)
            )
    assert (first / "generate/models/mistral/answers/manifest.json").read_bytes() == answers


def test_what_a_verifier_accepts_nothing_of_is_left_out(taught: dict[str, Path], tmp_path: Path) -> None:
    changes = {"generate": {"max_new_tokens": 16, "choose": {"verifier": "exact"}}}
    path = write_recipe(tmp_path, taught, **changes)
    with_records(tmp_path, reference={**WORDS, "dog": "Katze"})
    run(load_recipe(path), tmp_path / "work", until="generate")
    assert texts(tmp_path / "work") == list(WORDS.values())[1:]
    assert counts(tmp_path / "work", "generate/chosen")["left_out"] == {"no candidate that the verifier accepts": 1}
    with_records(tmp_path)
    assert refused(path) == f"{tmp_path}/prompts.jsonl:1: holds no answer, which the verifier exact needs"
    (tmp_path / "bad.py").write_text("def raises(asked):\n    raise KeyError(asked['answer'])\n")
    with pytest.MonkeyPatch.context() as changed:
        changed.chdir(tmp_path)
        path = write_recipe(tmp_path, taught, generate={"max_new_tokens": 16, "choose": {"verifier": "bad:raises"}})
        line = refused(path)
    assert line == f"{tmp_path}/prompts.jsonl:1: verifier bad:raises: raised KeyError: 'Hund'"


def test_the_surest_are_kept(taught: dict[str, Path], tmp_path: Path) -> None:
    work = generated(tmp_path, taught, generate={"max_new_tokens": 16, "keep": 0.5})
    every = lines(work / "generate/chosen/candidates.jsonl")
    sure = []
    for one in every:
        means = sorted(sum(each["scores"].values()) / 3 for each in one["candidates"])
        sure.append(math.exp(-means[0]) - (math.exp(-means[1]) if len(means) > 1 else 0.0))
    expected = sorted(range(6), key=lambda place: -sure[place])[:3]
    assert [place for place, one in enumerate(every) if one["kept"]] == sorted(expected)
    assert len(texts(work)) == 3
    assert counts(work, "generate/chosen")["left_out"] == {"less sure than those that are kept": 3}


def test_several_samples(taught: dict[str, Path], tmp_path: Path) -> None:
    how = {"max_new_tokens": 16, "samples": 3, "temperature": 1.5, "top_p": 0.95}
    work = generated(tmp_path, taught, generate=how)
    found = rows(work / "generate/models/mistral/answers")
    assert [row["sample"] for row in found] == [0, 1, 2] * 6
    assert len({row["text"] for row in found}) > 6
    again = generated(tmp_path / "again", taught, generate=how)
    assert runs.digests(again / "generate/models") == runs.digests(work / "generate/models")
    other = generated(tmp_path / "other", taught, generate=how, seed=1)
    assert rows(other / "generate/models/mistral/answers") != found


def test_a_target_for_each_source_on_all_answers(taught: dict[str, Path], tmp_path: Path) -> None:
    work = generated(tmp_path, taught, "merge", generate={**QUICK, "targets": "each"}, targets={"sft": []})
    assert {path.name for path in (work / "fuse").iterdir() if path.is_dir()} == {"mistral", "gemma", "sft"}
    for name in KNOWN:
        taught_by = counts(work, f"fuse/{name}")["chosen"]["answers"]
        assert set(taught_by) == {"pivot", name, "none", "ties", "without comparison"}
        assert taught_by["pivot"] + taught_by[name] == 6
    assert counts(work, "fuse/sft")["chosen"] == {"answers": {"none": 6.0, "ties": 0.0, "without comparison": 0.0}}
    assert counts(work, "merge")["targets"] == 2


def test_targets_that_are_named_learn_all_chosen_answers(taught: dict[str, Path], tmp_path: Path) -> None:
    work = generated(tmp_path, taught, "fuse", generate=QUICK, targets={"sft": [], "half": ["mistral"]})
    authors = counts(work, "generate/chosen")["authors"]
    assert counts(work, "fuse/sft")["conversations"] == counts(work, "fuse/half")["conversations"] == 6
    half = counts(work, "fuse/half")["chosen"]
    assert half["answers-mistral"]["mistral"] == authors.get("mistral", 0)
    assert half["answers-gemma"] == {"none": authors.get("gemma", 0), "ties": 0.0, "without comparison": 0.0}


def test_an_author_without_distributions_is_learnt_by_plain_fine_tuning(
    taught: dict[str, Path], tmp_path: Path
) -> None:
    """The pivot's own answers have no teacher, whatever λ is: the same weights as of plain fine-tuning."""
    pivot = teach(taught["llama"], tmp_path / "pivot", "llama", dict(WORDS))
    models = {**taught, "llama": pivot}
    generate = {**QUICK, "sources": ["pivot"]}
    sources = {"mistral": str(taught["mistral"])}
    work = generated(tmp_path, models, "fuse", generate=generate, targets={"sft": []}, sources=sources)
    assert counts(work, "generate/chosen")["authors"] == {"pivot": 6}
    both = [load_file(work / f"fuse/{name}/model/model.safetensors") for name in ("answers", "sft")]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    mixed = {"max_new_tokens": 16, "sources": ["pivot", "mistral"], "choose": "random"}
    work = generated(tmp_path / "mixed", models, "fuse", generate=mixed, sources=sources)
    found = counts(work, "fuse/answers")["chosen"]
    authors = counts(work, "generate/chosen")["authors"]
    assert found["answers-pivot"]["none"] == authors["pivot"]
    assert found["answers-mistral"]["mistral"] == authors["mistral"]


def test_a_model_that_is_listed_twice_answers_once(taught: dict[str, Path], tmp_path: Path) -> None:
    twice = {"mistral": str(taught["mistral"]), "again": str(taught["mistral"]), "gemma": gemma(taught)}
    work = generated(tmp_path, taught, "fuse", sources=twice)
    assert sorted(path.name for path in (work / "generate/models").iterdir()) == ["gemma", "mistral", "pivot"]
    assert set(lines(work / "generate/chosen/conversations.jsonl")[0]["scores"]) == {"pivot", "mistral", "gemma"}
    assert counts(work, "fuse/answers")["conversations"] == 6


def test_a_source_with_data_of_its_own_answers_those_prompts(taught: dict[str, Path], tmp_path: Path) -> None:
    own = {**gemma(taught), "data": {"train": "own.jsonl"}}
    path = write_recipe(tmp_path, taught, sources={"mistral": str(taught["mistral"]), "gemma": own})
    write_prompts(tmp_path / "own.jsonl", ["moon", "bread"])
    write_prompts(tmp_path / "prompts.jsonl", ["dog", "moon"])
    run(load_recipe(path), tmp_path / "work", until="generate")
    every = lines(tmp_path / "work/generate/chosen/candidates.jsonl")
    asked = [one["messages"][0]["content"] for one in every]
    assert asked == [question(word) for word in ("dog", "moon", "bread")]
    assert [{name for each in one["candidates"] for name in each["answers"]} for one in every] == [
        {"mistral"},
        {"mistral", "gemma"},
        {"gemma"},
    ]


def test_history_is_context_and_the_last_answer_is_made_anew(taught: dict[str, Path], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, taught)
    history = [
        {"role": "user", "content": question("dog")},
        {"role": "assistant", "content": "Hund"},
        {"role": "user", "content": question("tree")},
        {"role": "assistant", "content": "not read"},
    ]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": history, "kind": "words"}) + "\n")
    run(load_recipe(path), tmp_path / "work", until="align")
    (one,) = lines(tmp_path / "work/generate/chosen/conversations.jsonl")
    assert one["messages"][:3] == [history[0], {**history[1], "weight": 0}, history[2]]
    assert "not read" not in json.dumps(one)
    assert counts(tmp_path / "work", f"prepare/pivot/answers-{one['author']}")["responses"] == 1
    assert counts(tmp_path / "work", "generate/chosen")["unused_keys"] == ["kind"]
    reread = tmp_path / "reread"  # the chosen answers, as a data set of another recipe
    recipe = write_recipe(reread, taught, data={"train": str(tmp_path / "work/generate/chosen/conversations.jsonl")})
    content = yaml.safe_load(recipe.read_text())
    del content["generate"]
    recipe.write_text(yaml.safe_dump(content))
    run(load_recipe(recipe), reread / "work", until="prepare")
    found = counts(reread / "work", "prepare/pivot/data")
    assert (found["conversations"], found["responses"]) == (1, 1)
    assert "unused_keys" not in found


def test_what_is_no_candidate_is_told(taught: dict[str, Path], tmp_path: Path, heard: list[str]) -> None:
    work = generated(tmp_path, {**taught, "mistral": taught["llama"]}, sources={
        "mistral": str(taught["llama"]), "gemma": gemma(taught)
    })  # fmt: skip
    found = counts(work, "generate/chosen")
    assert found["no_candidates"]["mistral"]["it did not end within max_new_tokens"] > 0
    assert any("answers of mistral that are no candidates: it did not end" in line for line in heard)
    assert found["authors"].get("gemma", 0) > 0
    none = write_recipe(tmp_path / "none", taught, generate={"max_new_tokens": 1})
    line = refused(none)
    assert line == "generate: no prompt has an answer that could be learnt; what is wrong with them stands above"


def test_bad_prompts(taught: dict[str, Path], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, taught)
    for record, said in (
        ({"prompt": ""}, "the prompt is empty"),
        ({"messages": []}, "the prompt is empty"),
        ({"prompt": 3}, '"prompt" is int, neither text nor a list of messages'),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the prompt is empty"),
        (
            {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant", "assistant")]},
            "the prompt ends with a message of role assistant, not with a question",
        ),
        (
            {"messages": [{"role": "system", "content": "x"}]},
            "the prompt ends with a message of role system, not with a question",
        ),
    ):
        (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "x"}) + "\n" + json.dumps(record) + "\n")
        assert refused(path, "--until", "generate") == f"{tmp_path}/prompts.jsonl:2: {said}"
    (tmp_path / "prompts.jsonl").write_text("")
    assert "holds no prompt that could be answered" in refused(path, "--until", "generate")


def test_records_that_are_left_out_are_told(taught: dict[str, Path], tmp_path: Path, heard: list[str]) -> None:
    data = {"train": "prompts.jsonl", "on_error": "skip", "max_length": 128}
    path = write_recipe(tmp_path, taught, data=data, sources={"gemma": gemma(taught)})
    record = {"prompt": question("moon"), "level": 3}
    bad = {"prompt": "  "}
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (record, bad, record)))
    run(load_recipe(path), tmp_path / "work", until="generate")
    found = counts(tmp_path / "work", "generate/chosen")
    assert (found["prompts"], found["malformed"], found["repeated"], found["unused_keys"]) == (1, 1, 1, ["level"])
    assert "generate: 1 malformed records are left out" in heard
    assert "generate: keys of the records that nothing reads: level" in heard


def test_models_that_cannot_answer(taught: dict[str, Path], tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "template", taught, sources={"gemma": str(taught["gemma"])})
    assert "has no chat template; a recipe can give it one: set chat_template for it" in refused(path)
    path = write_recipe(tmp_path / "long", taught, data={"train": "prompts.jsonl", "max_length": 4096})
    long = {"prompt": "word " * 3000}
    (tmp_path / "long" / "prompts.jsonl").write_text(
        json.dumps(long) + "\n" + json.dumps({"prompt": question("moon")}) + "\n"
    )
    run(load_recipe(path), tmp_path / "long" / "work", until="generate")
    found = counts(tmp_path / "long" / "work", "generate/chosen")
    assert found["left_out"] == {"no candidate": 1}
    assert found["no_candidates"]["gemma"] == {"its prompt leaves no room in the model's 2048 tokens": 1}
    refuses = "{% for m in messages %}{% if 'moon' in m.content %}{{ raise_exception('not the moon') }}{% endif %}"
    refuses += "{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    sources = {"mistral": {"model": str(taught["mistral"]), "chat_template": refuses}, "gemma": gemma(taught)}
    work = generated(tmp_path / "refuses", taught, sources=sources)
    (reason,) = [why for why in counts(work, "generate/chosen")["no_candidates"]["mistral"] if "moon" in why]
    assert reason == "the template refuses it: not the moon"
    scores = lines(work / "generate/chosen/candidates.jsonl")[list(WORDS).index("moon")]["candidates"][0]["scores"]
    assert scores["mistral"] is None, "nor can it score others' answers there"
    assert scores["pivot"] is not None


def test_only_a_source_does_its_answers_and_their_scores(taught: dict[str, Path], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, taught)
    run(load_recipe(path), tmp_path / "work", only="mistral")
    done = {str(file.parent.relative_to(tmp_path / "work")) for file in (tmp_path / "work").rglob("manifest.json")}
    answered = {"generate/models/mistral/answers"}
    scored = {f"generate/models/{name}/scores/mistral" for name in ("pivot", "mistral", "gemma")}
    assert done == answered | scored | {"prepare/overlap"}
    assert "it has answers, mistral, gemma" in refused(path, "--only", "nobody")


def test_a_new_source_adds_its_own_branch_only(taught: dict[str, Path], tmp_path: Path) -> None:
    one = {"mistral": str(taught["mistral"])}
    generated(tmp_path, taught, sources=one)
    before = {
        file: file.read_bytes() for file in (tmp_path / "work/generate/models").rglob("*") if file.suffix == ".json"
    }
    generated(tmp_path, taught, sources={**one, "gemma": gemma(taught)})
    assert all(file.read_bytes() == content for file, content in before.items())
    assert set(counts(tmp_path / "work", "generate/chosen")["authors"]) <= {"mistral", "gemma"}


def test_other_commands_on_such_a_recipe(whole: Path, taught: dict[str, Path], tmp_path: Path) -> None:
    card = (whole / "merge/model/README.md").read_text()
    shares = ", ".join(f"`{name}` {number}" for name, number in counts(whole, "generate/chosen")["authors"].items())
    assert f"It learned answers of the models to prompts, one chosen for each of 6 prompts: {shares}." in card
    assert "- Source `mistral`: `mistral`, answered `prompts.jsonl`" in card
    path = write_recipe(tmp_path, taught)
    work = tmp_path / "work"
    early = runs.here("eval", "alignment", path, "--workdir", work)
    assert early.returncode == 2
    assert f"{work}: no answers were chosen to count on" in early.stderr
    run(load_recipe(path), work, until="generate")
    compared = runs.here("eval", "alignment", path, "--workdir", work, "--top-k", "3", "--json")
    assert compared.returncode == 0, compared.stderr
    assert {one["source"] for one in json.loads(compared.stdout)} <= {"mistral", "gemma"}


def test_the_report_tells_whose_answers_were_chosen(whole: Path) -> None:
    recipe = load_recipe(whole / "recipe.yaml")
    made = told_of_answers(recipe, whole)
    assert made is not None
    found, chosen = counts(whole, "generate/chosen"), lines(whole / "generate/chosen/conversations.jsonl")
    (place,) = made.places
    assert {name: one.taught for name, one in place.authors.items()} == found["authors"]
    assert place.same / place.several == found["agreement"]
    for name, one in place.authors.items():
        gave = [said["messages"][-1]["content"] == KNOWN[name][word] for said, word in zip(chosen, WORDS, strict=True)]
        assert (one.asked, one.answered, one.best) == (6, 6, sum(gave))
    assert len(made.examples) == 5
    costs = {one.name: one for one in made.costs}
    for name in KNOWN:
        answered = rows(whole / "generate/models" / name / "answers")
        assert costs[name].generated == sum(len(row["tokens"]) for row in answered)
        assert costs[name].scored == 12
    tokenizer = AutoTokenizer.from_pretrained(whole / "fuse/answers/model")
    ended = [len(tokenizer(said)["input_ids"]) + 1 for known in KNOWN.values() for said in known.values()]
    assert (costs["pivot"].answers, costs["pivot"].scored, costs["pivot"].read) == (None, 12, sum(ended))
    page = (whole / "report/index.html").read_text(encoding="utf-8")
    assert f"It learned one answer to each of 6 prompts, chosen among the models' own: {made.shares}." in page
    assert "a copy of answers" in page
    assert page.count("answered by mistral, gemma") == 1
    again = whole / "again"
    again.mkdir()
    report._write(again, recipe, dict(build_steps(recipe, whole)[-1].upstream))
    assert (again / report.PAGE).read_text(encoding="utf-8") == page
    shutil.rmtree(again)


def test_defaults_are_those_of_the_recipe_page() -> None:
    page = (Path(__file__).parents[1] / "docs" / "recipe.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `generate\.(\w+)` \| ([^|]+) \|", page, flags=re.MULTILINE))
    found = Generate().model_dump()
    assert shown.pop("sources") == "all"
    assert found.pop("sources") is None
    assert {key: yaml.safe_load(cell.strip("`")) for key, cell in shown.items()} == found
    assert links(["r.yaml:3: generate.choose.verfier: unknown key", "r.yaml:3: sources.a.server.url: x"]) == [
        "docs/recipe.md#generate.choose",
        "docs/recipe.md#sources.NAME.server",
    ]
