"""Run the tests on the oldest and the newest Python that are supported: `make test-pythons`."""

import nox

nox.options.error_on_missing_interpreters = True


@nox.session(python=["3.10", "3.13"])
def tests(session: nox.Session) -> None:
    session.env.update(AICONEXUS_EXTENSIONS="required", AICONEXUS_BUILD="test")
    session.install("--quiet", ".[dev]")
    session.run("python", "-m", "pytest", "tests", "-m", "not soak")
