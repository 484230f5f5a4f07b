"""Build the gateway's Cython extensions; everything else is declared in pyproject.toml.

AICONEXUS_EXTENSIONS: `optional` (default; a machine without a C compiler still gets the SDK),
`required` (a failed build is an error), `none` (build none: a pure wheel).
AICONEXUS_BUILD: `release` (default) or `test` (bounds checks and C assertions; never benchmark it).
AICONEXUS_SCAN: `portable` or `sse2` builds the scanner alone, as a machine without more would run it.
"""

import os

from setuptools import Extension, setup

MODULES = [
    "_addresses",
    "_connection",
    "_counters",
    "_frames",
    "_ledger",
    "_memory",
    "_mesh",
    "_routing",
    "_timers",
    "_websocket",
]
# What _scan.h leaves out on such a machine.
SCAN_MACROS = {"portable": "AICONEXUS_SCAN_PORTABLE", "sse2": "AICONEXUS_SCAN_NO_AVX2"}


def extensions() -> list[Extension]:
    wanted = os.environ.get("AICONEXUS_EXTENSIONS", "optional")
    if wanted == "none":
        return []
    from Cython.Build import cythonize

    scan = os.environ.get("AICONEXUS_SCAN")
    macros = [(SCAN_MACROS[scan], "1")] if scan else []
    testing = os.environ.get("AICONEXUS_BUILD", "release") == "test"
    modules = cythonize(
        [
            Extension(
                f"gateway.{name}",
                [f"ext/gateway/{name}.pyx"],
                extra_compile_args=["-O1", "-g", "-UNDEBUG"] if testing else ["-O3", "-g0"],
                define_macros=macros if testing else [*macros, ("CYTHON_WITHOUT_ASSERTIONS", "1")],
            )
            for name in (["_frames"] if scan else MODULES)
        ],
        include_path=["ext"],
        compiler_directives={
            "language_level": 3,
            "boundscheck": testing,
            "wraparound": testing,
            "initializedcheck": testing,
            "cdivision": True,
            "embedsignature": True,
        },
        # cythonize does not notice that only the directives changed.
        force=True,
    )
    for module in modules:
        # cythonize drops this when it is given to Extension.
        module.optional = wanted != "required"
    return modules


setup(ext_modules=extensions())
