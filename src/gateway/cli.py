"""The options of the command `aiconexus-gateway`, and what it says; gateway.server starts it."""

from __future__ import annotations

import os
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, NoReturn

import structlog
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from aiconexus import __version__
from aiconexus.protocol import DIDKey
from aiconexus.protocol.errors import KeyFileError
from aiconexus.protocol.limits import ENDPOINT_PATH
from gateway.config import ENVIRONMENT, Settings
from gateway.descriptors import connections_per_worker
from gateway.redis_line import LineLostError
from gateway.redis_url import without_password
from gateway.rights import RedisRefusalError, try_redis

_NODES, _ICE, _PROTOCOL, _LIMITS, _LOGS = "Nodes", "Connections between agents", "Protocol", "Limits", "Logs"

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


def _fail(text: str) -> NoReturn:
    Console(stderr=True, highlight=False, emoji=False).print(
        f"[bold red]aiconexus-gateway:[/] {escape(text)}", soft_wrap=True
    )
    raise SystemExit(1)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"aiconexus-gateway {__version__}")
        raise typer.Exit


def _tell_start(settings: Settings, key: DIDKey, port: int) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    here, health = f"ws://{host}:{port}{ENDPOINT_PATH}", f"http://{host}:{port}/health"
    redis = without_password(settings.redis) if settings.redis else None
    fit = min(settings.workers * connections_per_worker(), settings.max_connections)
    if settings.log_format == "json":
        from gateway.log import print_line

        print_line(
            "started",
            version=__version__,
            agents_dial=settings.public_url or (here,),
            listening=here,
            health=health,
            did=key.did,
            **({"redis": redis, "node_name": settings.node_name} if redis else {}),
            connections_max=fit,
            workers=settings.workers,
            pid=os.getpid(),
        )
        return
    rows = [
        ("listening", here),
        ("health", health),
        (
            "identity",
            key.did + ("" if settings.identity else "  (new at every start; keep one with --identity)"),
        ),
        ("workers", f"{settings.workers}   (pid {os.getpid()})"),
    ]
    if settings.public_url:
        rows.insert(0, ("agents dial", ", ".join(settings.public_url)))
    if redis:
        rows.insert(-1, ("redis", f"{redis}   (this node is {settings.node_name})"))
    if fit < settings.max_connections:
        rows.insert(
            -1,
            (
                "descriptors",
                f"{fit:,} of {settings.max_connections:,} connections fit; raise `ulimit -n` or --workers",
            ),
        )
    console = Console(highlight=False, soft_wrap=True, emoji=False)  # `:key:` of a DID is none
    if not console.is_terminal:
        print(f"AIConexus gateway {__version__}", *(f"{name}: {value}" for name, value in rows), sep="\n  ")  # noqa: T201
        sys.stdout.flush()
        return
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(f"[dim]{name}[/]", escape(value))
    console.print(Panel(table, title=f"[bold]AIConexus gateway {__version__}[/]", expand=False))


@app.command(
    help="Run the AIConexus gateway: agents register here, find each other and exchange offers.",
    epilog="Every option can be set in the environment, too: `AICONEXUS_GATEWAY_PORT=8000`, "
    "`AICONEXUS_GATEWAY_PUBLIC_URL=wss://a.example/ws,wss://b.example/ws`. The command line wins.",
)
def serve(
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; 0.0.0.0 for all. [default: 127.0.0.1]")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 0 takes a free one. [default: 8000]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes. [default: the number of cores]")
    ] = None,
    identity: Annotated[
        Path | None,
        typer.Option(
            help="PEM file with the gateway's key, made if there is none. [default: a new key at every start]"
        ),
    ] = None,
    public_url: Annotated[
        list[str] | None,
        typer.Option(
            help="URL that agents dial, such as wss://gateway.example/ws; may be given several times. Agents "
            "must sign one of them. [default: whatever their Host header says]"
        ),
    ] = None,
    redis: Annotated[
        str | None,
        typer.Option(
            help="URL of the Redis that the nodes share: redis://, rediss://, unix:// or "
            "sentinel://host:26379/service. [default: none, this node is alone]",
            rich_help_panel=_NODES,
        ),
    ] = None,
    redis_required: Annotated[
        bool | None,
        typer.Option(
            "--redis-required",
            help="Do not start without a Redis that lets it work, and not be ready (GET /ready) while it is "
            "lost. [default: go on alone]",
            rich_help_panel=_NODES,
        ),
    ] = None,
    redis_prefix: Annotated[
        str | None,
        typer.Option(
            help="What this network's keys in Redis begin with. [default: aiconexus]", rich_help_panel=_NODES
        ),
    ] = None,
    node_name: Annotated[
        str | None,
        typer.Option(
            help="Name of this node in the logs of the others. [default: the host's]", rich_help_panel=_NODES
        ),
    ] = None,
    stun_url: Annotated[
        list[str] | None,
        typer.Option(
            help="STUN server that agents are told, such as stun:stun.example:3478; may be given several "
            "times. [default: none]",
            rich_help_panel=_ICE,
        ),
    ] = None,
    turn_url: Annotated[
        list[str] | None,
        typer.Option(
            help="TURN server that agents are told, such as turn:turn.example:3478?transport=udp or "
            "turns:turn.example:5349; may be given several times. [default: none]",
            rich_help_panel=_ICE,
        ),
    ] = None,
    turn_secret: Annotated[
        str | None,
        typer.Option(
            help="Secret that the TURN servers share with this gateway (coturn: static-auth-secret). Others "
            "can read a command line: the environment or a file are better.",
            rich_help_panel=_ICE,
        ),
    ] = None,
    turn_secret_file: Annotated[
        Path | None,
        typer.Option(help="File that holds this secret and nothing else.", rich_help_panel=_ICE),
    ] = None,
    turn_ttl: Annotated[
        int | None,
        typer.Option(
            help="Seconds for which an agent can use the TURN credentials it is given; it gets new ones "
            "before. [default: 86400]",
            rich_help_panel=_ICE,
        ),
    ] = None,
    register_timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds that a new connection has to register. [default: 10]", rich_help_panel=_PROTOCOL
        ),
    ] = None,
    ping_interval: Annotated[
        float | None,
        typer.Option(
            help="Seconds of silence before a WebSocket ping. [default: 25]", rich_help_panel=_PROTOCOL
        ),
    ] = None,
    pong_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds to wait for the answer. [default: 10]", rich_help_panel=_PROTOCOL),
    ] = None,
    away: Annotated[
        float | None,
        typer.Option(
            help="Seconds that a dropped agent may take to resume. [default: 30]", rich_help_panel=_PROTOCOL
        ),
    ] = None,
    idle_timeout: Annotated[
        float | None,
        typer.Option(
            help="Close sessions that sent no message for so many seconds; 0 for never. [default: 0]",
            rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    drain_seconds: Annotated[
        float | None,
        typer.Option(
            help="Seconds in which agents are sent away when the gateway is stopped. [default: 10]",
            rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    max_connections: Annotated[
        int | None,
        typer.Option(
            help="Connections of all workers together; more get HTTP 503. [default: 100000]",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_connections_per_address: Annotated[
        int | None,
        typer.Option(
            help="Connections from one IP address (IPv6: one /64); more get HTTP 503. Leave it off behind a "
            "proxy. "
            "[default: 0, no limit]",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    message_rate: Annotated[
        int | None,
        typer.Option(
            help="Messages per second that one session may send; 0 for no limit. [default: 200]",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    message_burst: Annotated[
        int | None,
        typer.Option(help="How many of them at once. [default: 1000]", rich_help_panel=_LIMITS),
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning or error. [default: info]", rich_help_panel=_LOGS)
    ] = None,
    log_format: Annotated[
        str | None, typer.Option(help="console or json. [default: console]", rich_help_panel=_LOGS)
    ] = None,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Run the gateway until SIGTERM or SIGINT."""
    given: dict[str, Any] = {
        "host": host,
        "port": port,
        "workers": workers,
        "identity": identity,
        "public_url": tuple(public_url) if public_url else None,
        "redis": redis,
        "redis_required": redis_required,
        "redis_prefix": redis_prefix,
        "node_name": node_name,
        "stun_url": tuple(stun_url) if stun_url else None,
        "turn_url": tuple(turn_url) if turn_url else None,
        "turn_secret": turn_secret,
        "turn_secret_file": turn_secret_file,
        "turn_ttl": turn_ttl,
        "register_timeout": register_timeout,
        "ping_interval": ping_interval,
        "pong_timeout": pong_timeout,
        "away": away,
        "idle_timeout": idle_timeout,
        "drain_seconds": drain_seconds,
        "max_connections": max_connections,
        "max_connections_per_address": max_connections_per_address,
        "message_rate": message_rate,
        "message_burst": message_burst,
        "log_level": log_level,
        "log_format": log_format,
    }
    unknown = sorted(
        name
        for name in os.environ
        if name.startswith(ENVIRONMENT)
        and name.removeprefix(ENVIRONMENT).lower() not in Settings.model_fields
    )
    if unknown:
        _fail(f"{unknown[0]}: there is no such setting; the options of --help have their names")
    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # What concerns several options names them itself.
        name = "--" + str(first["loc"][0]).replace("_", "-") + ": " if first["loc"] else ""
        _fail(name + first["msg"].removeprefix("Value error, "))

    try:
        from gateway import descriptors, log, supervisor
    except ImportError as error:
        _fail(
            f"the compiled part of the gateway is missing ({error.name or error}): install a C compiler and "
            "install aiconexus from source again, with AICONEXUS_EXTENSIONS=required to see what fails."
        )

    log.configure(settings.log_level, settings.log_format)
    descriptors.raise_limit()
    try:
        key = DIDKey.load_or_create(settings.identity) if settings.identity else DIDKey.generate()
    except KeyFileError as error:
        _fail(str(error))
    if settings.redis and settings.redis_required:
        try:
            try_redis(settings.redis, settings.redis_prefix)
        except RedisRefusalError as error:
            _fail(f"cannot work with Redis at {without_password(settings.redis)}: {error}")
        except LineLostError as error:
            _fail(f"cannot reach Redis at {without_password(settings.redis)}: {error}")
    try:
        address = supervisor.reserve(settings.host, settings.port)
    except OSError as error:
        _fail(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}")
    if not settings.public_url and not ip_address(address.getsockname()[0]).is_loopback:
        structlog.get_logger("gateway").warning(
            "no public URL",
            hint="the audience that agents sign is only compared with their Host header, which a relay in "
            "between can choose; name the address that they dial with --public-url",
        )
    port_bound = address.getsockname()[1]
    running = supervisor.Supervisor(settings, key, address, lambda: _tell_start(settings, key, port_bound))
    raise SystemExit(running.run())
