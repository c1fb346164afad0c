"""How tokens are drawn where a request does not say: as `generation_config.json` does, which vLLM reads too."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deltakeeper.errors import DataError

FILE_NAME = "generation_config.json"
MOST_BYTES = 1 << 20


class SamplingDefaults(BaseModel):
    """What stands in for parameters that are left out.

    Attributes:
        temperature: 0 is greedy.
        top_p: share of the likeliest tokens that may be drawn.
        top_k: number of them; 0 or -1 for all.
        min_p: least probability, as a share of the likeliest token's.
        repetition_penalty: above 1, what was said already becomes less likely.
    """

    # The file has many other keys, some of which other programs read; `null` is a key that is left out.
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=1 << 31)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=1e-3, le=1e3)


def read_defaults(folder: Path, origin: Path | None = None) -> SamplingDefaults:
    """The defaults that a model's folder gives; OpenAI's where it has no such file.

    Args:
        folder: where the file is read.
        origin: where errors say that it lies; the same by default.

    Raises:
        DataError: the file is too large, no JSON object, or has a value that cannot be meant.
    """
    file = folder / FILE_NAME
    if not file.is_file():
        return SamplingDefaults()
    named = (origin or folder) / FILE_NAME
    if file.stat().st_size > MOST_BYTES:
        raise DataError(f"{named} is larger than {MOST_BYTES:,} bytes, which no generation config is; get it again.")
    try:
        found = json.loads(file.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        return SamplingDefaults.model_validate({key: value for key, value in found.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"{'.'.join(map(str, first['loc']))} in {named} cannot be used ({first['msg'].lower()}); correct it, or "
            "serve with --generation-config none."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{named} holds no JSON object; get it again.") from error
