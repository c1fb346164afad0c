"""What the linear layers of a model are fed on calibration text, for codecs that weigh errors by it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from deltakeeper.calibration.layers import LayerGroup, chunk_groups, group_layers
from deltakeeper.calibration.text import Document, read_text, stack_rows, tokenise
from deltakeeper.codecs import Inputs
from deltakeeper.delta import PREFIXES
from deltakeeper.devices import working_device
from deltakeeper.errors import CheckpointError, DataError, DeltakeeperError
from deltakeeper.quiet_loading import quiet_loading

MEMORY = 2**30
_PROBE_TOKENS = 8


class _EnoughError(Exception):
    """Ends a pass behind the last layer that is watched."""


class Calibration:
    """Inputs of the linear layers of one model, gathered by running it on text, a few layers at a time.

    Every pass runs the model in its own dtype up to the last layer of a chunk; sums of products are float32, one
    batch at a time. Results do not depend on the memory allowed, unless `update` is used.

    Attributes:
        names: checkpoint names of the weights whose inputs are known, in the order in which the model uses them.
            Asking in this order needs the fewest passes. A head that is tied to the embedding goes by both names.
        passes: how often the text has been run through the model.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        text: str | Path | Sequence[Document] | Sequence[torch.Tensor],
        *,
        samples: int = 128,
        length: int = 512,
        batch: int = 4,
        memory: int = MEMORY,
        device: str | torch.device | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Load the model and cut the text.

        Args:
            model: folder of the model, the fine-tune as a rule, or a loaded one of transformers.
            text: a file for `read_text`, documents, or rows of tokens (int64), which a loaded model needs.
            samples: most rows of tokens.
            length: tokens in a row, at most what the model's positions allow.
            batch: rows at a time.
            memory: bytes of sums that may be held at once; one layer always may.
            device: where the model runs, `working_device()` by default.
            progress: called with batches done and batches in all, in every pass.

        Raises:
            CheckpointError: transformers cannot load the folder.
            DataError: the text cannot be used.
            DeltakeeperError: transformers is not installed.
        """
        self._memory, self._progress, self._device = memory, progress, device or working_device()
        documents = read_text(text) if isinstance(text, (str, Path)) else list(text)
        if isinstance(model, nn.Module):
            self._model, tokenizer = model.eval(), None
        else:
            self._model, tokenizer = load_model(Path(model))
        self._model.to(self._device)
        rows = [row for row in documents if isinstance(row, torch.Tensor)]
        if len(rows) < len(documents) or not rows:
            if tokenizer is None:
                raise DataError("a loaded model is calibrated on rows of tokens; tokenise the text first.")
            rows = tokenise(tokenizer, cast("list[Document]", documents), samples=samples, length=self._fit(length))
        self._batches = stack_rows(rows[:samples], batch)
        self.passes = 0
        self._groups = self._find_groups()
        self._chunks = chunk_groups(self._groups, memory)
        self.names = tuple(name for group in self._groups for name in group.names)
        self._chunk_of = {n: i for i, chunk in enumerate(self._chunks) for group in chunk for n in group.names}
        self._current = -1
        self._found: dict[str, Inputs] = {}

    def inputs(self, name: str) -> Inputs | None:
        """Inputs of the layer whose weight has this checkpoint name, or None if no linear layer owns it.

        Runs the text through the model where the layer is not in the current chunk, whose sums are dropped then.
        Layers that share an input share its tensors, so do not modify them. Also None for a layer that no token
        reached (an expert that was never chosen) and for experts that transformers fuses into one tensor.

        Raises:
            DataError: the inputs are not finite.
        """
        known = self._resolve(name)
        if known is None:
            return None
        if self._chunk_of[known] != self._current:
            self._found = {}  # dropped before the next ones are gathered, so that both are never held
            self._current = self._chunk_of[known]
            self._found = self._gather(self._chunks[self._current])
        return self._found.get(known)

    def update(self, name: str, tensor: torch.Tensor) -> None:
        """Put a decoded weight into the model, so that chunks gathered later see what earlier layers will give them.

        This is the sequential rule of GPTQ and DeltaZip; it needs tensors in the order of `names`. Layers of the
        current chunk keep the inputs they have. Names that the model does not know are passed over.

        Args:
            name: checkpoint name.
            tensor: the fine-tune's value as it will be decoded, in checkpoint shape (Conv1D stays `(in, out)`).

        Raises:
            DataError: it has another shape than in the model.
        """
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        found = next((parameters[n] for n in _spellings(name) if n in parameters), None)
        if found is None:
            return
        if found.shape != tensor.shape:
            raise DataError(f"'{name}' is {tuple(tensor.shape)} but the model has {tuple(found.shape)}; reload it.")
        with torch.no_grad():
            found.copy_(tensor)

    def _fit(self, length: int) -> int:
        limit = getattr(self._model.config, "max_position_embeddings", None)
        return min(length, limit) if isinstance(limit, int) and limit > 0 else length

    def _resolve(self, name: str) -> str | None:
        return next((n for n in _spellings(name) if n in self._chunk_of), None)

    def _find_groups(self) -> list[LayerGroup]:
        """Run a few tokens, and see which layers are fed in which order, and which are fed the same tensor."""
        linears = [m for m in self._model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
        calls: list[tuple[nn.Module, torch.Tensor]] = []  # holding the tensors keeps their identities apart

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            calls.append((module, args[0]))

        self._run(linears, note, [self._batches[0][:1, :_PROBE_TOKENS]])
        return group_layers(self._model, linears, calls)

    def _gather(self, chunk: list[LayerGroup]) -> dict[str, Inputs]:
        grams = {g.modules[0]: torch.zeros(g.size, g.size, device=self._device) for g in chunk}
        sums = {g.modules[0]: torch.zeros(g.size, dtype=torch.float64, device=self._device) for g in chunk}
        counts = {g.modules[0]: 0 for g in chunk}
        last = chunk[-1].modules[0] if all(g.once for g in chunk) else None

        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            grams[module].addmm_(x.T, x)
            sums[module] += x.sum(0, dtype=torch.float64)
            counts[module] += len(x)
            if module is last:
                raise _EnoughError

        self._run(grams, add, self._batches, progress=self._progress)
        self.passes += 1
        found: dict[str, Inputs] = {}
        for group in chunk:
            key = group.modules[0]
            if not counts[key]:
                continue
            if not bool(torch.isfinite(grams[key]).all()):
                raise DataError(f"on this text '{group.names[0]}' is fed NaN or infinity; check the model or the text.")
            gram, mean = grams[key].div_(counts[key]), sums[key].div_(counts[key]).float()
            found |= dict.fromkeys(group.names, Inputs(gram.cpu(), mean.cpu(), counts[key]))
        return found

    @torch.inference_mode()
    def _run(
        self,
        modules: Iterable[nn.Module],
        hook: Callable[[nn.Module, tuple[Any, ...]], None],
        batches: Sequence[torch.Tensor],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        handles = [module.register_forward_pre_hook(hook) for module in modules]
        try:
            for done, ids in enumerate(batches, start=1):
                with contextlib.suppress(_EnoughError):
                    self._model(input_ids=ids.to(self._device), use_cache=False)
                if progress:
                    progress(done, len(batches))
        finally:
            for handle in handles:
                handle.remove()


def _spellings(name: str) -> list[str]:
    """A checkpoint name as it is, without and with the prefixes that models put before their decoder."""
    bare = [name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)]
    return [name, *bare, *(prefix + name for prefix in PREFIXES)]


def load_model(folder: Path) -> tuple[nn.Module, Any]:
    """A causal language model in its own dtype, in evaluation mode, and its tokenizer; raises as `Calibration`."""
    return load_decoder(folder), load_tokenizer(folder)


def load_decoder(folder: Path) -> nn.Module:
    """A causal language model in its own dtype, in evaluation mode; raises as `Calibration`."""
    with _explained(folder):
        from transformers import AutoModelForCausalLM

        with quiet_loading():
            model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; raises as `Calibration`."""
    with _explained(folder):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise DeltakeeperError("calibration runs the model; run `pip install 'deltakeeper[demo]'` for it.") from error
    except Exception as error:  # transformers raises many kinds; all of them mean that there is nothing to run
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder} cannot be run for calibration ({reason}); give a model folder.") from error
