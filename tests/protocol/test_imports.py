"""What an import costs: a fresh interpreter tells."""

import json
import subprocess
import sys

import pytest

import aiconexus.protocol


def modules_after(statement: str) -> set[str]:
    script = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    return set(json.loads(done.stdout))


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    return modules_after("import aiconexus.protocol")


@pytest.mark.parametrize(
    "module",
    ["aiortc", "aioice", "av", "uvloop", "websockets", "picows", "asyncio", "gateway", "cryptography"],
)
def test_protocol_loads_no_input_output(loaded, module):
    assert module not in loaded


def test_package_alone_loads_not_even_the_protocol():
    assert "aiconexus.protocol" not in modules_after("import aiconexus")


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        aiconexus.nothing  # noqa: B018


def test_every_public_name_of_the_protocol_is_there():
    for name in aiconexus.protocol.__all__:
        assert hasattr(aiconexus.protocol, name)
    assert len(set(aiconexus.protocol.__all__)) == len(aiconexus.protocol.__all__)


@pytest.mark.parametrize("name", ["AIConexusError", "DIDKey", "Message"])
def test_package_gives_the_protocol_names_when_they_are_asked_for(name):
    assert getattr(aiconexus, name).__module__.startswith("aiconexus.protocol")
    assert name in dir(aiconexus)


@pytest.mark.parametrize("name", aiconexus.__all__)
def test_package_gives_every_public_name(name):
    assert getattr(aiconexus, name).__module__.startswith("aiconexus.")


def test_signaling_client_loads_no_webrtc():
    loaded = modules_after("from aiconexus import GatewayClient")
    assert "websockets" in loaded
    assert not loaded & {"aiortc", "aioice", "av", "uvloop", "picows", "gateway"}
