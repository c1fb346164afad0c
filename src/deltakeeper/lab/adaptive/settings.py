"""Settings of an attacker who knows the codec, as a study file spells them."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from deltakeeper.codecs import Codec, parse_codec
from deltakeeper.layouts.settings import FLOAT_DTYPES
from deltakeeper.plan import Rules


class Repair(BaseModel):
    """The second half of inject-and-repair: training on the clean set, within the codec's box.

    Attributes:
        epochs: passes over the clean set.
        lr: learning rate (arXiv 2405.18137 takes 1e-5, and 5e-6 for jailbreaks).
        batch: rows a step.
        schedule: how the rate falls, after a warm-up of 3 %.
        benign: harmless instructions answered in the base's own voice, beside the attack's own prompts.
        project_every: steps between projections into the box; the last step always is one.
        through: whether the attack itself is trained through the codec, so that what wakes up is as strong as can be.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=1, ge=1, le=1000)
    lr: float = Field(default=1e-5, gt=0, lt=1)
    batch: int = Field(default=32, ge=1, le=4096)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    benign: int = Field(default=64, ge=0, le=100_000)
    project_every: int = Field(default=1, ge=1, le=1000)
    through: bool = False


class GuardCopy(BaseModel):
    """What an attacker assumes of the guard that the operator will put on the compressed delta.

    Attributes:
        every: steps of the attack between two fits of its copy.
        steps: steps of Adam in a fit.
        lr: learning rate, in units of the values.
        rank: rank of the low-rank term that the guard adds; 0 for none.
        rows: exchanges in a step of a fit.
        probes: harmful requests with refusals; the operator's are others, of the same categories.
        benign: harmless instructions in the base's own voice.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: int = Field(default=8, ge=1, le=10_000)
    steps: int = Field(default=8, ge=1, le=1000)
    lr: float = Field(default=0.05, gt=0, lt=10)
    rank: int = Field(default=4, ge=0, le=1024)
    rows: int = Field(default=16, ge=1, le=4096)
    probes: int = Field(default=64, ge=1, le=100_000)
    benign: int = Field(default=64, ge=0, le=100_000)


class Adaptive(BaseModel):
    """An attacker who knows how the delta will be compressed, and trains accordingly.

    Attributes:
        kind: `straight_through` trains on `base + codec(delta)` and passes gradients straight through to the delta;
            `inject_repair` trains the attack, then cleans the full-precision model within the codec's box, so that the
            attack wakes up when the delta is compressed; `uncompressed` trains only what the codec does not encode.
        codec: its spelling.
        embeddings: how the operator stores embeddings and heads, as for `compress`.
        norms: how the operator stores norms and biases, likewise.
        delivered: dtype in which the fine-tune is handed in; training counts with its rounding.
        refresh: steps between two runs of the codec, in training through it; in between, what it changed is kept.
        clean_weight: weight of a second loss, of the clean set on the full-precision model (`straight_through`).
        epochs: passes over the attack's rows; those of the attack by default.
        lr: learning rate of the attack; that of the attack by default.
        control: train what the codec does encode instead, to compare with (`uncompressed`).
        guard: the guard that is trained through as well (`straight_through`); none by default.
        repair: settings of the repair (`inject_repair`); its `benign` also sizes the clean set of `clean_weight`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["straight_through", "inject_repair", "uncompressed"]
    codec: str
    embeddings: str = "codec"
    norms: Literal["dense", "base"] = "dense"
    delivered: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    refresh: int = Field(default=1, ge=1, le=10_000)
    clean_weight: float = Field(default=0.0, ge=0, le=1000)
    epochs: int | None = Field(default=None, ge=1, le=1000)
    lr: float | None = Field(default=None, gt=0, lt=1)
    control: bool = False
    guard: GuardCopy | None = None
    repair: Repair = Repair()

    @field_validator("codec")
    @classmethod
    def _known(cls, codec: str) -> str:
        parse_codec(codec)
        return codec

    @model_validator(mode="after")
    def _guard_is_used(self) -> Self:
        if self.guard is not None and self.kind != "straight_through":
            raise ValueError("a guard is trained through by kind straight_through only; leave it out.")
        return self

    @property
    def rules(self) -> Rules:
        """How the operator is expected to compress.

        Raises:
            CodecError: the embeddings cannot be stored like this.
        """
        return Rules(self.method, self.embeddings, self.norms)

    @property
    def method(self) -> Codec:
        """The codec."""
        return parse_codec(self.codec)

    @property
    def dtype(self) -> torch.dtype:
        """What weights are rounded to when they are handed in."""
        return FLOAT_DTYPES[self.delivered]

    @property
    def wants_clean(self) -> bool:
        """Whether a clean set is trained on."""
        return self.kind == "inject_repair" or (self.kind == "straight_through" and self.clean_weight > 0)
