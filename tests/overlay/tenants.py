"""Bases and fine-tunes for the overlay's tests, and the merged models that they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from deltakeeper.apply import apply_delta
from deltakeeper.artifact import DeltaArtifact, open_artifact
from deltakeeper.compress import compress
from deltakeeper.kernels.rows import RowGroups
from deltakeeper.testing import build_model, write_pair

SCALE = 0.02


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@dataclass
class Family:
    """One base and the artifacts of several fine-tunes of it."""

    folder: Path
    base: Path
    kind: str
    dtype: torch.dtype

    def tune(self, name, codec, *, seed=7, extra=0, edit=None, config=None, **options) -> DeltaArtifact:
        """Write a fine-tune of the base and compress it."""
        scratch = self.folder / name
        _, tuned = write_pair(self.kind, scratch, seed=seed, dtype=self.dtype, vocab_extra=extra, scale=SCALE)
        model = load(tuned)
        origin = dict(load(self.base).named_parameters())
        # The fine-tune of `write_pair` is one of a base of its own seed: move its delta over.
        own = dict(load(scratch / "base").named_parameters())
        with torch.no_grad():
            for key, value in model.named_parameters():
                rows = len(origin[key])
                delta = value[:rows].float() - own[key].float()
                value[:rows] = origin[key].float() + delta
            if edit is not None:
                edit(model)
        for key, value in (config or {}).items():
            setattr(model.config, key, value)
        model.save_pretrained(scratch / "mine")
        compress(self.base, scratch / "mine", scratch / "delta", codec, **options)
        return open_artifact(scratch / "delta")

    def merged(self, artifact):
        """The model that `apply` makes of an artifact."""
        out = artifact.path.parent / "merged"
        return load(out if out.exists() else apply_delta(self.base, artifact, out))

    def live(self):
        return load(self.base)


def family(kind, folder, dtype=torch.float32) -> Family:
    base = folder / "base"
    build_model(kind, seed=3).to(dtype).save_pretrained(base)
    return Family(folder, base, kind, dtype)


def ids(rows, length=9, vocabulary=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (rows, length), generator=generator)


def groups_of(slots, length=9) -> RowGroups:
    return RowGroups.of([slot for slot in slots for _ in range(length)])


@torch.inference_mode()
def logits(model, tokens):
    return model(tokens).logits.float()


def mixed(overlay, slots, tokens):
    """Logits of one batch in which row `i` belongs to `slots[i]`."""
    with overlay.rows(groups_of(slots, tokens.shape[1])):
        return overlay.model(tokens).logits.float()
