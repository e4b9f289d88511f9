"""Private names of PyTorch and Transformers, and why they are used. A test keeps them out of other modules.

Public names do the rest: `Trainer.get_batch_samples`, `TrainerCallback.on_save`, `TrainingArguments.device`, `hf_device_map`.
"""

from importlib import import_module
from operator import attrgetter
from typing import Any

from fusechat.errors import FuseChatError

NAMES = {
    "transformers.Trainer._get_train_sampler": "the public get_train_dataloader would have to make the whole loader again to "
    "change its order of conversations",
    "transformers.Trainer._get_eval_sampler": "the same of get_eval_dataloader: every process measures as many batches",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported": "no public function says whether a CPU multiplies in bfloat16",
}


def gone() -> list[str]:
    """A line for each of these names that the installed version lacks."""
    lines = []
    for path, why in NAMES.items():
        library, _, name = path.partition(".")
        module = import_module(library)
        if name.startswith("ops.mkldnn") and not module.backends.mkldnn.is_available():
            continue  # a PyTorch built without it
        try:
            attrgetter(name)(module)
        except AttributeError:
            version = f"{library} {module.__version__}"
            lines.append(
                f"{version} has no {name}, which FuseChat needs ({why}); install an older version of {library}"
            )
    return lines


class SamplerHooks:
    """A base class to put before Transformers' `Trainer`, whose subclasses may override `train_sampler` and `eval_sampler`.
    Raises FuseChatError if the Trainer would not call them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if lines := gone():
            raise FuseChatError(*lines)

    def train_sampler(self, dataset: Any) -> Any:
        """The sampler of the recipe's `train_sampling_strategy`."""
        return super()._get_train_sampler(dataset)  # type: ignore[misc]

    def eval_sampler(self, dataset: Any) -> Any:
        """The sampler of evaluation; None for the data loader's own."""
        return super()._get_eval_sampler(dataset)  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return self.eval_sampler(eval_dataset)


def cpu_multiplies_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 kernels for this CPU."""
    import torch

    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
