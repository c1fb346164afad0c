"""A PEFT LoRA adapter seen as a fine-tune: `W_base + scaling * B A`, computed tensor by tensor in float32."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from deltakeeper.checkpoint import Checkpoint, read_json
from deltakeeper.errors import CheckpointError
from deltakeeper.safetensors_header import read_header

PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector.*)"
)

_UNREAD = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "target_parameters",
)
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
"""Ways to start training that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract from it."""


class LoraCheckpoint(Checkpoint):
    """The fine-tune that an adapter makes of its base; tensors it does not touch are the base's own.

    `tensors` says the base's dtypes, which is what a merged checkpoint would have; `read` gives float32 for adapted
    tensors, so that the delta is not rounded on its way to a codec.
    """

    def __init__(self, path: Path, name_or_path: str, base: Checkpoint) -> None:
        settings = read_json(path / "adapter_config.json")
        _refuse_unknown(settings, path)
        file = path / "adapter_model.safetensors"
        if not file.is_file():
            raise CheckpointError(f"{path} has no adapter_model.safetensors; save the adapter as safetensors.")
        self.path, self.name_or_path, self.revision = path, name_or_path, None
        self.config = base.config
        self.base = base
        self.tensors = dict(base.tensors)
        self._settings = settings
        self._entries = {name: (file, entry) for name, entry in read_header(file).entries.items()}
        self._handles = {}
        self._opening = Lock()
        self._factors: dict[str, tuple[str, str]] = {}
        self._replaced: dict[str, str] = {}
        self._map_keys(path)

    def _map_keys(self, path: Path) -> None:
        parts: dict[str, dict[str, str]] = {}
        for key in self._entries:
            name = key.removeprefix(PREFIX)
            if match := _PART.fullmatch(name):
                parts.setdefault(match["module"], {})[match["part"].removesuffix(".weight")] = key
            elif not name.endswith(".base_layer.weight"):  # peft may save an adapted layer's own, untrained weight
                target = self._target(name.replace(".modules_to_save", "").replace(".base_layer", ""), key, path)
                if self._entries[key][1].shape != self.base.tensors[target].shape:
                    raise CheckpointError(f"{path} changes the shape of '{target}'; merge it with peft first.")
                self._replaced[target] = key
        for module, keys in parts.items():
            embedding = "lora_embedding_A" in keys
            names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
            if set(keys) != set(names):
                raise CheckpointError(f"{path}: module '{module}' has {sorted(keys)}, not one pair of LoRA factors.")
            target = self._target(f"{module}.weight", keys[names[0]], path)
            self._factors[target] = (keys[names[0]], keys[names[1]])

    def _target(self, name: str, key: str, path: Path) -> str:
        if name not in self.base.tensors:
            raise CheckpointError(
                f"{path} adapts '{key}', but the base {self.base.name_or_path} has no tensor '{name}'; "
                "give the base that the adapter was trained on."
            )
        return name

    def scaling(self, target: str) -> float:
        """Factor of `B A` for one tensor, with the rank and alpha patterns and rank-stabilised LoRA."""
        module = target.removesuffix(".weight")
        rank = _by_pattern(self._settings.get("rank_pattern"), module, self._settings.get("r", 8))
        alpha = _by_pattern(self._settings.get("alpha_pattern"), module, self._settings.get("lora_alpha", 8))
        return float(alpha) / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The factors of one tensor as stored, `(out, rank)` and `(rank, in)`, or None where the adapter has none.

        `scaling` times their product is the delta, after a transposition where `transposed` says so.

        Raises:
            CheckpointError: they have not the rank that the settings say, or another shape than the base's tensor.
        """
        if name not in self._factors:
            return None
        first, second = (self._tensor(key) for key in self._factors[name])
        rank = _by_pattern(self._settings.get("rank_pattern"), name.removesuffix(".weight"), self._settings.get("r", 8))
        if first.ndim != 2 or second.ndim != 2 or not first.shape[0] == second.shape[1] == rank:
            raise CheckpointError(
                f"{self.path}: the factors of '{name}' are {tuple(first.shape)} and {tuple(second.shape)}, not of the "
                f"rank {rank} that its settings say; get the adapter again."
            )
        left, right = (first.T, second.T) if self._embeds(name) else (second, first)
        shape = (left.shape[0], right.shape[1])[:: -1 if self.transposed(name) else 1]
        if shape != self.base.tensors[name].shape:
            raise CheckpointError(
                f"{self.path}: the factors of '{name}' give {shape}, but the base has "
                f"{self.base.tensors[name].shape}; give the base that the adapter was trained on."
            )
        return left, right

    def replaced(self, name: str) -> torch.Tensor | None:
        """The tensor that the adapter holds whole in the place of the base's, in its own dtype, or None."""
        return self._tensor(self._replaced[name]) if name in self._replaced else None

    def transposed(self, name: str) -> bool:
        """Whether the product of the factors is the delta's transpose, as with Conv1D."""
        return bool(self._settings.get("fan_in_fan_out")) and not self._embeds(name)

    def _embeds(self, name: str) -> bool:
        return name in self._factors and self._factors[name][0].endswith("lora_embedding_A")

    def read(self, name: str) -> torch.Tensor:
        """The fine-tuned tensor: float32 where the adapter acts, the stored or base tensor elsewhere."""
        if name in self._replaced:
            return self._tensor(self._replaced[name])
        found = self.factors(name)
        if found is None:
            return self.base.read(name)
        product = found[0].float() @ found[1].float()
        if self.transposed(name):
            product = product.T
        return self.base.read(name).float() + self.scaling(name) * product

    def stored(self, name: str) -> bool:
        """False: tensors are put together from the base and the adapter."""
        return False

    def blocks(self, name: str, nbytes: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """The merged tensor as one block, rounded once to the base's dtype."""
        merged = self.read(name).to(self.tensors[name].dtype)
        yield slice(0, len(merged) if merged.ndim else 1), merged

    def raw(self, name: str) -> memoryview:
        """Bytes of the merged tensor, rounded once to the base's dtype."""
        if name not in self._factors and name not in self._replaced:
            return self.base.raw(name)
        merged = self.read(name).to(self.tensors[name].dtype).contiguous()
        return merged.flatten().view(torch.uint8).numpy().data


def _refuse_unknown(settings: dict[str, Any], path: Path) -> None:
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} is a PEFT adapter of type {settings.get('peft_type')!r}; only LoRA is read.")
    for option in _UNREAD:
        if settings.get(option):
            raise CheckpointError(
                f"{path} uses the LoRA option {option!r}, which is not read; merge it with peft first."
            )
    start = settings.get("init_lora_weights")
    if not isinstance(start, bool | None) and start not in _PLAIN_STARTS:
        raise CheckpointError(f"{path} starts by {start!r}, which may alter the base; merge it with peft first.")
    for option in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(settings.get(option), bool | None):
            raise CheckpointError(f"{path} has {option} = {settings[option]!r}; it must be true or false.")
    for option, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        own = settings.get(pattern) or {}
        if not isinstance(own, dict) or not all(_compiles(key) for key in own):
            raise CheckpointError(f"{path} has a {pattern} that does not map name patterns to numbers; repair it.")
        for value in (settings.get(option, 8), *own.values()):
            if not (_is_rank(value) if option == "r" else _is_finite(value)):
                word = "rank" if option == "r" else "alpha"
                wanted = "a positive whole number" if option == "r" else "a finite number"
                raise CheckpointError(f"{path} has a {word} of {value!r}; it must be {wanted}.")


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
