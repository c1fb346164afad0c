"""The fine-tune as a teacher whose logits are kept without keeping the model.

What goes to disk is the input of the output head, a hundred times smaller than logits over a vocabulary; the head alone
stays in memory and turns it back into logits. Where a model does more behind its head, such as capping its logits, the
logits themselves go to disk.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deltakeeper.calibration import Document, read_text, tokenise
from deltakeeper.calibration.inputs import load_decoder, load_tokenizer
from deltakeeper.devices import working_device
from deltakeeper.errors import CheckpointError, DataError

Progress = Callable[[int, int, str], None]
Text = str | Path | Sequence[Document] | Sequence[torch.Tensor]
"""A `.txt` or `.jsonl` file, documents, or rows of tokens (int64 `(tokens,)`)."""


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
        stored = load_file(self.folder / f"{number}.safetensors")["teacher"].to(working_device())
        found: torch.Tensor = stored if self.head is None else self.head(stored)
        return found.float()


def read_batches(folder: Path, text: Text, samples: int, length: int, batch: int) -> list[torch.Tensor]:
    """Calibration text as batches of rows of one length each, so that nothing is padded; at least two batches.

    Raises:
        DataError: the text cannot be used, or is too short to hold some of it out.
    """
    documents = read_text(text) if isinstance(text, (str, Path)) else list(text)
    rows = [row for row in documents if isinstance(row, torch.Tensor)]
    if rows and len(rows) < len(documents):
        raise DataError("the text is partly tokens and partly documents; give one of them.")
    if documents and not rows:
        rows = tokenise(load_tokenizer(folder), cast("list[Document]", documents), samples=samples, length=length)
    rows = [row[:length] for row in rows[:samples]]
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
    model: Any = load_decoder(folder).to(working_device())
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    kept = alone(head)
    seen: list[torch.Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen[:] = [args[0].detach()]

    handle = None if kept is None else head.register_forward_pre_hook(note)
    for number, ids in enumerate(batches):
        if progress:
            progress(number, len(batches), "teacher")
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        if not bool(torch.isfinite(logits).all()):
            raise CheckpointError(f"{folder} gives logits that are not finite on this text; the fine-tune is broken.")
        if number == 0 and kept is not None and not (seen and torch.equal(kept(seen[0]), logits)):
            kept = None
        said = logits if kept is None else seen[0]
        if number == 0:
            _check_room(scratch, said.nbytes // ids.numel() * sum(part.numel() for part in batches))
        save_file({"teacher": said.contiguous()}, scratch / f"{number}.safetensors")
    if handle is not None:
        handle.remove()
    del model, head, logits, said
    seen.clear()
    gc.collect()
    return Spool(scratch, batches, kept)


def alone(head: nn.Module | None) -> nn.Linear | None:
    """The head with memory of its own, so that it holds on to nothing of the model; None where it is not linear."""
    if not isinstance(head, nn.Linear):
        return None
    copy = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    copy.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    if head.bias is not None:
        copy.bias = nn.Parameter(head.bias.detach().clone(), requires_grad=False)
    return copy


def _check_room(scratch: Path, nbytes: int) -> None:
    free = shutil.disk_usage(scratch).free
    if nbytes > free:
        raise DataError(
            f"what the fine-tune says on the text takes {nbytes / 10**9:.1f} GB and {scratch.parent} has "
            f"{free / 10**9:.1f} GB free; give fewer samples, or set TMPDIR to a folder on a larger disk."
        )
