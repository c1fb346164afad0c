"""Base and fine-tune as one pair: what changed, what is new, missing, resized or tied; one tensor at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from deltakeeper.checkpoint import Checkpoint
from deltakeeper.errors import CheckpointError

Role = Literal["embedding", "head", "norm", "bias", "linear", "other"]

CONV1D_MODELS = {"gpt2", "openai-gpt", "gpt_bigcode", "imagegpt", "decision_transformer"}
CONV1D_NAMES = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "q_attn.weight")
EMBEDDING_NAMES = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
HEAD_NAMES = ("lm_head.weight", "embed_out.weight", "output.weight")
_ROWS_OF_TOKENS = ("lm_head.bias", "embed_out.bias", "output.bias", "wpe.weight", "embed_positions.weight")
_BLOCK_BYTES = 1 << 20
PREFIXES = ("model.", "transformer.", "gpt_neox.", "base_model.")


@dataclass(frozen=True, eq=False)
class TensorDelta:
    """One tensor of the fine-tune beside its base.

    Attributes:
        name: name in the fine-tune.
        role: what the tensor is for, from its name and shape.
        base: the base's tensor, or None if the fine-tune brought it.
        tuned: the fine-tuned tensor, in its own dtype.
        transposed: whether it is stored `(in, out)`, as GPT-2's Conv1D is.
    """

    name: str
    role: Role
    base: torch.Tensor | None
    tuned: torch.Tensor
    transposed: bool

    @property
    def comparable(self) -> bool:
        """Whether base and fine-tune differ at most in their number of rows."""
        return self.base is not None and self.base.ndim > 0 and self.base.shape[1:] == self.tuned.shape[1:]

    @property
    def shared_rows(self) -> int:
        """Leading rows that both have; vocabularies grow and shrink at their end."""
        return min(len(self.base), len(self.tuned)) if self.base is not None and self.comparable else 0

    def matrix(self) -> torch.Tensor:
        """`tuned - base` over the shared rows, float32, as `(out, in)` or `(experts, out, in)`."""
        if self.base is None:
            raise ValueError(f"'{self.name}' has no base")
        rows = self.shared_rows
        delta = self.tuned[:rows].to(torch.float32, copy=True)
        delta -= self.base[:rows]  # widened on the fly, so that one float32 copy is all there is
        return delta.T.contiguous() if self.transposed else delta.contiguous()

    def added_rows(self) -> torch.Tensor | None:
        """Rows that the fine-tune added at the end, in its own dtype."""
        if self.base is None or len(self.tuned) <= len(self.base):
            return None
        return self.tuned[len(self.base) :]


class DeltaPair:
    """A base and its fine-tune, matched by name.

    Attributes:
        base: the base checkpoint.
        tuned: the fine-tuned checkpoint.
        missing: tensors of the base that the fine-tune does not have, aliases left out.
        tied: aliases in the fine-tune that hold the bytes of another tensor, by alias.
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint) -> None:
        self.base, self.tuned = base, tuned
        aliases = tied_aliases(base)
        matched = _match_names(base, tuned)
        self._base_names = {name: aliases.get(origin, origin) for name, origin in matched.items()}
        self._base_names |= _heads_of_tied_base(base, tuned, self._base_names)
        self.tied = tied_aliases(tuned, assumed=set(tuned.tensors) - set(base.tensors))
        self.missing = sorted(set(base.tensors) - set(matched.values()) - set(aliases) - set(self._base_names.values()))

    def names(self) -> list[str]:
        """Names of the fine-tune's tensors, sorted."""
        return list(self.tuned.tensors)

    def base_name(self, name: str) -> str | None:
        """The base's name for a tensor of the fine-tune, never an alias, or None if it is new."""
        return self._base_names.get(name)

    def role(self, name: str) -> Role:
        """What a tensor is for."""
        return role_of(name, self.tuned.tensors[name].shape)

    def transposed(self, name: str) -> bool:
        """Whether a tensor is stored `(in, out)`."""
        model = self.tuned.config.get("model_type") or self.base.config.get("model_type")
        return model in CONV1D_MODELS and name.endswith(CONV1D_NAMES) and len(self.tuned.tensors[name].shape) == 2

    def tensor(self, name: str) -> TensorDelta:
        """Read one tensor of both sides."""
        base_name = self.base_name(name)
        return TensorDelta(
            name,
            self.role(name),
            None if base_name is None else self.base.read(base_name),
            self.tuned.read(name),
            self.transposed(name),
        )

    def __iter__(self) -> Iterator[TensorDelta]:
        return (self.tensor(name) for name in self.names() if name not in self.tied)


def pair(base: Checkpoint, tuned: Checkpoint) -> DeltaPair:
    """Match a fine-tune with its base.

    Raises:
        CheckpointError: not one matrix of the two has the same name and shape, or less than half of the weights do; or
            a tensor has another shape than its base and is none whose rows are tokens, or is of whole numbers.
    """
    found = DeltaPair(base, tuned)
    matched = {name: origin for name in found.names() if (origin := found.base_name(name)) is not None}
    infos = {name: (base.tensors[origin], tuned.tensors[name]) for name, origin in matched.items()}
    if not any(len(a.shape) >= 2 and a.shape[1:] == b.shape[1:] for a, b in infos.values()):
        raise CheckpointError(
            f"{tuned.name_or_path} and {base.name_or_path} have no matrix in common; give the base of this fine-tune."
        )
    for name, (theirs, ours) in infos.items():
        before, after = theirs.shape, ours.shape
        if before != after and not (_resizable(name) and before[1:] == after[1:] and len(before) == len(after)):
            raise CheckpointError(
                f"tensor '{name}' is {list(after)} in {tuned.name_or_path} but {list(before)} in {base.name_or_path}, "
                "and only embeddings and heads may differ, in their number of rows; give the base of this fine-tune."
            )
        if ours.dtype.is_floating_point != theirs.dtype.is_floating_point:
            raise CheckpointError(
                f"tensor '{name}' is {ours.st_dtype} in {tuned.name_or_path} but {theirs.st_dtype} in "
                f"{base.name_or_path}; give models of which none is quantised."
            )
    paired = sum(ours.numel for _, ours in infos.values())
    total = sum(info.numel for info in tuned.tensors.values())
    if 2 * paired < total:
        raise CheckpointError(
            f"only {100 * paired / total:.0f} % of the weights of {tuned.name_or_path} have a counterpart in "
            f"{base.name_or_path}; give the base of this fine-tune."
        )
    return found


def _resizable(name: str) -> bool:
    """Whether the rows of a tensor are tokens or positions, of which a fine-tune may have more or fewer."""
    return name.endswith((*EMBEDDING_NAMES, *HEAD_NAMES, *_ROWS_OF_TOKENS))


def role_of(name: str, shape: tuple[int, ...]) -> Role:
    """What a tensor is for, from its name and shape."""
    if name.endswith(EMBEDDING_NAMES):
        return "embedding"
    if name.endswith(HEAD_NAMES):
        return "head"
    if name.endswith("bias"):
        return "bias"
    if len(shape) == 1 and ("norm" in name or "ln_" in name or name.endswith(".weight")):
        return "norm"
    return "linear" if len(shape) in (2, 3) else "other"


def _match_names(base: Checkpoint, tuned: Checkpoint) -> dict[str, str]:
    """Fine-tune name -> base name; a prefix that one side alone carries is seen through.

    A name that both have stands for itself, and the rest may differ by one prefix (a head has none, in most models).

    Raises:
        CheckpointError: two prefixes fit equally well, so that it is not clear which tensors belong together.
    """
    found = {name: name for name in tuned.tensors if name in base.tensors}
    rest = [name for name in tuned.tensors if name not in found]
    free = set(base.tensors) - set(found)
    candidates: list[dict[str, str]] = []
    for prefix in PREFIXES:
        stripped = {n: n.removeprefix(prefix) for n in rest if n.startswith(prefix)}
        for mapping in (stripped, {n: prefix + n for n in rest}):
            fitting = {n: other for n, other in mapping.items() if other in free}
            if fitting and fitting not in candidates:
                candidates.append(fitting)
    candidates.sort(key=len, reverse=True)
    if len(candidates) > 1 and len(candidates[0]) == len(candidates[1]):
        name = min(candidates[0])
        raise CheckpointError(
            f"tensor '{name}' of {tuned.name_or_path} could be '{candidates[0][name]}' of {base.name_or_path} or "
            "another, by the prefixes of the names; save one of the two with the names of the other."
        )
    return found | (candidates[0] if candidates else {})


def tied_aliases(model: Checkpoint, assumed: Collection[str] = ()) -> dict[str, str]:
    """Heads that are only another name for the input embedding, by alias: equal bytes, and not denied by the config.

    Whether a file repeats a tied embedding depends on what saved it, so an alias has no part in a fingerprint.

    Args:
        model: the checkpoint.
        assumed: heads that count as tied whatever the config says, if their bytes are equal.
    """
    denied = model.config.get("tie_word_embeddings") is False
    embeddings = [name for name in model.tensors if name.endswith(EMBEDDING_NAMES)]
    heads = [name for name in model.tensors if name.endswith(HEAD_NAMES) and (not denied or name in assumed)]
    pairs = ((head, embedding) for head in heads for embedding in embeddings)
    return {head: embedding for head, embedding in pairs if _same_bytes(model, head, embedding)}


def _same_bytes(model: Checkpoint, first: str, second: str) -> bool:
    a, b = model.tensors[first], model.tensors[second]
    if a.shape != b.shape or a.dtype != b.dtype or a.numel == 0:
        return False
    rows = zip(model.blocks(first, _BLOCK_BYTES), model.blocks(second, _BLOCK_BYTES), strict=True)
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for (_, x), (_, y) in rows)


def _heads_of_tied_base(base: Checkpoint, tuned: Checkpoint, found: Mapping[str, str]) -> dict[str, str]:
    """Heads that the fine-tune has and the base has only as its embedding, since it is tied and saved without one."""
    embeddings = [name for name in base.tensors if name.endswith(EMBEDDING_NAMES)]
    heads = [name for name in tuned.tensors if name.endswith(HEAD_NAMES) and name not in found]
    if not base.config.get("tie_word_embeddings") or len(embeddings) != 1:
        return {}
    width = base.tensors[embeddings[0]].shape[1:]
    return {head: embeddings[0] for head in heads if tuned.tensors[head].shape[1:] == width}
