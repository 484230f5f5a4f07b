"""Settings: options over environment over defaults."""

from __future__ import annotations

import math
import os

import pytest
from pydantic import ValidationError

from gateway.config import Settings


def test_the_defaults_are_those_of_the_help_text():
    settings = Settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.workers == len(os.sched_getaffinity(0))
    assert (settings.register_timeout, settings.ping_interval, settings.pong_timeout) == (10, 25, 10)
    assert (settings.away, settings.idle_timeout) == (30, 0)
    assert (settings.max_connections, settings.max_connections_per_address) == (100_000, 0)
    assert (settings.message_rate, settings.message_burst) == (200, 1000)
    assert settings.drain_seconds == 10
    assert settings.public_url == ()
    assert (settings.log_level, settings.log_format) == ("info", "console")


def test_the_environment_sets_what_no_option_does(monkeypatch):
    monkeypatch.setenv("AICONEXUS_GATEWAY_PORT", "9")
    monkeypatch.setenv("AICONEXUS_GATEWAY_AWAY", "5")
    monkeypatch.setenv("AICONEXUS_GATEWAY_PUBLIC_URL", "wss://a.example/ws, wss://b.example/ws")
    settings = Settings(away=7)
    assert (settings.port, settings.away) == (9, 7)
    assert settings.public_url == ("wss://a.example/ws", "wss://b.example/ws")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", -1),
        ("port", 65_536),
        ("port", "http"),
        ("workers", 0),
        ("workers", 65),
        ("register_timeout", 0),
        ("ping_interval", -1),
        ("ping_interval", math.nan),
        ("ping_interval", math.inf),
        ("pong_timeout", 3_601),
        ("away", -1),
        ("away", math.nan),
        ("idle_timeout", -1),
        ("idle_timeout", math.inf),
        ("idle_timeout", math.nan),
        ("log_level", "loud"),
        ("log_format", "xml"),
        ("public_url", ("https://gateway.example/ws",)),
        ("public_url", ("gateway.example",)),
        ("public_url", ("wss://gateway.example",)),
        ("public_url", ("wss://gateway.example:99999/ws",)),
        ("public_url", ("wss://user@gateway.example/ws",)),
        ("prot", 1),
    ],
)
def test_what_makes_no_sense_is_refused(name, value):
    with pytest.raises(ValidationError):
        Settings(**{name: value})


def test_who_requires_redis_has_to_name_it():
    with pytest.raises(ValidationError, match="--redis-required needs --redis, or AICONEXUS_GATEWAY_REDIS"):
        Settings(redis_required=True)
    assert Settings(redis_required=True, redis="redis://127.0.0.1:1").redis_required
