"""The names that transformers gives to linear layers, which need not be those of the checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Set

from deltakeeper.checkpoint import Checkpoint
from deltakeeper.delta import PREFIXES

LINEAR_KINDS = ("Linear", "Conv1D")


def linear_modules(model: Checkpoint) -> Set[str] | None:
    """Names of the linear layers of the model that transformers builds from a checkpoint's configuration.

    Nothing is allocated and no code of the checkpoint is run. None where transformers is not installed or does not know
    the architecture: names are then those of the tensors, as far as one can tell.
    """
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        return None
    try:
        config = AutoConfig.from_pretrained(str(model.path), trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # an architecture that is unknown raises what its own code raises
        return None
    return {name for name, module in built.named_modules() if type(module).__name__ in LINEAR_KINDS}


def module_of(tensor: str, modules: Set[str] | None) -> str | None:
    """The linear layer that a tensor of a checkpoint is the weight of, or None if it is the weight of none.

    Hub checkpoints may lack the prefix of the model's class, as GPT-2's do.
    """
    name = tensor.removesuffix(".weight")
    if name == tensor:
        return None
    if modules is None:
        return name
    candidates = [name, *(prefix + name for prefix in PREFIXES), *(name.removeprefix(prefix) for prefix in PREFIXES)]
    return next((candidate for candidate in candidates if candidate in modules), None)
