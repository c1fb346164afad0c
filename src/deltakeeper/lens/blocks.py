"""The blocks of a decoder: found without a table of architectures, watched, and replaced by pass-throughs for a while.

Nothing is left behind: hooks and overridden `forward`s are gone, and those of others back, when a `with` block ends.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from deltakeeper.errors import LensError

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
"""What configurations call their number of layers."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_ABSENT = object()
_LOCKS: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()


@dataclass(frozen=True)
class OutputKind:
    """What a block returns.

    Attributes:
        length: of the tuple whose first item is the residual stream; None where the stream itself is returned.
    """

    length: int | None = None

    @classmethod
    def of(cls, output: Any) -> OutputKind:
        """The kind of an output.

        Raises:
            LensError: it is neither a tensor nor a tuple that starts with one.
        """
        if isinstance(output, torch.Tensor):
            return cls()
        if isinstance(output, tuple | list) and output and isinstance(output[0], torch.Tensor):
            return cls(len(output))
        raise LensError(
            f"a block returns a {type(output).__name__}, which holds no residual stream that the lens knows; "
            "give a decoder whose blocks return a tensor or a tuple that starts with one."
        )

    def wrap(self, stream: torch.Tensor) -> Any:
        """A stream as a block of this kind returns it: state and attention weights beside it are None."""
        return stream if self.length is None else (stream, *(None for _ in range(self.length - 1)))


def stream_of(output: Any) -> torch.Tensor:
    """The residual stream in what a block, or a part of one, returned; raises LensError where there is none."""
    return output if OutputKind.of(output).length is None else output[0]  # type: ignore[no-any-return]


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks in their order: the shallowest `ModuleList` as long as the configuration says.

    Raises:
        LensError: the model has no configuration of transformers, or no such list.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        raise LensError(f"a {type(model).__name__} has no configuration; give a Hugging Face decoder.")
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    counts = [getattr(c, name, None) for c in (text, config) for name in LAYER_COUNTS]
    # Beside the decoder there may be towers for images or sound with as many layers.
    places = [place for place in (_decoder(model), model) if place is not None]
    for count in dict.fromkeys(c for c in counts if isinstance(c, int) and c > 0):
        for place in places:
            found = [(n.count("."), m) for n, m in place.named_modules() if isinstance(m, nn.ModuleList)]
            fitting = [(depth, m) for depth, m in found if len(m) == count]
            if fitting:
                return list(min(fitting, key=lambda pair: pair[0])[1])
    raise LensError(
        f"no list of {' or '.join(sorted({str(c) for c in counts if isinstance(c, int)})) or 'layers'} blocks is found "
        f"in a {type(model).__name__}; give a decoder that keeps its layers in one ModuleList."
    )


@contextmanager
def watching(modules: Sequence[nn.Module], see: Callable[[int, Any, Any], None]) -> Iterator[None]:
    """Call `see(index, input, output)` whenever a module has run; `input` is its first tensor, None without one.

    Hooks that others registered run first, so what is seen is what the rest of the model gets.
    """
    handles = []
    try:
        for index, module in enumerate(modules):
            handles.append(module.register_forward_hook(_observer(index, see), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def passing(blocks: Sequence[nn.Module], kinds: Sequence[OutputKind], stream: torch.Tensor) -> Iterator[None]:
    """Every block returns `stream` instead of computing, whatever it is given; hooks of others on blocks stay silent.

    A `forward` set on an instance, as accelerate does, is put back as it was.

    Args:
        blocks: of the decoder.
        kinds: what each of them returns.
        stream: `(rows, positions, width)`.
    """
    saved: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for block, kind in zip(blocks, kinds, strict=True):
            own = block.__dict__
            saved.append((own, {name: own.get(name, _ABSENT) for name in ("forward", *_HOOKS)}))
            own["forward"] = _returning(kind.wrap(stream))
            for name in _HOOKS:
                own[name] = OrderedDict()
        yield
    finally:
        for own, before in reversed(saved):
            for name, value in before.items():
                if value is _ABSENT:
                    own.pop(name, None)
                else:
                    own[name] = value


@contextmanager
def replacing(
    blocks: Sequence[nn.Module], change: Mapping[int, Callable[[torch.Tensor], torch.Tensor]]
) -> Iterator[None]:
    """Some blocks give another residual stream than they computed; what comes behind them goes on from it.

    Args:
        blocks: of the decoder.
        change: by index of the block, the new stream from the old one, which it must leave as it is.
    """
    handles = []
    try:
        for index, replace in change.items():
            handles.append(blocks[index].register_forward_hook(_replacer(replace)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """The model for one lens at a time: while its blocks are pass-throughs, it must not serve anybody.

    Raises:
        LensError: another thread is looking into it.
    """
    lock = _LOCKS.setdefault(model, threading.Lock())
    if not lock.acquire(blocking=False):
        raise LensError(f"another lens is looking into this {type(model).__name__}; wait until it is done.")
    try:
        yield
    finally:
        lock.release()


def _decoder(model: nn.Module) -> nn.Module | None:
    get: Any = getattr(model, "get_decoder", None)
    found = get() if callable(get) else None
    return found if isinstance(found, nn.Module) else None


def _observer(index: int, see: Callable[[int, Any, Any], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        see(index, next(given, None), output)

    return hook


def _replacer(replace: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if OutputKind.of(output).length is None:
            return replace(output)
        return (replace(output[0]), *output[1:])

    return hook


def _returning(output: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return output

    return forward
