"""The index of what the lens saw of a fine-tune: which trace of which sample and arm has which key."""

from __future__ import annotations

from typing import Any

from deltakeeper.errors import RunError
from deltakeeper.study.cells import KEY
from deltakeeper.study.fields import Fields, check_version

LENS_VERSION = 1


def read_lens_index(value: Any, where: str) -> list[dict[str, Any]]:
    """The samples of a lens index, read strictly; raises RunError."""
    samples = []
    with Fields(value, where) as read:
        check_version(read, where, LENS_VERSION)
        read.text("attack"), read.count("seed")
        for place, fields in read.objects("samples"):
            with fields as item:
                keys = {}
                for _, pair in item.objects("traces"):
                    with pair as trace:
                        keys[trace.text("arm")] = trace.text("key")
                found = {"probe": item.text("probe"), "sample": item.text("sample")}
                samples.append({**found, "flipped": list(item.texts("flipped")), "traces": keys})
            if any(not KEY.fullmatch(key) for key in keys.values()):
                raise RunError(f"{place} holds what is no key of a trace; run the study again.")
    return samples
