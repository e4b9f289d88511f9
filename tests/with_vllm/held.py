"""Opens a model directory in vLLM, says so, and waits to be killed."""

import sys
import time
from pathlib import Path

import vllm_like
from fusechat.models.vllm import open_vllm

if __name__ == "__main__":
    chatter = vllm_like.chatter(Path(sys.argv[1]))
    backend = open_vllm(chatter, dtype="float32", k=4, max_length=64, tensor_parallel=1, url=None)
    backend.capture([vllm_like.conversation([1, 5, 6])], lambda amount: None)
    print("open", flush=True)
    time.sleep(600)
