"""Settings of a gateway: command line over environment (AICONEXUS_GATEWAY_*) over defaults."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from typing_extensions import Self

from aiconexus.protocol.ice import parse_ice_url
from aiconexus.protocol.limits import (
    AWAY_SECONDS,
    DRAIN_SECONDS,
    MESSAGE_BURST,
    MESSAGE_RATE,
    PING_INTERVAL_SECONDS,
    PONG_TIMEOUT_SECONDS,
    REGISTER_TIMEOUT_SECONDS,
    TURN_TTL_SECONDS,
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


def _stun_url(url: str) -> str:
    if parse_ice_url(url).is_turn:
        raise ValueError(f"{url!r} is the URL of a TURN server: give it with --turn-url")
    return url


def _turn_url(url: str) -> str:
    if not parse_ice_url(url).is_turn:
        raise ValueError(f"{url!r} is the URL of a STUN server: give it with --stun-url")
    return url


def _redis_url(url: str) -> str:
    from gateway.redis_url import check_url

    check_url(url)
    return url


def _redis_prefix(prefix: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", prefix):
        raise ValueError(f"a prefix is 1 to 64 letters of A to Z, digits, and _ . -, which {prefix!r} is not")
    return prefix


def _node_name(name: str) -> str:
    if not re.fullmatch(r"[!-~]{1,64}", name):
        raise ValueError(f"a name is 1 to 64 characters of ASCII and no spaces, which {name!r} is not")
    return name


def _list(value: object) -> object:
    """Split what an environment variable holds."""
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


Seconds = Annotated[float, Field(gt=0, le=3600)]


class Settings(BaseSettings):
    """All settings with their defaults; times are in seconds."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    workers: int = Field(default_factory=_cores, ge=1, le=MAX_WORKERS)
    identity: Path | None = None
    public_url: Annotated[
        tuple[Annotated[str, AfterValidator(_websocket_url)], ...], NoDecode, BeforeValidator(_list)
    ] = ()
    stun_url: Annotated[
        tuple[Annotated[str, AfterValidator(_stun_url)], ...], NoDecode, BeforeValidator(_list)
    ] = ()
    turn_url: Annotated[
        tuple[Annotated[str, AfterValidator(_turn_url)], ...], NoDecode, BeforeValidator(_list)
    ] = ()
    turn_secret: SecretStr | None = None
    turn_secret_file: Path | None = None
    turn_ttl: int = Field(default=TURN_TTL_SECONDS, ge=1, le=30 * 86_400)
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
    redis_prefix: Annotated[str, AfterValidator(_redis_prefix)] = "aiconexus"
    node_name: Annotated[str, AfterValidator(_node_name)] = Field(default_factory=socket.gethostname)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "console"

    @model_validator(mode="before")
    @classmethod
    def _read_turn_secret(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Read the secret while the gateway starts: its workers, also those started later, have the same."""
        path = values.get("turn_secret_file")
        if not path:
            return values
        if values.get("turn_secret"):
            raise ValueError("give --turn-secret or --turn-secret-file, not both")
        try:
            secret = Path(path).read_text().strip()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ValueError(f"--turn-secret-file {path}: {reason}") from None
        return {**values, "turn_secret": secret}

    @model_validator(mode="after")
    def _check_redis(self) -> Self:
        if self.redis_required and not self.redis:
            raise ValueError(f"--redis-required needs --redis, or {ENVIRONMENT}REDIS in the environment")
        return self

    @model_validator(mode="after")
    def _check_turn(self) -> Self:
        has_secret = self.turn_secret is not None and bool(self.turn_secret.get_secret_value())
        if self.turn_secret is not None and not has_secret:
            raise ValueError("the secret of the TURN servers is empty")
        if self.turn_url and not has_secret:
            raise ValueError(
                "--turn-url needs the secret of that server: --turn-secret-file, or "
                f"{ENVIRONMENT}TURN_SECRET in the environment"
            )
        if has_secret and not self.turn_url:
            raise ValueError("a TURN secret is given, but no --turn-url to use it for")
        return self
