"""What to do where memory does not suffice: tell that it is that, and give back what can be given."""

import torch


def out_of_memory(error: Exception) -> bool:
    """Whether `error` says so, in any of the ways that PyTorch and its backends have."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error)


def free_memory() -> None:
    """To be called when the exception, and what its frames hold, is gone."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
