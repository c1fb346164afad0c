"""What several wait for, and none of them may cancel for the others."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TypeVar

from deltakeeper.errors import TenantError

_T = TypeVar("_T")


def share(work: Future[_T]) -> Future[_T]:
    """A future of the same outcome that cannot be cancelled, so that `asyncio.wrap_future` passes no cancellation on.

    The future raises TenantError where the work itself was cancelled: to whoever waits, their own cancellation would
    look the same.
    """
    found: Future[_T] = Future()
    found.set_running_or_notify_cancel()

    def end(done: Future[_T]) -> None:
        if done.cancelled():
            found.set_exception(TenantError("The load was given up before it ended; ask again later."))
        elif (error := done.exception()) is not None:
            found.set_exception(error)
        else:
            found.set_result(done.result())

    work.add_done_callback(end)
    return found
