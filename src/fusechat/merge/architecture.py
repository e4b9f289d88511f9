"""What a model's class knows about the tensors in its files: those that it reads, and those that are copies of others."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """A model class. `copies`: tensors that it ties to others, copy → original, by the class's own names. Files of older
    versions, and of the model without its head, use other names: see `known_as`."""

    name: str
    copies: dict[str, str]
    _state: dict[str, Any]
    _changes: tuple[list[Any], list[Any], str]

    def known_as(self, tensor: str) -> str:
        """The class's name for a tensor of a file, as Transformers resolves it on loading."""
        from transformers.core_model_loading import rename_source_key

        renamings, converters, prefix = self._changes
        found = rename_source_key(tensor, renamings, converters, prefix, self._state)[0]
        if found not in self._state and tensor in self._state:
            return tensor
        return str(found)

    def reads(self, tensor: str) -> bool:
        """Whether the class has a weight or a buffer for a tensor of a file."""
        return self.known_as(tensor) in self._state

    def has_part_of(self, tensor: str) -> bool:
        """Whether the tensor belongs to a module that the class has."""
        parts = self.known_as(tensor).split(".")
        within = [f"{'.'.join(parts[:cut])}." for cut in range(1, len(parts))]
        if self._changes[2]:  # files of the model without its head lack the prefix
            within += [f"{self._changes[2]}.{module}" for module in within]
        return any(name.startswith(module) for module in within for name in self._state)


def architecture_of(directory: Path) -> Architecture | None:
    """The class that config.json names, built without weights; None if it is not one of Transformers' own."""
    from fusechat.models.load import quiet_transformers

    quiet_transformers()
    import torch
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        name = config.architectures[0]
        with torch.device("meta"):
            model = getattr(transformers, name)(config)
        changes = get_model_conversion_mapping(model)
    except MemoryError:
        raise
    except Exception:  # no such class, custom code, an invalid configuration, …
        return None
    kinds = [[change for change in changes if isinstance(change, kind)] for kind in (WeightRenaming, WeightConverter)]
    ties = {str(copy): str(original) for copy, original in model.all_tied_weights_keys.items()}
    return Architecture(name, ties, dict(model.state_dict()), (kinds[0], kinds[1], model.base_model_prefix))
