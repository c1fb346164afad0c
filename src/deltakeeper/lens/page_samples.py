"""Prompts with the traces of their variants and what a judge said of them: what the page is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deltakeeper.errors import DataError
from deltakeeper.lens.trace import PRODUCED, LensTrace
from deltakeeper.lens.trace_statistics import check_alike

_FIXED = {
    "top1": "probability of the likeliest token",
    "entropy": "entropy",
    "kl_final": "KL(own last layer ‖ layer)",
    "kept": "share of the fine-tuning’s shift that the stream keeps",
    "cosine_tuned": "cosine of the stream to the fine-tune’s",
    "cosine_base": "cosine of the stream to the base’s",
}


@dataclass(frozen=True)
class LensSample:
    """One prompt with the traces of its variants.

    Attributes:
        name: unique on the page; links to `anchor_of(name)` open it.
        prompt: what was asked.
        traces: one a variant, of the same cells of the same tokens.
        verdicts: by variant, what a judge said of its answer.
        group: for instance the attack or "harmless".
    """

    name: str
    prompt: str
    traces: Sequence[LensTrace]
    verdicts: Mapping[str, str] = field(default_factory=dict)
    group: str = ""

    @property
    def flipped(self) -> bool:
        """Whether variants were judged differently."""
        return len({self.verdicts[t.meta.variant] for t in self.traces if t.meta.variant in self.verdicts}) > 1


def check_samples(samples: Sequence[LensSample]) -> None:
    """Refuse samples that cannot stand on one page.

    Raises:
        DataError: there are none, two share a name, or variants of one differ in cells or tokens.
    """
    if not samples:
        raise DataError("there is no sample to show; trace at least one prompt.")
    names = [sample.name for sample in samples]
    if len(set(names)) < len(names):
        raise DataError(f"two samples are called {max(names, key=names.count)!r}; give each a name of its own.")
    for sample in samples:
        variants = [trace.meta.variant for trace in sample.traces]
        if not variants or len(set(variants)) < len(variants):
            raise DataError(f"sample {sample.name!r} needs one trace of each of its variants.")
        check_alike(sample.traces)


def names_of_statistics(samples: Sequence[LensSample]) -> dict[str, str]:
    """Statistics that any trace has, with their labels."""
    found: dict[str, str] = {}
    traces = [trace for sample in samples for trace in sample.traces]
    sets = sorted({name for trace in traces for name in trace.targets}, key=lambda name: (name == PRODUCED, name))
    for name in ("top1", "entropy", "kl_final"):
        found[name] = _FIXED[name]
    for name in dict.fromkeys(name for trace in traces for name in trace.kl):
        found[f"kl:{name}"] = f"KL({name} ‖ variant)"
    for name in dict.fromkeys(name for trace in traces for name in trace.js):
        found[f"js:{name}"] = f"JS with {name}"
    for name in sets:
        found[f"prob:{name}"] = f"probability of {'its own choice in the end' if name == PRODUCED else name}"
        if name != PRODUCED:
            found[f"rank:{name}"] = f"rank of the best token of {name}"
    if any("dot" in trace.shift for trace in traces):
        found["kept"] = _FIXED["kept"]
    for name in ("cosine_tuned", "cosine_base"):
        if any(name in trace.shift for trace in traces):
            found[name] = _FIXED[name]
    return found
