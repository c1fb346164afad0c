"""The fine-tune shrunk as much as a codec shrinks it: rules out that a codec protects by its shorter step alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from deltakeeper.codecs import Codec, parse_codec
from deltakeeper.codecs import spell as spell_codec
from deltakeeper.defences.base import Defence, Defended, Module, register_defence
from deltakeeper.delta import DeltaPair
from deltakeeper.errors import DataError
from deltakeeper.plan import encodable
from deltakeeper.survey import survey_delta

if TYPE_CHECKING:
    from deltakeeper.defences.modules import Modules


@register_defence()
@dataclass(frozen=True)
class NormMatched(Defence):
    """`base + λ delta` with a λ for each matrix, so that `‖λ delta‖` is the norm of what the codec makes of the delta.

    Every matrix that the codec would encode is shrunk, embeddings and heads too; vectors stay the fine-tune's. Codecs
    that weigh errors by the inputs of a layer are asked without them. Spelled `norm_matched:` and the codec.

    Attributes:
        codec: whose norms are met.
    """

    name: ClassVar[str] = "norm_matched"
    title: ClassVar[str] = "Norm-matched shrinking"
    summary: ClassVar[str] = "each matrix's delta scaled to the length that a codec leaves of it"
    paper: ClassVar[str] = ""
    control: ClassVar[bool] = True

    codec: Codec = dataclasses.field(default_factory=lambda: parse_codec("bitdelta"))

    def __post_init__(self) -> None:
        if not isinstance(self.codec, Codec):
            raise DataError(f"defence 'norm_matched' takes a codec, not {self.codec!r}; give one, such as bitdelta.")

    @classmethod
    def from_text(cls, settings: str | None) -> Self:
        """See `Defence.from_text`; raises CodecError for what is no codec."""
        return cls() if settings is None else cls(parse_codec(settings))

    def to_text(self) -> str:
        """See `Defence.to_text`."""
        return spell_codec(self.codec)

    def covers(self, models: DeltaPair, name: str) -> bool:
        """What a codec encodes by default."""
        return encodable(models, name)

    def spread(self, modules: Modules) -> dict[str, Defence]:
        """See `Defence.spread`; the codec spread over the tensors, where it treats them by comparison."""
        if not self.codec.surveys:
            return dict.fromkeys(modules.names, self)
        codecs = self.codec.spread(survey_delta(modules.models, modules.names, workers=1))
        return {name: NormMatched(codec) for name, codec in codecs.items()}

    def defend(self, module: Module) -> Defended:
        """See `Defence.defend`; raises CodecError where the codec does."""
        delta = module.delta
        length = _length(delta)
        if length == 0:
            return Defended(None)
        first, *others = self.codec.encode(delta, name=module.name)
        found = first.to_dense()
        for term in others:
            found = found + term.to_dense()
        factor = _length(found) / length
        return Defended(torch.add(module.base, delta, alpha=factor), {"factor": factor})


def _length(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
