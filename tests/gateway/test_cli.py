"""The command line as a person meets it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from wire import Agent, wait_until

from aiconexus import __version__


def run(*options: str, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["-c", code] if code else ["-m", "gateway.server"]
    return subprocess.run(
        [sys.executable, *command, *options],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1", **environment},
        check=False,
    )


def assert_one_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert done.stderr.startswith("aiconexus-gateway: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


def test_the_help_tells_every_option_with_its_default():
    done = run("--help")
    assert done.returncode == 0
    for option in (
        "--host",
        "--port",
        "--workers",
        "--identity",
        "--public-url",
        "--register-timeout",
        "--ping-interval",
        "--pong-timeout",
        "--away",
        "--idle-timeout",
        "--stun-url",
        "--turn-url",
        "--turn-secret",
        "--turn-secret-file",
        "--turn-ttl",
        "--log-level",
        "--log-format",
        "--version",
    ):
        assert option in done.stdout
    for text in ("Usage: aiconexus-gateway", "127.0.0.1", "8000", "wss://gateway.example/ws", "default: 25"):
        assert text in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_the_console_script_and_the_module_are_the_same():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"aiconexus-gateway {__version__}\n")
    assert run("--version", code="from gateway.server import main; main()").stdout == done.stdout


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--port", "70000"),
        ("--workers", "0"),
        ("--message-rate", "-1"),
        ("--max-connections", "0"),
        ("--ping-interval", "0"),
        ("--ping-interval", "nan"),
        ("--idle-timeout", "inf"),
        ("--away", "-1"),
        ("--log-level", "loud"),
        ("--log-format", "xml"),
        ("--public-url", "https://gateway.example/ws"),
        ("--public-url", "wss://gateway.example"),
        ("--public-url", "wss://gateway.example:99999/ws"),
        ("--stun-url", "stun://stun.example"),
        ("--stun-url", "turn:turn.example"),
        ("--turn-url", "turn.example"),
        ("--turn-url", "turn:turn.example"),  # without its secret
        ("--turn-ttl", "0"),
        ("--redis", "redis://h?ssl_ca_certs=ca.pem"),
        ("--redis", "rediss://h?ssl_cert_reqs=some"),
        ("--redis", "redis://:p@ss/word@h"),
        ("--redis-prefix", "a:b"),
        ("--node-name", "a b"),
    ],
)
def test_a_value_that_makes_no_sense_gives_one_sentence_that_names_the_option(option, value):
    assert_one_sentence(run(option, value), option)


def test_a_prefix_or_name_that_is_none_is_told_what_one_is():
    assert_one_sentence(run("--redis-prefix", "a{b"), "1 to 64 letters of A to Z, digits, and _ . -", "'a{b'")
    assert_one_sentence(run("--node-name", "é"), "1 to 64 characters of ASCII", "'é'")


def test_a_value_from_the_environment_that_makes_no_sense_gives_one_sentence():
    assert_one_sentence(run(AICONEXUS_GATEWAY_PORT="http"), "port")


def test_a_name_in_the_environment_that_is_no_setting_gives_one_sentence():
    assert_one_sentence(run(AICONEXUS_GATEWAY_PROT="3"), "AICONEXUS_GATEWAY_PROT")


def test_what_is_no_option_or_no_number_is_a_usage_error():
    for options in (("--prot", "1"), ("--port", "http"), ("extra",)):
        done = run(*options)
        assert done.returncode == 2
        assert "Usage" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_port_in_use_gives_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("--port", str(port), "--log-level", "error")
    assert_one_sentence(done, f"127.0.0.1:{port}", "Address already in use")


def test_an_address_that_is_not_of_this_machine_gives_one_sentence():
    assert_one_sentence(run("--host", "192.0.2.1", "--port", "0"), "192.0.2.1")


def test_an_identity_that_cannot_be_used_gives_one_sentence(tmp_path: Path):
    readable = tmp_path / "readable.pem"
    readable.write_text("no key")
    readable.chmod(0o644)
    assert_one_sentence(run("--identity", str(readable)), str(readable), "chmod 600")
    damaged = tmp_path / "damaged.pem"
    damaged.write_text("no key")
    damaged.chmod(0o600)
    assert_one_sentence(run("--identity", str(damaged)), str(damaged))
    nowhere = tmp_path / "nowhere" / "key.pem"
    assert_one_sentence(run("--identity", str(nowhere)), str(nowhere), "No such file or directory")
    assert_one_sentence(run("--identity", str(tmp_path)), str(tmp_path))


@pytest.mark.parametrize("missing", ["gateway._connection", "gateway._frames", "uvloop"])
def test_without_the_compiled_part_it_says_how_to_get_it(missing):
    code = f"""
import runpy
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
runpy.run_module("gateway.server", run_name="__main__")
"""
    assert_one_sentence(run(code=code), missing, "C compiler")


def test_a_terminal_shows_the_banner_of_the_readme_in_its_frame(tmp_path: Path):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    documented = [line for line in readme.splitlines() if line.startswith("│")]
    options = ["--port", "0", "--workers", "1", "--identity", str(tmp_path / "gateway.key")]
    command = [sys.executable, "-m", "gateway.server", *options]
    limited = ["sh", "-c", 'ulimit -n 1024; exec "$0" "$@"', *command]
    ours, theirs = os.openpty()
    with subprocess.Popen(
        limited,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "COLUMNS": "120", "TERM": "xterm"},
    ) as process:
        os.close(theirs)
        try:
            with open(ours, newline="") as terminal:
                shown = []
                for line in terminal:
                    shown.append(re.sub(r"\x1b\[\d*m", "", line.rstrip()))
                    if shown[-1].startswith("╰"):
                        break
                process.terminate()
                assert process.wait(30) == 0
        finally:
            process.kill()
    names = [line.split("  ")[0] for line in shown if line.startswith("│")]
    assert names == [line.split("  ")[0] for line in documented]
    assert "did:key:z6Mk" in "".join(shown)


def say(*options: str) -> list[str]:
    """Start a gateway, stop it when it serves, and return what it has printed and logged."""
    command = [sys.executable, "-m", "gateway.server", "--port", "0", "--workers", "1", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if "workers: 1" in line or '"started"' in line:
                    process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
    return lines


PUBLIC = ("wss://a.example/ws", "wss://b.example/ws")


@pytest.mark.parametrize("public", [(), PUBLIC])
def test_the_banner_tells_where_it_listens_and_what_agents_dial(public):
    said = say(*(word for url in public for word in ("--public-url", url)))
    rows = dict(line.strip().split(": ", 1) for line in said if line.startswith("  "))
    assert re.fullmatch(r"ws://127\.0\.0\.1:\d+/ws", rows["listening"])
    assert rows.get("agents dial") == (", ".join(public) or None)


@pytest.mark.parametrize("level", ["info", "error"])
def test_with_a_json_log_all_that_it_says_is_json_lines(level):
    options = ("--log-format", "json", "--log-level", level, "--public-url", PUBLIC[0])
    said = [json.loads(line) for line in say(*options)]
    assert ("serving" in [line["event"] for line in said]) == (level == "info")
    (started,) = [line for line in said if line["event"] == "started"]
    assert started["agents_dial"] == [PUBLIC[0]]
    assert re.fullmatch(r"ws://127\.0\.0\.1:\d+/ws", started["listening"])
    assert started["did"].startswith("did:key:z6Mk")
    assert started["workers"] == 1
    assert {"timestamp", "level", "health", "pid", "connections_max", "version"} < set(started)


def test_the_identity_is_kept(start_gateway, tmp_path: Path):
    identity = tmp_path / "key.pem"
    first = start_gateway("--identity", str(identity))
    did = first.health()["did"]
    assert identity.stat().st_mode & 0o777 == 0o600
    first.stop()
    assert start_gateway("--identity", str(identity)).health()["did"] == did


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_loads_ends_it_as_any_other_does(number):
    code = """
import sys

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "gateway.cli":
            print("loading", flush=True)
            sys.stdin.read()

sys.meta_path.insert(0, Slow())
from gateway.server import main
main()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(number)
        assert process.wait(30) == 0


def test_a_hangup_stops_nobody_and_says_that_there_is_nothing_to_reload(start_gateway):
    gateway = start_gateway("--workers", "2")
    workers = gateway.worker_pids
    with Agent(gateway.port) as agent:
        gateway.signal_workers(signal.SIGHUP)  # of a terminal that closes, all get it
        gateway.signal(signal.SIGHUP)
        wait_until(lambda: '"event": "SIGHUP"' in gateway.log)
        agent.ping()
    (line,) = [line for line in gateway.log_lines() if line["event"] == "SIGHUP"]
    assert "nothing to reload" in line["text"]
    assert gateway.worker_pids == workers
    assert gateway.stop() == 0


def test_the_log_is_json_lines_if_so_wanted(start_gateway):
    gateway = start_gateway("--workers", "1", "--log-level", "debug")
    gateway.stop()
    lines = [json.loads(line) for line in gateway.log.splitlines()]
    assert [line["event"] for line in lines] == ["listening", "serving", "draining", "stopped", "stopped"]


def test_a_log_that_nobody_reads_any_more_stops_nothing(tmp_path: Path):
    """The pipe of a log collector that died."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway.server", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stderr.close()
        port = 0
        while not port:
            found = re.search(r"ws://127\.0\.0\.1:(\d+)/ws", process.stdout.readline())
            port = int(found[1]) if found else 0
        with Agent(port) as agent:
            for _ in range(3):
                agent.send(b"no JSON")
                agent.receive_error("not_json", None)
            agent.ping()
    finally:
        process.terminate()
        assert process.wait(20) == 0
        process.stdout.close()
