"""Reward models: one number for a conversation, whatever it is batched with; the answer that they like best is chosen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForSequenceClassification

import tiny
from answering import KNOWN, WORDS, lines, question, refused, write_recipe
from fusechat.commands.run import run
from fusechat.errors import ModelError
from fusechat.models.chat_model import ChatModel
from fusechat.models.reference import Reference
from fusechat.models.reward import RewardModel
from fusechat.pipeline import load_recipe


def build(directory: Path, *, labels: int = 1, pads: bool = True) -> Path:
    """A tiny reward model with llama's tokenizer; `pads`: its configuration says what padding is."""
    tokenizer = tiny.tokenizer_of("llama")
    config = tiny.model_of("llama", tokenizer).config
    config.num_labels = labels
    if not pads:
        config.pad_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        LlamaForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def opened(directory: Path, **how: Any) -> RewardModel:
    chat_model = ChatModel("reward", Reference((str(directory),)))
    return RewardModel(chat_model, **{"dtype": "float32", "device": "cpu", "batch_tokens": 64, **how})


TEXTS = ("a", "The quick brown fox jumps over the lazy dog.<|im_end|>", "größer 🙂" * 9, "1 + 1<|endoftext|>")


def test_a_batch_gives_what_each_text_by_itself_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for pads in (True, False):
        directory = build(tmp_path / str(pads), pads=pads)
        model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        expected = []
        for text in TEXTS:
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.inference_mode():
                expected.append(float(model(input_ids=ids).logits[0, 0]))
        found = opened(directory).rewards(TEXTS)
        assert found == pytest.approx(expected, rel=1e-5), f"pads: {pads}"
        plain = RewardModel._forward

        def tight(self: Any, batch: list[list[int]], plain: Any = plain) -> list[float]:
            if len(batch) > 1:
                raise MemoryError
            return list(plain(self, batch))

        with monkeypatch.context() as changed:
            changed.setattr(RewardModel, "_forward", tight)
            assert opened(directory, batch_tokens=10**6).rewards(TEXTS) == pytest.approx(expected, rel=1e-5)
    assert opened(directory).rewards(["word " * 3000, "", "a"])[:2] == [None, None], "too long, and nothing"


def test_what_is_no_reward_model(tmp_path: Path, models: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="gives 3 numbers for a conversation, not one reward"):
        opened(build(tmp_path / "three", labels=3))
    with pytest.raises(ModelError, match=r"lacks weights of its architecture: score\.weight"):
        opened(models["llama"])


def test_the_answer_with_the_highest_reward_is_chosen(taught: dict[str, Path], tmp_path: Path) -> None:
    directory = build(tmp_path / "reward")
    path = write_recipe(tmp_path, taught, generate={"max_new_tokens": 16, "choose": {"reward": "reward"}})
    assert load_recipe(path).generate.choose.reward.model == str(directory)  # type: ignore[union-attr]
    run(load_recipe(path), tmp_path / "work", until="generate")
    template = ChatModel("reward", Reference((str(directory),))).template()
    asked = opened(directory)
    from fusechat.data.conversations import Message

    for one, word in zip(lines(tmp_path / "work/generate/chosen/conversations.jsonl"), WORDS, strict=True):
        values = {}
        for said in {known[word] for known in KNOWN.values()}:
            messages = [Message("user", question(word)), Message("assistant", said)]
            values[said] = asked.rewards([template.render(messages).text])[0]
        best = max(values, key=lambda said: values[said] or 0.0)
        assert one["messages"][-1]["content"] == best
        assert one["score"] == pytest.approx(values[best], rel=1e-5)
        assert one["chosen_by"] == "reward"
    assert [path.name for path in (tmp_path / "work/generate/models/mistral/scores").iterdir() if path.is_dir()] == [
        "mistral"
    ], "nobody else need score"
    path = write_recipe(tmp_path, taught, generate={"choose": {"reward": "no/such/model/at/all"}})
    assert "generate.choose.reward" in refused(path)
