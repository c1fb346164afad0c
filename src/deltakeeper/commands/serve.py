"""`deltakeeper serve`."""

from __future__ import annotations

import logging
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
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of the engine: cores that are really free, less one for loading.")
    ] = None,
    public_metrics: Annotated[
        bool, typer.Option("--public-metrics", help="Show /metrics, which names tenants, without an admin key.")
    ] = False,
    generation_config: Annotated[
        str,
        typer.Option(
            help="Where sampling parameters that a request leaves out come from: auto, each model's "
            "generation_config.json; none, OpenAI's own defaults."
        ),
    ] = "auto",
    drain_seconds: Annotated[float, typer.Option(help="How long answers may go on after a signal to stop.")] = 30.0,
) -> None:
    """Serve a base and its fine-tunes over HTTP, as OpenAI's clients ask: the tenant is the `model`.

    Everybody on this machine may ask and manage until the first key is made with `deltakeeper keys create`. The first
    SIGTERM or Ctrl-C lets running answers finish, the second one does not.

    Example: deltakeeper serve --base ./base --deltas ./deltas
    """
    from deltakeeper.engine import EngineSettings
    from deltakeeper.errors import DataError
    from deltakeeper.live_base import open_base

    try:
        from deltakeeper.service.assembly import Plan, assembled
        from deltakeeper.service.server import Server
    except ImportError as error:
        raise DataError(
            f"the service needs {error.name}, which is not installed; install deltakeeper[serve]."
        ) from error
    from deltakeeper.service.settings import ServiceSettings

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
        public_metrics=public_metrics,
        engine=EngineSettings(kv_bytes=int(kv_gib * _GIB), max_running=max_running, threads=threads),
        settings=ServiceSettings(drain_seconds=drain_seconds, generation_config=cast(Any, generation_config)),
    )
    with assembled(open_base(base), plan) as service:

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
