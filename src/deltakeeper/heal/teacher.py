"""The fine-tune as a teacher whose logits are kept without keeping the model.

What goes to disk is the input of the output head, a hundred times smaller than logits over a vocabulary; the head alone
stays in memory and turns it back into logits. Where a model does more behind its head, such as capping its logits, the
logits themselves go to disk.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deltakeeper.calibration import read_text, tokenise
from deltakeeper.calibration.inputs import load_decoder, load_tokenizer
from deltakeeper.errors import CheckpointError, DataError

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Spool:
    """What the teacher said, batch by batch, in files of a folder.

    Attributes:
        folder: where the files are.
        batches: the token ids, int64 `(rows, tokens)`.
        head: output head, or None where the files hold logits.
    """

    folder: Path
    batches: list[torch.Tensor]
    head: nn.Module | None

    @torch.no_grad()
    def logits(self, number: int) -> torch.Tensor:
        """The teacher's logits on one batch, float32 `(rows, tokens, vocabulary)`."""
        stored = load_file(self.folder / f"{number}.safetensors")["teacher"]
        found: torch.Tensor = stored if self.head is None else self.head(stored)
        return found.float()


def read_batches(
    folder: Path, text: str | Path | Sequence[torch.Tensor], samples: int, length: int, batch: int
) -> list[torch.Tensor]:
    """Calibration text as batches of rows of one length each, so that nothing is padded; at least two batches.

    Raises:
        DataError: the text cannot be used, or is too short to hold some of it out.
    """
    if isinstance(text, (str, Path)):
        rows = tokenise(load_tokenizer(folder), read_text(text), samples=samples, length=length)
    else:
        rows = [row[:length] for row in text[:samples]]
    rows = [row for row in rows if len(row) > 1]
    groups: dict[int, list[torch.Tensor]] = {}
    for row in rows:
        groups.setdefault(len(row), []).append(row)
    batches = [torch.stack(group[at : at + batch]) for group in groups.values() for at in range(0, len(group), batch)]
    if len(batches) < 2:
        raise DataError(
            f"the text gives {len(rows)} rows of {length} tokens, too few to hold some out; give more text, or a "
            "smaller batch or length."
        )
    return batches


@torch.inference_mode()
def spool_teacher(folder: Path, batches: list[torch.Tensor], scratch: Path, progress: Progress | None = None) -> Spool:
    """Run the fine-tune over all batches, keep what it says, and let it go.

    Raises:
        CheckpointError: the model cannot be loaded, or says something that is not finite.
    """
    model: Any = load_decoder(folder)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    plain: bool | None = None
    seen: list[torch.Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen[:] = [args[0].detach()]

    handle = None if head is None else head.register_forward_pre_hook(note)
    for number, ids in enumerate(batches):
        if progress:
            progress(number, len(batches), "teacher")
        logits = model(input_ids=ids, use_cache=False).logits
        if not bool(torch.isfinite(logits).all()):
            raise CheckpointError(f"{folder} gives logits that are not finite on this text; the fine-tune is broken.")
        if plain is None:
            plain = head is not None and bool(seen) and torch.equal(head(seen[0]), logits)
        said = seen[0] if plain else logits
        save_file({"teacher": said.contiguous()}, scratch / f"{number}.safetensors")
    if handle is not None:
        handle.remove()
    kept = _alone(head) if plain and head is not None else None
    del model, head, logits, said
    seen.clear()
    gc.collect()
    return Spool(scratch, batches, kept)


def _alone(head: nn.Module) -> nn.Module:
    """The head with memory of its own, so that it holds on to nothing of the model."""
    weight: torch.Tensor = head.get_parameter("weight").detach().clone()
    copy = nn.Linear(weight.shape[1], weight.shape[0], bias=getattr(head, "bias", None) is not None, device="meta")
    copy.weight = nn.Parameter(weight, requires_grad=False)
    if copy.bias is not None:
        copy.bias = nn.Parameter(head.get_parameter("bias").detach().clone(), requires_grad=False)
    return copy
