"""What a ranking of layers says to a byte budget: layers that put an outcome back are spared, or starved."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deltakeeper.checkpoint import Checkpoint
from deltakeeper.errors import DataError
from deltakeeper.fingerprint import fingerprint
from deltakeeper.lens.ranking import LayerRanking, RankedPlace

LEAST = 0.05
"""Weight of what matters least: nothing is given up altogether on the word of a few prompts."""
MOST_BYTES = 16 << 20
_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
Use = Literal["spare", "starve"]


@dataclass(frozen=True)
class LayerWeights:
    """Errors of tensors weighed by what their layers put back; says so on the command line as `option` `source`.

    Attributes:
        ranking: of deltas by layer.
        use: `spare` gives bytes to layers that put back most, `starve` takes them away.
        source: the file that the ranking was read from.
    """

    ranking: LayerRanking
    use: Use
    source: str

    @property
    def option(self) -> str:
        """Name of the option of `deltakeeper compress`."""
        return f"{self.use}-layers"

    def check_pair(self, base: Checkpoint, tuned: Checkpoint) -> None:
        """Refuse a pair that the ranking is not of; reads both once, and nothing where it does not say whose it is.

        Raises:
            DataError: it is of another base, or neither donor nor receiver is this fine-tune or made of it.
        """
        origin = self.ranking.origin
        if origin is None:
            return
        for whose, model, known in (
            ("base", base, {origin.base}),
            ("fine-tune", tuned, {origin.donor, origin.receiver} - {origin.base}),
        ):
            if fingerprint(model).root not in known:
                raise DataError(
                    f"{self.source} ranks layers of another {whose} than {model.name_or_path}; "
                    "run `lens --patch` on this pair."
                )

    def weights(self, names: Iterable[str]) -> dict[str, float]:
        """What the error of each tensor is multiplied by, from `LEAST` to 1.

        The share of a layer is divided by the largest of all; what is in no layer goes by the share of `outside`.
        Shares whose interval reaches down to 0 count as none. The number of a layer is the first in a tensor's name,
        as in `model.layers.3.mlp.up_proj.weight`.

        Raises:
            DataError: the ranking is of other layers, or shows none that puts anything back.
        """
        shares = {place.place.layers[:1]: _shown(place) for place in self.ranking.places}
        layers = {name: _layer(name) for name in names}
        if set(layers.values()) - {()} != set(shares) - {()}:
            raise DataError(f"{self.source} ranks other layers than this fine-tune has; rank those of this pair.")
        most = max(shares.values(), default=0.0)
        if most <= 0:
            raise DataError(f"{self.source} shows no layer that puts anything back, so none can be {self._done}.")
        found = {name: shares.get(layer, 0.0) / most for name, layer in layers.items()}
        return {name: max(LEAST, share if self.use == "spare" else 1 - share) for name, share in found.items()}

    @property
    def _done(self) -> str:
        return {"spare": "spared", "starve": "starved"}[self.use]


def _layer(name: str) -> tuple[int, ...]:
    number = _NUMBER.search(name)
    return (int(number[1]),) if number else ()


def _shown(place: RankedPlace) -> float:
    """The share of a place, as far as it is shown to be above 0."""
    if place.share is None or (place.low is not None and place.low <= 0):
        return 0.0
    return max(0.0, place.share)


def read_layer_weights(path: Path, use: Use) -> LayerWeights:
    """Read the ranking of layers from what `deltakeeper lens --patch` wrote, or a ranking alone.

    Raises:
        DataError: there is no such file, or it holds no ranking of deltas by layer.
    """
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise DataError(f"there is no ranking of layers in {path}; give the patch-….json that `lens --patch` wrote.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON in UTF-8; run `lens --patch` again.") from error
    if isinstance(value, dict) and isinstance(value.get("rankings"), dict):
        value = value["rankings"].get("layer")
    ranking = LayerRanking.from_json(value)
    places = [place.place for place in ranking.places]
    if len(set(places)) < len(places):
        raise DataError(f"{path} ranks a layer twice; run `lens --patch` again.")
    if any(place.place.patched not in ("layer", "outside") or len(place.place.layers) > 1 for place in ranking.places):
        raise DataError(f"{path} does not rank the deltas of single layers, which is what weighs them.")
    return LayerWeights(ranking, use, str(path))
