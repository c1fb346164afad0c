"""Replicas on a Ray cluster: connected to, deployed through Ray Serve, and asked through its handles."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import AsyncGenerator, Awaitable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, ReplicaUnavailableError

from deltakeeper.errors import DataError, EngineError
from deltakeeper.loopback import is_loopback
from deltakeeper.service.cluster.failures import ReplicaLostError
from deltakeeper.service.cluster.messages import Asked, Failure, Loaded, Looked, Piece, Place, ReplicaPlan, Report
from deltakeeper.service.cluster.routing import ROUTER
from deltakeeper.service.cluster.scaling import Scaling
from deltakeeper.service.cluster.served_replica import ServedReplica

_log = logging.getLogger("deltakeeper.service")
_T = TypeVar("_T")
_REPORT_SECONDS = 5.0
_CONNECT_SECONDS = 5.0
_FOUND_SECONDS = 10.0
_REPLACED = ("localhost", "127.0.0.1", "::1")
"""Ray takes none of these for a node's address, and makes it one that others reach."""
_LOCAL = "127.0.0.2"
"""Of this machine alone too, and Ray leaves it as it is."""
_LOST = (RayError, DeploymentUnavailableError, ReplicaUnavailableError)
"""What Ray itself says in place of a replica: its process, node or memory went, or what it had said."""
_NOT_LOST = (RayTaskError, TaskCancelledError)
"""Of these the ones that a replica's own code raised, or that was wanted."""


@contextmanager
def on_ray(address: str, scaling: Scaling, drain_seconds: float, name: str, plan: ReplicaPlan) -> Iterator[RayReplicas]:
    """Join a cluster and run replicas there until the block ends; see `connected` and `deployed`."""
    with connected(address), deployed(name, plan, scaling, drain_seconds=drain_seconds) as replicas:
        yield replicas


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Join a Ray cluster until the block ends.

    Args:
        address: `HOST:PORT` or `auto` for one that runs, this machine being one of its nodes; `local` starts one here.

    Raises:
        DataError: there is no such cluster, or it is of another version.
    """
    if address.startswith("ray://"):
        raise DataError(
            f"{address} is reached through Ray Client, which streams nothing; start this on a node, with auto."
        )
    try:
        options = _options(address)
        ray.init(
            address=address, namespace="deltakeeper", log_to_driver=False, logging_level=logging.WARNING, **options
        )
    except (OSError, ValueError, RuntimeError, RayError) as error:
        if "AuthenticationError" in str(error):
            raise DataError(f"the Ray cluster at '{address}' asks for its token; give it in RAY_AUTH_TOKEN.") from error
        raise DataError(f"there is no Ray cluster at '{address}' that can be joined: {_first_line(error)}.") from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if os.environ.get("RAY_AUTH_MODE") != "token":
        _log.warning(
            "the Ray cluster at %s asks nobody for a token, so whoever reaches its ports runs what they like on its "
            "nodes; start it with RAY_AUTH_MODE=token.",
            address,
        )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def deployed(name: str, plan: ReplicaPlan, scaling: Scaling, *, drain_seconds: float) -> Iterator[RayReplicas]:
    """Run replicas until the block ends.

    Args:
        name: of the application in Ray Serve; one that runs is taken over if it is made in the same way, else replaced.
        plan: what each replica is made of.
        scaling: how many there are.
        drain_seconds: how long one that is no longer needed may finish its answers.

    Raises:
        EngineError: none could be started.
    """
    number: dict[str, Any] = {"num_replicas": scaling.min_replicas}
    if scaling.max_replicas > scaling.min_replicas:
        number = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=scaling.min_replicas,
                max_replicas=scaling.max_replicas,
                target_ongoing_requests=scaling.target_ongoing,
            )
        }
    deployment = serve.deployment(
        ServedReplica,
        name="replica",
        max_ongoing_requests=scaling.max_ongoing,
        max_queued_requests=-1,  # the ingress admits
        max_replicas_per_node=scaling.per_node,
        ray_actor_options={"num_cpus": scaling.cpus},
        graceful_shutdown_timeout_s=drain_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2.0,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        **number,
    )
    serve.start(proxy_location="Disabled")
    _warn_of_room(scaling)
    try:
        handle = _left_behind(name, (plan, scaling))
        try:
            handle = handle or serve.run(deployment.bind((plan, scaling)), name=name, route_prefix=None)
        except RuntimeError as error:
            raise EngineError(f"no replica could be started: {_why(name) or _first_line(error)}") from error
        try:
            yield RayReplicas(handle)
        finally:
            handle.shutdown()  # or its thread would call Ray once more, which would begin a cluster of its own
    finally:
        with suppress(RayError, RuntimeError):
            serve.delete(name)


def _options(address: str) -> dict[str, Any]:
    """What joining a cluster takes beside its address; raises OSError where nobody listens there."""
    if address == "local":
        return {"include_dashboard": False} | ({"_node_ip_address": _LOCAL} if sys.platform == "linux" else {})
    host, colon, port = address.rpartition(":")
    if not colon:
        return {}
    socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()  # Ray itself would try for minutes
    lone = is_loopback(host) and host not in _REPLACED
    return {"_node_ip_address": host} if lone else {}


class RayReplicas:
    """Implements `calls.Replicas` with a handle of Ray Serve."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def answer(self, asked: Asked) -> AsyncGenerator[Piece, None]:
        """See `Replicas.answer`."""
        name = "" if asked.place is None else asked.place.name
        response = self._handle.options(stream=True, multiplexed_model_id=name).answer.remote(asked)
        whole = False
        try:
            with _losses():
                async for piece in response:
                    whole = piece.ended is not None
                    yield piece
        finally:
            if not whole:
                response.cancel()

    async def load(self, place: Place) -> Loaded | Failure:
        """See `Replicas.load`."""
        handle = self._handle.options(multiplexed_model_id=place.name)
        found: Loaded | Failure = await _unless_lost(handle.load.remote(place))
        return found

    async def decide(self, name: str, folder: Path) -> Looked | Failure:
        """See `Replicas.decide`."""
        found: Looked | Failure = await _unless_lost(
            self._handle.options(multiplexed_model_id=name).decide.remote(name, folder)
        )
        return found

    async def unload(self, name: str) -> None:
        """See `Replicas.unload`."""
        await self._everywhere("unload", name)

    async def remove(self, name: str) -> None:
        """See `Replicas.remove`."""
        await self._everywhere("remove", name)

    async def reports(self) -> list[Report] | None:
        """See `Replicas.reports`."""
        return await self._everywhere("report")

    async def _everywhere(self, method: str, *arguments: Any) -> list[Any] | None:
        """What each replica says; those that were lost meanwhile are left out."""
        try:
            response = self._handle.broadcast(method, *arguments)
            found = await response.results_async(timeout_s=_REPORT_SECONDS, return_exceptions=True)
        except DeploymentUnavailableError:
            return []
        except TimeoutError:
            _log.warning("not all replicas answered '%s' within %.0f s", method, _REPORT_SECONDS)
            return None
        for one in found:
            if isinstance(one, BaseException) and (isinstance(one, _NOT_LOST) or not isinstance(one, _LOST)):
                _log.warning("a replica could not do '%s': %s", method, _first_line(one))
        return [one for one in found if not isinstance(one, BaseException)]


async def _unless_lost(response: Awaitable[_T]) -> _T:
    with _losses():
        return await response


@contextmanager
def _losses() -> Iterator[None]:
    """Raise `ReplicaLostError` where Ray says that a replica was lost."""
    try:
        yield
    except _NOT_LOST:
        raise
    except _LOST as error:
        raise ReplicaLostError(f"a replica was lost: {_first_line(error)}") from error


def _warn_of_room(scaling: Scaling) -> None:
    """Say what Ray does not: a replica that no node has the cores for waits for one, silently."""
    cores = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    room = sum(min(scaling.per_node, int(count // scaling.cpus)) for count in cores)
    if room < scaling.min_replicas:
        _log.warning(
            "the cluster has room for %d of %d replicas of %g cores each; the others wait until nodes join it.",
            room,
            scaling.min_replicas,
            scaling.cpus,
        )


def _left_behind(name: str, made: tuple[ReplicaPlan, Scaling]) -> Any:
    """The handle of replicas that an ingress which was killed left running, if they are made in the same way."""
    try:
        handle = serve.get_app_handle(name)
        return handle if handle.made.remote().result(timeout_s=_FOUND_SECONDS) == made else None
    except (RayServeException, RayError, TimeoutError):
        return None


def _why(name: str) -> str:
    """The error that replicas of an application end with as they start: the last line of what Ray Serve says."""
    application = serve.status().applications.get(name)
    if application is None:
        return ""
    text = "\n".join(deployment.message for deployment in application.deployments.values())
    found = re.findall(r"^(?:\w+\.)*\w+Error: (.+)$", text, flags=re.M)
    return str(found[-1]) if found else ""


def _first_line(error: BaseException) -> str:
    cause = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    return (str(cause).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
