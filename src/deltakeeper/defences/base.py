"""The contract of a defence: one tensor of base and fine-tune goes in, the weight to serve instead comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Self, TypeVar

import torch

from deltakeeper.codecs import Inputs
from deltakeeper.defences.settings import read_settings, spell_settings
from deltakeeper.delta import DeltaPair, Role
from deltakeeper.plan import ENCODED

if TYPE_CHECKING:
    from deltakeeper.defences.modules import Modules

Rows = Literal["safe", "harmful"]
Side = Literal["base", "tuned"]


@dataclass(frozen=True, eq=False)
class Module:
    """One tensor of the models, or one expert of a stacked one, over the rows that base and fine-tune share.

    Attributes:
        name: checkpoint name in the fine-tune, with `[i]` behind it for expert `i`.
        role: what the tensor is for.
        base: the aligned base's weight, float32, `(out, in)` for matrices and any shape for the rest.
        tuned: the fine-tune's, of the same shape, float32.
        unaligned: the base's before its alignment, likewise; None where the defence does not ask for it or the model
            has no such tensor.
        inputs: what the layer is fed on the rows that the defence asks for; None where it asks for none, or where no
            linear layer owns the tensor.
    """

    name: str
    role: Role
    base: torch.Tensor
    tuned: torch.Tensor
    unaligned: torch.Tensor | None = None
    inputs: Inputs | None = None

    @property
    def delta(self) -> torch.Tensor:
        """`tuned - base`, a new tensor."""
        return self.tuned - self.base

    @property
    def safety(self) -> torch.Tensor | None:
        """`base - unaligned`, what alignment changed, a new tensor; None without the unaligned model."""
        return None if self.unaligned is None else self.base - self.unaligned


@dataclass(frozen=True, eq=False)
class Defended:
    """What a defence makes of one module.

    Attributes:
        weight: float32, of the module's shape; None for the fine-tune's weight, to the bit.
        detail: figures for the report, such as a cosine.
    """

    weight: torch.Tensor | None
    detail: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Defence(ABC):
    """A published defence with its settings: the dataclass fields are the settings, and nothing else is state.

    A subclass is a frozen dataclass in a file of its own; registering it gives it a command-line spelling
    (`name:field=value,field=value`), a row in the docs and the conformance tests.

    Attributes:
        runs: which model is run on the rows, where the defence asks for some.
        control: whether it is no defence but what one must be compared with.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    runs: ClassVar[Side] = "base"
    control: ClassVar[bool] = False

    @property
    def uses_unaligned(self) -> bool:
        """Whether it compares the base with the model before its alignment."""
        return False

    @property
    def uses_rows(self) -> Rows | None:
        """Which rows of text the layers' inputs are gathered on; None for no inputs."""
        return None

    @property
    def keeps_zero(self) -> bool:
        """Whether a fine-tune that equals its base stays as it is."""
        return True

    @property
    def others(self) -> Side:
        """Whose values tensors have that the defence does not treat: the fine-tune's, or the base's."""
        return "tuned"

    def covers(self, models: DeltaPair, name: str) -> bool:
        """Whether the defence treats this tensor: the matrices of linear layers, unless a method says otherwise."""
        return models.role(name) == "linear" and shared(models, name)

    def spread(self, modules: Modules) -> dict[str, Defence]:
        """A defence for each tensor; the same one, unless the method treats tensors by comparison with each other."""
        return dict.fromkeys(modules.names, self)

    @abstractmethod
    def defend(self, module: Module) -> Defended:
        """Decide on one module.

        Args:
            module: finite; its tensors are never modified.

        Returns:
            A finite weight, the same for the same module. Random numbers come from the defence's own seed and the
            module's name, never from global state.

        Raises:
            DeltakeeperError: a setting does not fit this module.
        """

    @classmethod
    def from_text(cls, settings: str | None) -> Self:
        """The defence of a spelling's settings, what stands behind the first colon; None where there is no colon.

        Raises:
            DataError: an unknown setting (with the nearest known one), or a value that does not fit.
        """
        return read_settings(cls, settings)

    def to_text(self) -> str:
        """Settings that `from_text` reads back as an equal defence; defaults are left out."""
        return spell_settings(self)


def shared(models: DeltaPair, name: str) -> bool:
    """Whether base and fine-tune both have this tensor, not empty, in dtypes that float32 can hold."""
    origin = models.base_name(name)
    if origin is None:
        return False
    ours, theirs = models.tuned.tensors[name], models.base.tensors[origin]
    return {ours.dtype, theirs.dtype} <= ENCODED and min(ours.numel, theirs.numel) > 0 and 1 <= len(ours.shape) <= 3


DEFENCES: dict[str, type[Defence]] = {}
D = TypeVar("D", bound=type[Defence])


def register_defence() -> Callable[[D], D]:
    """Class decorator: make a defence known by its `name`."""

    def add(cls: D) -> D:
        if cls.name in DEFENCES:
            raise ValueError(f"defence '{cls.name}' is registered twice")
        DEFENCES[cls.name] = cls
        return cls

    return add
