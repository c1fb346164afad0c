"""One tensor of a fine-tune through its codec: read, encode, decode again, hash."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from deltakeeper.artifact_writer import as_bytes
from deltakeeper.checkpoint import Checkpoint
from deltakeeper.codecs import Codec, Inputs, RowEncoder
from deltakeeper.delta import DeltaPair, TensorDelta
from deltakeeper.errors import CodecError
from deltakeeper.fidelity import Sums, compare, compare_rows
from deltakeeper.fingerprint import begin_leaf, begin_leaves, hash_tensor, leaf_hash
from deltakeeper.layouts import Layout
from deltakeeper.layouts.dense import Dense
from deltakeeper.manifest import TensorRecord, TermRecord
from deltakeeper.native import KINDS, load_library
from deltakeeper.plan import Choice, unchanged
from deltakeeper.reconstruct import dense_delta, merge_block, reconstruct

BLOCK_BYTES = 1 << 20
"""Rows of base and fine-tune are read in blocks of about this size, which stay in the cache of one core."""

Slices = list[tuple[int | None, Layout]]


@dataclass(frozen=True)
class Encoded:
    """One tensor, ready to be written.

    Attributes:
        record: what the manifest will say, but for the term records, which the writer makes.
        terms: packed terms, each with the expert it belongs to in a 3-D tensor.
        added: rows that the fine-tune added.
        sums: how near what the artifact decodes to is; None for aliases and for what the base does not have.
        base_leaf: hash of the base's tensor, None without one.
        target_leaf: hash of the fine-tune's tensor, None for an alias.
        decoded_leaf: hash of what the artifact decodes to, None for an alias.
    """

    record: TensorRecord
    terms: Slices
    added: torch.Tensor | None = None
    sums: Sums | None = None
    base_leaf: str | None = None
    target_leaf: str | None = None
    decoded_leaf: str | None = None

    @property
    def exact(self) -> bool:
        """Whether every machine decodes it to the same bytes."""
        return all(term.exact for _, term in self.terms)


def encode_tensor(models: DeltaPair, name: str, choice: Choice, inputs: Inputs | None = None) -> Encoded:
    """Do with one tensor what the plan says.

    Raises:
        CodecError: the tensor or its delta is not finite, or does not fit the codec.
    """
    origin = models.base_name(name)
    record = TensorRecord(
        shape=models.tuned.tensors[name].shape,
        dtype=models.tuned.tensors[name].st_dtype,
        role=models.role(name),
        encoding="tied" if choice.treatment == "tied" else "terms",
        base_name=origin,
        base_shape=None if origin is None else models.base.tensors[origin].shape,
        transposed=models.transposed(name) and choice.treatment != "tied",
        tied_to=models.tied.get(name),
    )
    if choice.treatment == "tied":
        return Encoded(record, [], base_leaf=None if origin is None else hash_tensor(models.base, origin))
    encoder = _row_encoder(models, name, choice)
    if encoder is not None:
        return _encode_blocks(models, name, record, encoder)
    return _encode_whole(models, name, record, choice, inputs)


def decode_tensor(models: DeltaPair, name: str, encoded: Encoded) -> torch.Tensor:
    """What the artifact will give back for one tensor, in the dtype of the fine-tune."""
    origin = encoded.record.base_name
    base = None if origin is None else models.base.read(origin)
    records = tuple(TermRecord(term.name, {}, part) for part, term in encoded.terms)
    record = replace(encoded.record, terms=records, added_rows=0 if encoded.added is None else len(encoded.added))
    terms = [term for _, term in encoded.terms]
    return reconstruct(record, terms, base, encoded.added, models.tuned.tensors[name].dtype)


def working_bytes(models: DeltaPair, name: str, choice: Choice) -> int:
    """About how much memory `encode_tensor` takes."""
    info = models.tuned.tensors[name]
    if choice.treatment == "tied":
        return info.nbytes
    if _row_encoder(models, name, choice) is not None:
        return 4 * BLOCK_BYTES + info.numel // 4
    return 2 * info.nbytes + (16 * info.numel if choice.codec is not None else 0)


def _row_encoder(models: DeltaPair, name: str, choice: Choice) -> RowEncoder | None:
    """An encoder from blocks of rows, where the codec has one and both files hold the tensor as a plain matrix."""
    origin = models.base_name(name)
    if choice.codec is None or origin is None or models.transposed(name) or load_library() is None:
        return None
    ours, theirs = models.tuned.tensors[name], models.base.tensors[origin]
    if len(ours.shape) != 2 or ours.shape != theirs.shape or not {ours.dtype, theirs.dtype} <= set(KINDS):
        return None
    if not (models.base.stored(origin) and models.tuned.stored(name)):
        return None
    return choice.codec.encode_rows((ours.shape[0], ours.shape[1]), name=name)


def _encode_blocks(models: DeltaPair, name: str, record: TensorRecord, encoder: RowEncoder) -> Encoded:
    """Two passes over blocks of rows: encode and hash what goes in, then decode and hash what will come out."""
    ours, theirs = models.tuned.tensors[name], models.base.tensors[record.base_name or name]
    leaves = begin_leaves(ours, theirs)
    same = ours.dtype == theirs.dtype
    for (_, tuned_rows), (_, base_rows) in zip(
        models.tuned.blocks(name, BLOCK_BYTES), models.base.blocks(theirs.name, BLOCK_BYTES), strict=True
    ):
        leaves.update(tuned_rows, base_rows)
        same = same and as_bytes(tuned_rows) == as_bytes(base_rows)
        encoder.add(base_rows, tuned_rows)
    goal, before = leaves.hexdigests()
    if same:
        nothing = Sums(entries=ours.numel, zeros=ours.numel)
        return Encoded(replace(record, encoding="unchanged"), [], None, nothing, before, goal, goal)
    terms, sums = encoder.finish()
    decoded = begin_leaf(name, ours.st_dtype, ours.shape)
    room: torch.Tensor | None = None
    for rows, base_rows in models.base.blocks(theirs.name, BLOCK_BYTES):
        room = torch.empty(base_rows.shape, dtype=ours.dtype) if room is None else room
        decoded.update(as_bytes(merge_block(terms, base_rows, rows, ours.dtype, room)))
    return Encoded(record, [(None, term) for term in terms], None, sums, before, goal, decoded.hexdigest())


def _encode_whole(models: DeltaPair, name: str, record: TensorRecord, choice: Choice, inputs: Inputs | None) -> Encoded:
    delta = models.tensor(name)
    dtype = models.tuned.tensors[name].dtype
    value = delta.tuned.to(dtype)
    target_leaf = leaf_hash(name, record.dtype, record.shape, as_bytes(value))
    base_leaf = None if record.base_name is None else _hash_base(models.base, record.base_name, delta.base)
    if unchanged(models, delta):
        record = replace(record, encoding="unchanged")
        nothing = Sums(entries=value.numel(), zeros=value.numel())
        return Encoded(record, [], None, nothing, base_leaf, target_leaf, target_leaf)
    if choice.treatment == "base":
        decoded = reconstruct(record, [], delta.base, None, dtype)
        leaf = leaf_hash(name, record.dtype, record.shape, as_bytes(decoded))
        record = replace(record, encoding="base")
        return Encoded(record, [], None, _value_sums(delta, decoded), base_leaf, target_leaf, leaf)
    _check_finite(value, f"tensor '{name}' of {models.tuned.name_or_path}")
    if choice.codec is None:
        terms: Slices = [(None, Dense(record.shape, "value", value.contiguous()))]
        return Encoded(record, terms, None, _value_sums(delta, value), base_leaf, target_leaf, target_leaf)
    true = delta.matrix()
    _check_finite(true, f"the delta of '{name}'")
    terms = _encode_slices(choice.codec, true, name, value, inputs)
    packed = [term for _, term in terms]
    if packed[0].replaces:
        return Encoded(
            record,
            terms,
            None,
            compare(true, true),
            base_leaf,
            target_leaf,
            leaf_hash(name, record.dtype, record.shape, as_bytes(reconstruct(record, packed, delta.base, None, dtype))),
        )
    rows = delta.added_rows()
    added = None if rows is None else rows.to(dtype).contiguous()
    record = replace(
        record,
        terms=tuple(TermRecord(term.name, {}, part) for part, term in terms),
        added_rows=0 if added is None else len(added),
    )
    decoded = dense_delta(record, packed)
    sums = compare(true, (decoded.T if record.transposed else decoded).contiguous())
    if delta.base is None or not math.isfinite(sums.decoded_square):
        raise CodecError(f"the codec gave values for '{name}' that are not finite; choose another setting.")
    del true  # the largest tensors: free them before the next one is made
    result = decoded.add_(delta.base[: len(decoded)]).to(dtype)
    result = result if added is None else torch.cat([result, added])
    leaf = leaf_hash(name, record.dtype, record.shape, as_bytes(result))
    return Encoded(record, terms, added, sums, base_leaf, target_leaf, leaf)


def _value_sums(delta: TensorDelta, decoded: torch.Tensor) -> Sums | None:
    return None if delta.base is None else compare_rows(delta.base, delta.tuned, decoded)


def _encode_slices(codec: Codec, matrix: torch.Tensor, name: str, value: torch.Tensor, inputs: Inputs | None) -> Slices:
    """Terms of one tensor; a tensor of experts is encoded expert by expert, unless the codec stores its value."""
    if matrix.ndim == 2:
        return [(None, term) for term in codec.encode(matrix, name=name, tuned=value, inputs=inputs)]
    terms: Slices = []
    for i, part in enumerate(matrix):
        packed = codec.encode(part, name=f"{name}[{i}]", tuned=value, inputs=inputs)
        if packed[0].replaces:
            return [(None, packed[0])]
        terms += [(i, term) for term in packed]
    return terms


def _check_finite(tensor: torch.Tensor, what: str) -> None:
    if tensor.is_floating_point() and not math.isfinite(float(tensor.sum(dtype=torch.float32))):
        broken = int((~torch.isfinite(tensor.float())).sum())
        if broken:
            raise CodecError(f"{what} holds NaN or infinity in {broken} entries; repair or leave out this checkpoint.")


def _hash_base(model: Checkpoint, name: str, tensor: torch.Tensor | None) -> str:
    info = model.tensors[name]
    return hash_tensor(model, name) if tensor is None else leaf_hash(name, info.st_dtype, info.shape, as_bytes(tensor))
