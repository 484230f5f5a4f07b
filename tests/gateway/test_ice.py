"""Credentials for TURN servers, and the settings that they come of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.config import Settings
from gateway.ice import IceServers

DID = "did:key:z6MkiTBz1ymuepAQ4HEHYSF1H8quG5GLVVQR3djdX3mDooWp"
TURN = ("turn:turn.example",)


def test_without_servers_there_is_an_empty_list_and_no_time():
    assert IceServers().ext(DID) == {"ice_servers": []}
    assert IceServers(stun_urls=("stun:a", "stun:b")).ext(DID) == {
        "ice_servers": [{"urls": ["stun:a", "stun:b"]}]
    }


def test_credential_is_what_coturn_computes_of_the_secret():
    # printf 1768298400:$DID | openssl dgst -sha1 -hmac north -binary | base64
    assert IceServers(("stun:a",), TURN, "north", 86_400).ext(DID, now=1_768_212_000.9) == {
        "ice_servers": [
            {"urls": ["stun:a"]},
            {
                "urls": ["turn:turn.example"],
                "username": f"1768298400:{DID}",
                "credential": "171xrwsdMGQ0QKNJGniI78lxFZE=",
            },
        ],
        "ice_servers_ttl_ms": 86_400_000,
    }


def test_the_secret_is_in_no_text():
    settings = Settings(turn_url=TURN, turn_secret="north")
    assert "north" not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    assert "north" not in repr(IceServers((), TURN, "north", 1))


def test_the_secret_may_stand_in_a_file_or_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "secret"
    path.write_text("north\n")
    settings = Settings(turn_url=TURN, turn_secret_file=path)
    assert settings.turn_secret is not None
    assert settings.turn_secret.get_secret_value() == "north"
    monkeypatch.setenv("AICONEXUS_GATEWAY_TURN_SECRET", "south")
    monkeypatch.setenv("AICONEXUS_GATEWAY_TURN_URL", "turn:a turns:b?transport=tcp")
    settings = Settings()
    assert settings.turn_secret is not None
    assert settings.turn_secret.get_secret_value() == "south"
    assert settings.turn_url == ("turn:a", "turns:b?transport=tcp")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"turn_url": TURN}, "--turn-url needs the secret of that server: --turn-secret-file"),
        ({"turn_url": TURN, "turn_secret": ""}, "the secret of the TURN servers is empty"),
        ({"turn_secret": "north"}, "no --turn-url to use it for"),
        ({"turn_url": TURN, "turn_secret": "north", "turn_secret_file": "x"}, "not both"),
        ({"turn_url": TURN, "turn_secret_file": "/nowhere/secret"}, "/nowhere/secret: No such file"),
        ({"turn_url": ("stun:a",), "turn_secret": "north"}, "STUN server: give it with --stun-url"),
        ({"stun_url": TURN}, "TURN server: give it with --turn-url"),
        ({"turn_url": ("turn://a",), "turn_secret": "north"}, "there is no // in these URLs"),
        ({"turn_url": TURN, "turn_secret": "north", "turn_ttl": 0}, "greater than or equal to 1"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_reason(values: dict[str, Any], text: str):
    with pytest.raises(ValidationError, match=text) as caught:
        Settings(**values)
    assert "north" not in str(caught.value)
