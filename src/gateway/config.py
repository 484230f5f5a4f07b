"""Settings of a gateway: command line over environment (AICONEXUS_GATEWAY_*) over defaults."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from aiconexus.protocol.limits import (
    AWAY_SECONDS,
    DRAIN_SECONDS,
    MESSAGE_BURST,
    MESSAGE_RATE,
    PING_INTERVAL_SECONDS,
    PONG_TIMEOUT_SECONDS,
    REGISTER_TIMEOUT_SECONDS,
)
from gateway.urls import parse_url

ENVIRONMENT = "AICONEXUS_GATEWAY_"  # and the name of a setting in capitals
MAX_WORKERS = 64


def _cores() -> int:
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS)


def _websocket_url(url: str) -> str:
    try:
        *_, path = parse_url(url)
    except ValueError:
        path = ""
    if not path:  # agents sign the path, too
        raise ValueError(f"{url!r} is not a WebSocket URL with a path, such as wss://gateway.example/ws")
    return url


def _redis_url(url: str) -> str:
    from gateway.redis_line import check_url

    check_url(url)
    return url


def _list(value: object) -> object:
    """Split what an environment variable holds."""
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


Seconds = Annotated[float, Field(gt=0, le=3600)]


class Settings(BaseSettings):
    """All settings with their defaults; times are in seconds."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT, extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    workers: int = Field(default_factory=_cores, ge=1, le=MAX_WORKERS)
    identity: Path | None = None
    public_url: Annotated[
        tuple[Annotated[str, AfterValidator(_websocket_url)], ...], NoDecode, BeforeValidator(_list)
    ] = ()
    register_timeout: Seconds = REGISTER_TIMEOUT_SECONDS
    ping_interval: Seconds = PING_INTERVAL_SECONDS
    pong_timeout: Seconds = PONG_TIMEOUT_SECONDS
    away: float = Field(default=AWAY_SECONDS, ge=0, le=3600)
    idle_timeout: float = Field(default=0.0, ge=0, le=30 * 86_400)
    drain_seconds: float = Field(default=DRAIN_SECONDS, ge=0, le=3600)
    max_connections: int = Field(default=100_000, ge=1, le=10_000_000)
    max_connections_per_address: int = Field(default=0, ge=0)
    message_rate: int = Field(default=MESSAGE_RATE, ge=0, le=1_000_000)
    message_burst: int = Field(default=MESSAGE_BURST, ge=1, le=1_000_000)
    redis: Annotated[str, AfterValidator(_redis_url)] | None = None
    redis_required: bool = False
    redis_prefix: str = Field(default="aiconexus", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    node_name: str = Field(default_factory=socket.gethostname, pattern=r"^[!-~]{1,64}$")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "console"
