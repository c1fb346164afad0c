"""Chat templates: programs that a tenant brings along, so those of tenants run where they harm nobody.

The sandbox of transformers keeps a template from the files and the objects of the process, but not from its processor
and its memory: `{{ 'a' * 10**9 }}` and nested loops pass it. A template that is not the base's is therefore rendered in
a small process, which the system ends when it has used up its seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import selectors
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, LifoQueue
from typing import Any

from deltakeeper.errors import DataError

Turns = Sequence[dict[str, str]]

_log = logging.getLogger("deltakeeper.service")
_WORKER = Path(__file__).with_name("template_worker.py")
_WORKERS = 2
_CPU_SECONDS = 1
"""Of one text, rounded up to what the system counts in; usual templates take a millisecond."""
_WALL_SECONDS = 60.0
"""Of one text or a worker's start, on a machine that has no time for it."""
_MEMORY = 256 << 20
_MOST_ADDED = 1 << 20
"""Characters of a text beyond twice its messages."""
_PAUSE_SECONDS = 60.0
"""How long a template that took too long, or too much memory, is refused without being tried."""
_MOST_PAUSED = 1024
_RESTART_SECONDS = 5.0
"""When to ask again where no process could be started."""
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONUSERBASE")
"""What a worker is told of ours: enough to find its libraries, and no secrets."""


class TemplateError(DataError):
    """A chat template does not take these messages, or writes too much."""


class TemplateEndedError(TemplateError):
    """A chat template was ended before it gave a text, for its time or its memory, or none can be rendered now.

    Attributes:
        retry_after: seconds after which it is tried again.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Templates:
    """Renders chats; safe on any thread.

    Args:
        base: the base's tokenizer, whose template is the operator's and is rendered here.

    Attributes:
        threads: where to call `render` for templates of strangers, so that those who wait take no other threads.
    """

    def __init__(self, base: Any) -> None:
        self.threads = ThreadPoolExecutor(_WORKERS, "deltakeeper-template")
        self._trusted = _template_of(base)
        self._idle: LifoQueue[_Worker | None] = LifoQueue()  # one that runs is taken before one is started
        for _ in range(_WORKERS):
            self._idle.put(None)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._paused: dict[str, tuple[float, str]] = {}
        self._end = weakref.finalize(self, _end_all, self._running)

    def trusts(self, tokenizer: Any) -> bool:
        """Whether a tokenizer's template is the base's."""
        return _template_of(tokenizer) == self._trusted

    def render(self, tokenizer: Any, turns: Turns) -> str:
        """The text of a chat, ready for an answer; it waits for that.

        Raises:
            TemplateError: the template fails, or takes more than its share of text.
            TemplateEndedError: it takes more than its share of time or memory, or cannot be rendered now.
        """
        if self.trusts(tokenizer):
            try:
                return str(tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False))
            except Exception as error:  # a template is a program, and may fail in any way
                raise TemplateError((str(error).strip().splitlines() or [type(error).__name__])[0]) from error
        template = _template_of(tokenizer)
        if template is None:
            raise TemplateError("there is no default among its templates")
        key = hashlib.sha256(template.encode("utf-8", "replace")).hexdigest()
        until, why = self._paused.get(key, (0.0, ""))
        if (left := until - time.monotonic()) > 0:
            raise TemplateEndedError(f"it took too {why} a moment ago", left)
        chat = {"conversations": [list(turns)], "chat_template": template, "add_generation_prompt": True}
        asked = {"with": tokenizer.special_tokens_map | chat, "most": _MOST_ADDED + 2 * _length(turns)}
        try:
            return self._ask(json.dumps(asked, default=str).encode())
        except (TimeoutError, MemoryError) as error:
            why = "long" if isinstance(error, TimeoutError) else "much memory"
            while len(self._paused) >= _MOST_PAUSED:
                self._paused.pop(next(iter(self._paused)), None)
            self._paused[key] = (time.monotonic() + _PAUSE_SECONDS, why)
            raise TemplateEndedError(f"it takes too {why}", _PAUSE_SECONDS) from error

    def start(self) -> None:
        """See to it that a process runs, so that the first chat does not wait a second or two for it.

        Where all are busy there is nothing to do, and nobody waits for them.
        """
        with suppress(TemplateError, Empty), self._worker(wait=False) as worker:
            worker.start()

    def close(self) -> None:
        """End all processes; what is being rendered ends with an error."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        self._end()

    def _ask(self, request: bytes) -> str:
        with self._worker() as worker:
            answer = worker.ask(request)
        if "error" in answer:
            raise TemplateError(answer["error"])
        return str(answer["text"])

    @contextmanager
    def _worker(self, *, wait: bool = True) -> Iterator[_Worker]:
        """One that nobody else has meanwhile; raises Empty if there is none and `wait` is false."""
        worker = self._idle.get(block=wait)
        try:
            worker = worker or _Worker(self._running)
            yield worker
        finally:
            self._idle.put(worker if worker is not None and worker.alive else None)


class _Worker:
    """One process; it is started with the first request and ends with the first that goes past its limits.

    Raises:
        TemplateEndedError: none can be started now.
    """

    def __init__(self, running: set[subprocess.Popen[bytes]]) -> None:
        self._running = running
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER), str(_CPU_SECONDS), str(_MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | {"HF_HUB_OFFLINE": "1"},
            )
        except OSError as error:  # no more processes, files or memory
            _log.error("no chat template of a tenant can be rendered: no process can be started (%s)", error)
            raise TemplateEndedError("it cannot be rendered now", _RESTART_SECONDS) from error
        running.add(self._process)
        self._started = False

    @property
    def alive(self) -> bool:
        """Whether it takes another request."""
        return self._process in self._running

    def start(self) -> None:
        """Wait until it takes requests; raises TemplateEndedError if it does not."""
        if self._started:
            return
        try:
            self._read()
        except BaseException as error:
            self._stop()
            if not isinstance(error, TimeoutError):
                raise
            _log.error("no chat template of a tenant can be rendered: %s does not run %s", sys.executable, _WORKER)
            raise TemplateEndedError("it cannot be rendered now", _RESTART_SECONDS) from error
        self._started = True

    def ask(self, request: bytes) -> dict[str, Any]:
        """Its answer; raises TimeoutError or MemoryError where it was ended for what it took."""
        self.start()
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(request + b"\n")
            self._process.stdin.flush()
            answer = self._read()
        except BaseException as error:
            self._stop()
            if isinstance(error, OSError):  # with it, the pipe to a process that ended
                raise TimeoutError from error
            raise
        if answer.get("full"):  # said by the worker alone: what a template says is only ever a text
            self._stop()
            raise MemoryError
        return answer

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        end, found = time.monotonic() + _WALL_SECONDS, bytearray()
        with selectors.PollSelector() as pipe:  # takes descriptors of any number, beside a thousand open streams
            pipe.register(self._process.stdout, selectors.EVENT_READ)
            while not found.endswith(b"\n"):
                ready = pipe.select(max(0.0, end - time.monotonic()))
                piece = os.read(self._process.stdout.fileno(), 1 << 20) if ready else b""
                if not piece:
                    raise TimeoutError
                found += piece
        answer: dict[str, Any] = json.loads(found)
        return answer

    def _stop(self) -> None:
        _end_all({self._process})
        self._running.discard(self._process)


def _end_all(processes: set[subprocess.Popen[bytes]]) -> None:
    for process in list(processes):
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # what was not handed over any more
                if pipe is not None:
                    pipe.close()
    processes.clear()


def _template_of(tokenizer: Any) -> str | None:
    try:
        found = tokenizer.get_chat_template()
    except (ValueError, AttributeError):  # there is none, or several and no default
        return None
    return found if isinstance(found, str) else None


def _length(turns: Turns) -> int:
    return sum(len(text) for turn in turns for text in turn.values())
