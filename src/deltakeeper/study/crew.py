"""Fine-tunes of a study side by side: one process each, or one Ray task each, with the same function inside.

A process that dies (the kernel ends it when memory runs out) takes its own fine-tune with it and no other.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from deltakeeper.errors import RunError
from deltakeeper.quiet_loading import quiet_imports
from deltakeeper.study.file import StudyFile
from deltakeeper.study.lens_stage import looked
from deltakeeper.study.pipeline import Study, open_study, run_tracks
from deltakeeper.study.plan import Track, plan_study
from deltakeeper.study.progress import Progress, RelayedProgress, show
from deltakeeper.study.store import RunStore

POLL_SECONDS = 0.2
Send = Callable[[str, "str | float"], None]


@dataclass(frozen=True)
class Task:
    """One fine-tune to be worked on, as plain values that travel between processes."""

    study: str
    out: str
    folder: str
    base: str
    unaligned: str | None
    only: str | None
    number: int
    discard: bool
    threads: int


def run_task(task: Task, send: Send) -> bool:
    """Work on one fine-tune; whether all its arms are measured. The function of a process and of a Ray task alike."""
    import torch

    quiet_imports()  # a worker is a process of its own, which the command line did not start
    torch.set_num_threads(task.threads)
    plan = plan_study(StudyFile.from_text(task.study)).only(task.only)
    unaligned = None if task.unaligned is None else Path(task.unaligned)
    study = open_study(plan, RunStore(task.out), Path(task.folder), task.base, unaligned, task.discard)
    return run_tracks(study, [plan.tracks[task.number]], RelayedProgress(send))


def run_crew(
    study: StudyFile, opened: Study, progress: Progress, *, workers: int, ray: bool = False, only: str | None = None
) -> None:
    """Work on all fine-tunes of a study, `workers` at once.

    Raises:
        RunError: Ray is wanted and not installed.
    """
    bases = opened.bases
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)) // max(1, workers))
    tasks = {
        number: Task(
            study=study.to_text(),
            out=str(opened.store.path.resolve()),
            folder=str(bases.folder.resolve()),
            base=bases.name,
            unaligned=None if bases.unaligned is None else str(bases.unaligned.resolve()),
            only=only,
            number=number,
            discard=opened.discard,
            threads=threads,
        )
        for number, track in enumerate(opened.plan.tracks)
        if opened.todo(track) or not looked(opened, track)
    }
    for number, track in enumerate(opened.plan.tracks):
        if number not in tasks:
            progress.trained(track.title)
            progress.skip(track.title, len(track.variants))

    def died(number: int, reason: str) -> None:
        _record_death(opened, opened.plan.tracks[number], reason, progress)

    if ray:
        _as_ray_tasks(tasks, workers, progress, died)
    else:
        _as_processes(tasks, workers, progress, died)


def _as_processes(tasks: dict[int, Task], workers: int, progress: Progress, died: Callable[[int, str], None]) -> None:
    context = multiprocessing.get_context("spawn")
    messages: Any = context.SimpleQueue()
    waiting = list(tasks.items())
    running: dict[int, Any] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                number, task = waiting.pop(0)
                process = context.Process(target=_process, args=(task, messages), daemon=True)
                process.start()
                running[number] = process
            next(iter(running.values())).join(POLL_SECONDS)
            while not messages.empty():
                show(progress, *messages.get())
            for number, process in list(running.items()):
                if process.is_alive():
                    continue
                process.join()
                del running[number]
                if process.exitcode != 0:
                    died(number, _reason(process.exitcode))
        while not messages.empty():
            show(progress, *messages.get())
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def _process(task: Task, messages: Any) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    run_task(task, lambda method, value: messages.put((method, value)))


def end_with_parent() -> None:
    """A worker whose study was killed ends at once: the next run must not meet it in the folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _as_ray_tasks(tasks: dict[int, Task], workers: int, progress: Progress, died: Callable[[int, str], None]) -> None:
    try:
        import ray
    except ImportError as error:
        raise RunError("Ray is not installed; run `pip install 'deltakeeper[ray]'` or leave out --ray.") from error
    started = not ray.is_initialized()
    if started:
        # An address from the environment (RAY_ADDRESS) is a cluster that is there already; else one is started here.
        options: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers}
        ray.init(log_to_driver=False, include_dashboard=False, **options)
    try:
        work = ray.remote(max_retries=0)(_ray_task)
        pending = {work.remote(task): number for number, task in tasks.items()}
        while pending:
            (done, *_), _ = ray.wait(list(pending))
            number = pending.pop(done)
            try:
                for method, value in ray.get(done):
                    show(progress, method, value)
            except ray.exceptions.RayError as error:
                died(number, f"its Ray task ended with {type(error).__name__}: {str(error).strip().splitlines()[-1]}")
    finally:
        if started:
            ray.shutdown()


def _ray_task(task: Task) -> list[tuple[str, str | float]]:
    """What a worker would have shown, once it is done."""
    said: list[tuple[str, str | float]] = []
    run_task(task, lambda method, value: said.append((method, value)))
    return said


def _record_death(study: Study, track: Track, reason: str, progress: Progress) -> None:
    for variant in study.todo(track):
        key = study.keys.cell(track.finetune, variant)
        study.store.note_failure(key, f"{track.title}: {variant.name}", reason)
    progress.say(f"{track.title}: {reason}")


def _reason(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        hint = ", as the kernel does when memory runs out; run fewer workers" if exitcode == -9 else ""
        return f"its process was ended by signal {-exitcode}{hint}."
    return f"its process ended with status {exitcode}; run it alone with --only to see why."
