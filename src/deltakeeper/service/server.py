"""uvicorn around the application, and an orderly end.

The first signal turns `/ready` off. After SIGTERM requests are still taken for a while, if that is set, so that what
routes them can notice; then new ones are refused while running answers finish, up to a deadline. What is left ends with
an error, connections are closed, and the process exits with status 0. A second signal does not wait.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from socket import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from deltakeeper.service.running import Services

_log = logging.getLogger("deltakeeper.service")
_IDLE_SECONDS = 75
"""How long a connection may wait for its next request: longer than proxies keep it, which would meet a closed one."""
_GOODBYE_SECONDS = 5
"""How long connections may take to hand over the last bytes once all answers have ended."""


class Server(uvicorn.Server):
    """Serves an application until it is told to stop.

    Args:
        app: what is served.
        services: what it is made of.
        host: address to listen on.
        port: 0 for any free one.
        tell: called with the address once requests are taken.
    """

    def __init__(
        self,
        app: FastAPI,
        services: Services,
        host: str,
        port: int,
        tell: Callable[[str], None] = lambda address: None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_level="warning",
                access_log=False,  # the doorway writes a line a request, with its id
                server_header=False,
                proxy_headers=False,  # nothing here depends on who a proxy says is asking
                ws="none",
                http="h11",
                loop="asyncio",  # whichever extras brought another along, this is what was measured
                timeout_graceful_shutdown=_GOODBYE_SECONDS,
                timeout_keep_alive=_IDLE_SECONDS,
            )
        )
        self._services, self._tell = services, tell
        self._hurry = threading.Event()

    @property
    def address(self) -> str:
        """Where it is asked, once it has started, such as `http://127.0.0.1:8000`."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Begin to listen, and say where."""
        await super().startup(sockets)
        if self.started:
            self._tell(self.address)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What a signal does: drain at first, stop at once the second time."""
        if self._services.drain.announced:
            self.should_exit = self.force_exit = True
            self._hurry.set()
        else:  # Ctrl-C is somebody at a terminal, and nobody routes requests there
            self.drain(self._services.settings.lame_duck_seconds if sig == signal.SIGTERM else 0.0)

    def drain(self, lame_duck_seconds: float = 0.0) -> None:
        """Take nothing new after so many seconds, and stop when running answers have ended or their time is over."""
        self._services.drain.announce()
        if not lame_duck_seconds:
            self._services.drain.begin()
        threading.Thread(target=self._finish, args=(lame_duck_seconds,), name="deltakeeper-drain", daemon=True).start()

    def _finish(self, lame_duck_seconds: float) -> None:
        self._hurry.wait(lame_duck_seconds)
        seconds = self._services.settings.drain_seconds
        if not self._services.drain.finish(self._services.engine, seconds):
            _log.warning("answers that were not complete after %.0f s were ended", seconds)
        self.should_exit = True
