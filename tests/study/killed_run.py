"""What processes of the tests do: a small study, alone in its process; or nothing, and die."""

from __future__ import annotations

import io
from pathlib import Path


def work(text: str, folder: str) -> None:
    """Run the study of a JSON text into a folder."""
    import torch
    from rich.console import Console

    from deltakeeper.study.file import StudyFile
    from deltakeeper.study.progress import Progress
    from deltakeeper.study.run import run_study

    torch.set_num_threads(1)
    with Progress(Console(file=io.StringIO())) as progress:
        outcome = run_study(StudyFile.from_text(text), Path(folder), progress, command="test")
    assert outcome.complete, outcome


def die(task: object, messages: object) -> None:
    """A worker that the kernel ends."""
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def start_worker(path: str) -> None:
    """A study with one worker, both of which would wait for a minute; the worker's number goes to a file."""
    import multiprocessing
    import time

    worker = multiprocessing.get_context("fork").Process(target=wait_long)
    worker.start()
    Path(path).write_text(str(worker.pid))
    time.sleep(60)


def wait_long() -> None:
    """A worker at work."""
    import threading
    import time

    from deltakeeper.study.crew import end_with_parent

    threading.Thread(target=end_with_parent, daemon=True).start()
    time.sleep(60)
