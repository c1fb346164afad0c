"""`deltakeeper serve`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer

_GIB = 1 << 30


def serve(
    base: Annotated[str, typer.Option(help="Base model: a folder or a hub name.")],
    deltas: Annotated[Path, typer.Option(help="Folder whose subfolders are artifacts: each is a tenant by its name.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on. One that other machines reach needs keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name by which the base is asked; its folder's or the hub's by default.")
    ] = None,
    state: Annotated[
        str | None,
        typer.Option(
            envvar="DELTAKEEPER_STATE",
            help="Keys, quotas and tenants: a file, or a URL of PostgreSQL; DELTAS/.deltakeeper/state.db by default.",
        ),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="YAML file that says what a delta must show to be served.")
    ] = None,
    decisions: Annotated[
        Path | None,
        typer.Option(help="Where admission logs its decisions; DELTAS/.deltakeeper/decisions.jsonl by default."),
    ] = None,
    deltas_gib: Annotated[float, typer.Option(help="Memory of all deltas together, in GiB.")] = 4.0,
    kv_gib: Annotated[float, typer.Option(help="Memory of keys and values, in GiB.")] = 1.0,
    max_running: Annotated[int, typer.Option(help="Answers that are made side by side.")] = 64,
    max_answers: Annotated[int, typer.Option(help="Answers that one request may ask for: n, times its prompts.")] = 128,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens after which an answer ends; where the context does by default.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of the engine: cores that are really free, less one for loading.")
    ] = None,
    public_metrics: Annotated[
        bool, typer.Option("--public-metrics", help="Show /metrics, which names tenants, without a key.")
    ] = False,
    otlp_traces_endpoint: Annotated[
        str | None,
        typer.Option(help="Where traces are sent by OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces."),
    ] = None,
    generation_config: Annotated[
        str,
        typer.Option(
            help="Where sampling parameters that a request leaves out come from: auto, each model's "
            "generation_config.json; none, OpenAI's own defaults."
        ),
    ] = "auto",
    lame_duck_seconds: Annotated[
        float,
        typer.Option(
            help="After SIGTERM, how long requests are still taken while /ready says 503 already, so that a load "
            "balancer can notice."
        ),
    ] = 0.0,
    drain_seconds: Annotated[float, typer.Option(help="How long answers may go on once no more are taken.")] = 30.0,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Answer on the nodes of a Ray cluster: HOST:PORT or auto for one that runs, local to start one here. "
            "Memory, threads and answers side by side are then those of each replica.",
        ),
    ] = None,
    replicas: Annotated[
        str | None,
        typer.Option(metavar="N or MIN-MAX", help="With --ray: replicas, each with the base and some tenants; 1."),
    ] = None,
    replica_cpus: Annotated[
        float | None, typer.Option(help="With --ray: cores that a replica asks the cluster for; --threads, or 1.")
    ] = None,
    replicas_per_node: Annotated[int | None, typer.Option(help="With --ray: replicas on one node; 1.")] = None,
    target_ongoing: Annotated[
        float | None,
        typer.Option(
            help="With --ray: answers under way, by replica, above which there shall be more; half of --max-running."
        ),
    ] = None,
) -> None:
    """Serve a base and its fine-tunes over HTTP, as OpenAI's clients ask: the tenant is the `model`.

    Everybody on this machine may ask and manage until the first key is made with `deltakeeper keys create`. The first
    SIGTERM or Ctrl-C lets running answers finish, the second one does not.

    Example: deltakeeper serve --base ./base --deltas ./deltas
    """
    from deltakeeper.engine import EngineSettings
    from deltakeeper.errors import DataError

    try:
        from deltakeeper.service.assembly import Plan
        from deltakeeper.service.server import Server
    except ImportError as error:
        raise DataError(
            f"the service needs {error.name}, which is not installed; install deltakeeper[serve]."
        ) from error
    from deltakeeper.service.settings import ServiceSettings

    scaling = _scaling(ray, replicas, replica_cpus, replicas_per_node, target_ongoing, max_running, threads)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("deltakeeper.service").setLevel(logging.INFO)
    plan = Plan(
        deltas=deltas,
        state=state or deltas / ".deltakeeper" / "state.db",
        decisions=decisions or deltas / ".deltakeeper" / "decisions.jsonl",
        base_name=name or (Path(base).resolve().name if Path(base).exists() else base),
        host=host,
        policy=policy,
        delta_bytes=int(deltas_gib * _GIB),
        traces=otlp_traces_endpoint,
        public_metrics=public_metrics,
        engine=EngineSettings(kv_bytes=int(kv_gib * _GIB), max_running=max_running, threads=threads),
        settings=ServiceSettings(
            max_choices=max_answers,
            max_new_tokens=max_new_tokens,
            lame_duck_seconds=lame_duck_seconds,
            drain_seconds=drain_seconds,
            generation_config=cast(Any, generation_config),
        ),
    )
    with _opened(base, plan, ray, scaling) as service:

        def tell(address: str) -> None:
            tenants = len(service.services.store.names())
            typer.echo(f"Serving {plan.base_name} and {tenants} tenants on {address}", err=True)
            if service.open:
                typer.echo(
                    "No key was made yet, so everybody on this machine may ask and manage. Make one with: deltakeeper "
                    f"keys create --state {service.state} --name admin --admin",
                    err=True,
                )

        Server(service.app, service.services, host, port, tell).run()


def _scaling(
    ray: str | None,
    replicas: str | None,
    cpus: float | None,
    per_node: int | None,
    target: float | None,
    running: int,
    threads: int | None,
) -> Any:
    from deltakeeper.errors import DataError
    from deltakeeper.service.cluster.scaling import Scaling

    if ray is None:
        if any(option is not None for option in (replicas, cpus, per_node, target)):
            raise DataError("replicas are those of a cluster; say which one with --ray, or leave their options out.")
        return None
    least, _, most = (replicas or "1").partition("-")
    if not (least.isdigit() and (not most or most.isdigit())):
        raise DataError(f"'{replicas}' is no number of replicas; spell it 3, or 1-3 to let the load decide.")
    return Scaling(
        min_replicas=int(least),
        max_replicas=int(most or least),
        target_ongoing=max(1.0, running / 2) if target is None else target,
        max_ongoing=2 * running,
        per_node=1 if per_node is None else per_node,
        cpus=float(threads or 1) if cpus is None else cpus,
    )


@contextmanager
def _opened(base: str, plan: Any, ray: str | None, scaling: Any) -> Iterator[Any]:
    """The service on this machine, or over a cluster."""
    from deltakeeper.errors import DataError
    from deltakeeper.live_base import open_base
    from deltakeeper.service.assembly import assembled

    if ray is None:
        with assembled(open_base(base), plan) as service:
            yield service
        return
    from deltakeeper.service.cluster.assembly import clustered, open_distant_base

    try:
        from deltakeeper.service.cluster.ray_replicas import on_ray
    except ImportError as error:
        raise DataError(
            f"a service over a cluster needs {error.name}, which is not installed; install deltakeeper[ray]."
        ) from error
    start = partial(on_ray, ray, scaling, plan.settings.drain_seconds)
    with clustered(open_distant_base(base), plan, scaling, start) as service:
        yield service
