"""Where one variant puts an outcome back in another: streams and deltas patched over prompts, with their controls.

By default the outcome is what the two of them choose themselves: log-odds of the donor's likeliest next token against
the receiver's, on the prompts where these differ. It needs no list of words and no idea of what the fine-tuning did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from deltakeeper.attach import Change
from deltakeeper.errors import LensError
from deltakeeper.lens.delta_patching import Grain, sweep_deltas
from deltakeeper.lens.departures import crossed_counts
from deltakeeper.lens.outcomes import Outcome, token_margin
from deltakeeper.lens.patching import ControlledSweep, sweep_with_controls
from deltakeeper.lens.ranking import LayerRanking, Origin, rank_places
from deltakeeper.lens.reading import read_logits
from deltakeeper.lens.readings import Reading, encode_readings, pad
from deltakeeper.lens.restored import Sweep
from deltakeeper.lens.targets import known_openers
from deltakeeper.lens.trace_json import plain_number
from deltakeeper.lens.variants import BASE, Variants
from deltakeeper.prompting import Prompt

if TYPE_CHECKING:
    from deltakeeper.lens.figures import LensFigure

FORMAT = "deltakeeper.lens.restoration"
VERSION = 1
RESAMPLES = 1000
By = Literal["choice", "refusal"]
_GRAINS: tuple[Grain, ...] = ("layer", "part")
OUTCOMES: Mapping[By, str] = {
    "choice": "log-odds of the donor's likeliest next token against the receiver's, on prompts where they differ",
    "refusal": "log-odds of tokens that open a refusal against tokens that open agreement",
}


@dataclass(frozen=True, eq=False)
class Restoration:
    """What patching a donor into a receiver puts back of the donor's outcome.

    Attributes:
        streams: the donor's stream in place of the receiver's, layer by layer, with its controls.
        layers: the receiver with the donor's delta of one layer.
        parts: the same with the attention or the MLP of one layer.
        outcome: one of `OUTCOMES`.
        left_out: prompts on which donor and receiver choose the same token, so that there is nothing to put back.
        origin: fingerprints of what was patched, which rankings carry on; None where they are not known.
    """

    streams: ControlledSweep
    layers: Sweep
    parts: Sweep
    outcome: By
    left_out: int
    origin: Origin | None = None

    @property
    def neutral(self) -> float:
        """Share at which the receiver prefers neither outcome, on average: below it, it still chooses its own."""
        corrupted = self.layers.corrupted.mean()
        return float(-corrupted / (self.layers.clean.mean() - corrupted))

    def rankings(self) -> dict[str, LayerRanking]:
        """Places by what they put back, with intervals over resamples of the prompts: `stream`, `layer`, `part`."""
        count = len(self.layers.patched)
        counts = crossed_counts([0] * count, range(count), resamples=RESAMPLES)
        found = {"stream": self.streams.sweep, "layer": self.layers, "part": self.parts}
        return {name: replace(rank_places(sweep, counts), origin=self.origin) for name, sweep in found.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain values: rankings, and restored shares in the order of the layers beside those of the controls."""
        sweeps = {
            "streams": self.streams.sweep,
            "streams_reversed": self.streams.reverse,
            "streams_of_another_prompt": self.streams.other_prompt,
            "layers": self.layers,
            "parts": self.parts,
        }
        return {
            "format": FORMAT,
            "version": VERSION,
            "donor": self.layers.donor,
            "receiver": self.layers.receiver,
            "outcome": OUTCOMES[self.outcome],
            "prompts": len(self.layers.patched),
            "left_out": self.left_out,
            "donor_mean": plain_number(float(self.layers.clean.mean())),
            "neutral": plain_number(self.neutral),
            "receiver_mean": plain_number(float(self.layers.corrupted.mean())),
            "restored": {
                name: {
                    "places": [place.label for place in sweep.places],
                    "shares": [plain_number(share) for share in sweep.restored().tolist()],
                }
                for name, sweep in sweeps.items()
            },
            "rankings": {name: ranking.to_json() for name, ranking in self.rankings().items()},
        }


def patch_prompts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | Prompt],
    changes: Mapping[str, Sequence[Change]],
    *,
    donor: str,
    receiver: str,
    outcome: By = "choice",
    system: str | None = None,
    chat: bool | None = None,
    prompts_per_pass: int = 16,
) -> Restoration:
    """Patch a donor's streams and deltas into a receiver at every layer, and measure what they choose to say next.

    Args:
        model: the base, in evaluation mode.
        tokenizer: its tokenizer.
        prompts: texts, or turns of a chat; the outcome is read at the last token of each.
        changes: of each variant but the base, by name, such as `apply.iterate_changes` and `weights_of` give.
        donor: name of the variant whose outcome is to be put back; `base` for the base.
        receiver: name of the variant that is patched.
        outcome: one of `OUTCOMES`.
        system: a system message in front of every text.
        chat: whether a text goes into the chat template; None for where there is one.
        prompts_per_pass: prompts whose streams of all layers are held at once.

    Raises:
        LensError: there is no such variant, the tokenizer knows no openers, or donor and receiver choose alike on all
            prompts but one.
        DataError: a prompt cannot be encoded.
        DeltakeeperError: a change does not fit the model.
    """
    known = {BASE: (), **changes}
    for name in (donor, receiver):
        if name not in known:
            raise LensError(f"there is no variant '{name}' to patch; name one of {', '.join(known)}.")
    readings = encode_readings(tokenizer, prompts, system=system, chat=chat)
    fill = getattr(tokenizer, "pad_token_id", None) or 0
    whole = {name: known[name] for name in dict.fromkeys((donor, receiver)) if name != BASE}
    with Variants(model, whole=whole) as variants:
        measured: Callable[[Sequence[int]], Outcome]
        if outcome == "refusal":
            margin, kept = refusal_margin(tokenizer), list(range(len(readings)))
            measured = partial(_always, margin)
        else:
            chosen, other = (_choices(variants, name, readings, fill, prompts_per_pass) for name in (donor, receiver))
            kept = [i for i in range(len(readings)) if chosen[i] != other[i]]
            measured = partial(_choice_of, chosen, other)
        if len(kept) < 2:
            raise LensError(
                f"'{donor}' and '{receiver}' choose another token on {len(kept)} of {len(readings)} prompts; "
                "give prompts on which they begin differently, two at least."
            )
        streams = [
            sweep_with_controls(
                variants,
                *pad([readings[i] for i in rows], fill),
                donor=donor,
                receiver=receiver,
                outcome=measured(rows),
            )
            for rows in _passes(kept, prompts_per_pass)
        ]
    layers, parts = (
        sweep_deltas(
            model,
            known,
            *pad([readings[i] for i in kept], fill),
            donor=donor,
            receiver=receiver,
            outcome=measured(kept),
            grain=grain,
            prompts_per_pass=prompts_per_pass,
        )
        for grain in _GRAINS
    )
    return Restoration(
        ControlledSweep(
            _joined([one.sweep for one in streams]),
            _joined([one.reverse for one in streams]),
            _joined([one.other_prompt for one in streams]),
        ),
        layers,
        parts,
        outcome,
        len(readings) - len(kept),
    )


def choice_margin(donor: Sequence[int], receiver: Sequence[int]) -> Outcome:
    """Log-odds of one token against another, each row its own pair, averaged over positions.

    Args:
        donor: token of each row, (rows,).
        receiver: another token of each row, (rows,).
    """
    pairs = torch.tensor([donor, receiver])

    def measure(logits: torch.Tensor) -> torch.Tensor:
        places = pairs.to(logits.device)[:, :, None, None].expand(-1, -1, logits.shape[1], 1)
        first, second = (logits.gather(-1, each)[..., 0] for each in places)
        return (first - second).mean(-1)

    return measure


def refusal_margin(tokenizer: Any) -> Outcome:
    """Log-odds of tokens that open a refusal against tokens that open agreement.

    Raises:
        LensError: the tokenizer knows none.
    """
    openers = known_openers(tokenizer)
    if not {"refusal", "affirmative"} <= set(openers):
        raise LensError("the tokenizer knows no tokens that open refusals and agreement; take the outcome 'choice'.")
    return token_margin(openers["refusal"], openers["affirmative"])


def draw_restoration(found: Restoration) -> dict[str, LensFigure]:
    """Shares put back by layer: `deltas` of layers, of attention and of MLPs; `streams` beside both controls in grey.

    Raises:
        LensError: matplotlib is not installed.
    """
    from deltakeeper.lens.figures import bands

    donor, receiver = found.layers.donor, found.layers.receiver
    parts = {kind: found.parts.only(kind) for kind in ("attention", "mlp")}
    series = {"whole layer": found.layers.only("layer")} | {k: sweep for k, sweep in parts.items() if sweep.places}
    streams = found.streams
    controls = {"the other way round": streams.reverse, "of another prompt": streams.other_prompt}
    return {
        "deltas": bands(
            {name: sweep.bands() for name, sweep in series.items()},
            title=f"{receiver} with single deltas of {donor}",
            y_name="share put back",
        ),
        "streams": bands(
            {"stream": streams.sweep.bands()},
            controls={name: sweep.bands() for name, sweep in controls.items()},
            title=f"{receiver} with the stream of {donor}",
            y_name="share put back",
        ),
    }


def _choices(variants: Variants, name: str, readings: Sequence[Reading], fill: int, step: int) -> list[int]:
    found: list[int] = []
    with variants.serving(name) as (model, around), torch.no_grad():
        for start in range(0, len(readings), step):
            ids, mask = pad(readings[start : start + step], fill)
            last = torch.full((len(ids), 1), ids.shape[1] - 1)
            found += read_logits(model, ids, mask, last, around)[:, 0].argmax(-1).tolist()
    return found


def _always(margin: Outcome, rows: Sequence[int]) -> Outcome:
    return margin


def _choice_of(donor: Sequence[int], receiver: Sequence[int], rows: Sequence[int]) -> Outcome:
    return choice_margin([donor[i] for i in rows], [receiver[i] for i in rows])


def _passes(rows: Sequence[int], step: int) -> Iterator[Sequence[int]]:
    """Rows at a time, none of them alone: another prompt of its pass is a prompt's control."""
    count = max(1, min(-(-len(rows) // step), len(rows) // 2))
    yield from (part.tolist() for part in np.array_split(np.array(rows), count))


def _joined(sweeps: Sequence[Sweep]) -> Sweep:
    return replace(
        sweeps[0],
        patched=np.concatenate([one.patched for one in sweeps]),
        clean=np.concatenate([one.clean for one in sweeps]),
        corrupted=np.concatenate([one.corrupted for one in sweeps]),
    )
