"""Opens a model directory in vLLM, says so, and waits to be killed."""

import sys
import time
from pathlib import Path

import vllm_like
from fusechat.models.vllm import open_vllm

if __name__ == "__main__":
    chat_model = vllm_like.chat_model(Path(sys.argv[1]))
    backend = open_vllm(chat_model, dtype="float32", k=4, max_length=64, tensor_parallel=1, url=None)
    backend.capture([vllm_like.conversation([1, 5, 6])], lambda amount: None)
    print("open", flush=True)
    time.sleep(600)
