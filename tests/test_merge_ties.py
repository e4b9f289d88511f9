"""Tied tensors by the models' classes: copies are left out, a head of its own is kept. Transformers loads what came out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cases import each
from checkpoints import configuration, read, write
from fusechat.errors import ModelError
from fusechat.merge import merge

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def t5() -> Any:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in {"ffn_dim": 48, "layers": 2}.items()}
    heads = {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    config = transformers.BartConfig(vocab_size=64, d_model=32, max_position_embeddings=32, **sides, **heads)
    return transformers.BartForConditionalGeneration(config)


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=64, max_position_embeddings=32, **SHAPE))


def qwen2() -> Any:
    config = transformers.Qwen2Config(vocab_size=64, num_key_value_heads=2, tie_word_embeddings=True, **SHAPE)
    return transformers.Qwen2ForCausalLM(config)


def idefics3() -> Any:
    """Its text configuration says that it is tied, its own that it is not, and its class reads a head."""
    text = {"model_type": "llama", "vocab_size": 64, "num_key_value_heads": 2, "tie_word_embeddings": True, **SHAPE}
    vision = {"image_size": 16, "patch_size": 4, **SHAPE}
    config = transformers.Idefics3Config(
        text_config={**text, "pad_token_id": 0},
        vision_config=vision,
        scale_factor=2,
        tie_word_embeddings=False,
        image_token_id=5,
        pad_token_id=0,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def saved(make: Callable[[], Any], directory: Path, seed: int) -> Path:
    """One random model and, for a seed above 0, noise of its own; no tokenizer."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = make()
        torch.manual_seed(seed)
        for parameter in model.parameters() if seed else ():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
        model.save_pretrained(directory)
    return directory


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 13)[None]
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return torch.as_tensor(model.eval()(input_ids=ids, **decoder).logits)


COPIES = {  # as older versions of Transformers wrote them, and many converters still do
    t5: ("shared.weight", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD]),
    bart: ("model.shared.weight", ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", HEAD]),
    bert: ("bert.embeddings.word_embeddings.weight", ["cls.predictions.decoder.weight"]),
}


@each("make", COPIES)
def test_copies_of_a_tied_embedding_in_the_bases_file(
    make: Callable[[], Any], tmp_path: Path, heard: list[str]
) -> None:
    """With weight 1 the result is the target, in Transformers' own words; so it is where all files have copies."""
    one, names = COPIES[make]
    plain, target = saved(make, tmp_path / "plain", 0), saved(make, tmp_path / "target", 1)
    with_copies = []
    for path in (plain, target):
        tensors = read(path)
        copies = {name: tensors[one].clone() for name in names}
        with_copies.append(write(tmp_path / f"{path.name}-copies", tensors | copies, path))
    right = logits(type(make()).from_pretrained(target))
    for number, models in enumerate(([with_copies[0], target], with_copies, [plain, with_copies[1]])):
        out = tmp_path / f"out-{number}"
        report = merge(configuration("task_arithmetic", models, {"weight": 1}, dtype="float32"), out)
        assert not set(names) & set(read(out))
        assert set(report["left_out"]) == set(names)
        model, loading = type(make()).from_pretrained(out, output_loading_info=True)
        assert not loading["missing_keys"]
        torch.testing.assert_close(logits(model), right, rtol=0, atol=2e-5)
    assert heard == []


def test_a_head_that_was_trained_under_a_configuration_that_ties_it(tmp_path: Path, heard: list[str]) -> None:
    """What PEFT leaves of `modules_to_save: [lm_head]`. The heads are merged, and the configuration says that they are not tied."""
    base = saved(qwen2, tmp_path / "base", 0)
    tensors = read(base)
    head = tensors[EMBEDDING] + torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    one = write(tmp_path / "one", tensors | {HEAD: head}, base)
    two = write(tmp_path / "two", {name: 3 * tensor for name, tensor in read(one).items()}, base)
    merge({**configuration("linear", [one, one, two], {"weight": 1}), "base_model": None}, tmp_path / "out")
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    torch.testing.assert_close(model.lm_head.weight, 2 * head)
    torch.testing.assert_close(model.get_input_embeddings().weight, 2 * tensors[EMBEDDING])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    what = f"is no copy of {EMBEDDING} in {one}, though its configuration ties them; merged apart"
    assert heard == [f"{HEAD}: {what}"]
    merge(configuration("task_arithmetic", [one, base], {"weight": 1}), tmp_path / "onto")
    torch.testing.assert_close(
        read(tmp_path / "onto")[HEAD], tensors[EMBEDDING], msg="the target's embedding is its head"
    )
    heard.clear()
    merge(configuration("task_arithmetic", [base, one], {"weight": 1}), tmp_path / "lost")
    assert heard == [f"{HEAD}: is not tied in {one} as in {base}; left out"], "the base has no head"


def test_the_class_decides_where_configurations_say_either(tmp_path: Path) -> None:
    one, two = saved(idefics3, tmp_path / "one", 0), saved(idefics3, tmp_path / "two", 1)
    merge({**configuration("linear", [one, one, two], {"weight": 1}), "base_model": None}, tmp_path / "out")
    found = read(tmp_path / "out")
    torch.testing.assert_close(found[HEAD], (read(one)[HEAD] + read(two)[HEAD]) / 2)
    loaded = type(idefics3()).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loaded[1]["missing_keys"]


def test_one_tensor_gets_one_value_whatever_its_names(tmp_path: Path) -> None:
    """Weights by name would take the copies apart, and so do random masks, which go by name."""
    one, names = COPIES[t5]
    plain, target = saved(t5, tmp_path / "plain", 0), saved(t5, tmp_path / "target", 1)
    models = [
        write(tmp_path / f"{path.name}-copies", read(path) | {name: read(path)[one].clone() for name in names}, path)
        for path in (plain, target)
    ]
    weights = [{"filter": "embed_tokens", "value": 0.25}, {"value": 1}]
    merge(configuration("dare_linear", models, {"weight": weights, "density": 0.5, "seed": 1}), tmp_path / "out")
    model = type(t5()).from_pretrained(tmp_path / "out")
    tables = [model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head]
    assert all(table.weight is model.shared.weight for table in tables)


def test_copies_of_a_type_that_is_not_merged_are_named(tmp_path: Path) -> None:
    """A tied embedding next to its copy, both in float64, which are compared before anything is merged."""
    one = saved(qwen2, tmp_path / "one", 1)
    wide = {name: tensor.double() for name, tensor in read(one).items()}
    base = write(tmp_path / "base", wide | {HEAD: wide[EMBEDDING].clone()}, one)
    with pytest.raises(ModelError, match=r"is stored as F64 in \S*base; convert that model first"):
        merge(configuration("task_arithmetic", [base, one], {"weight": 0.5}), tmp_path / "out")
