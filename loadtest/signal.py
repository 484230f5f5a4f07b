"""Load test of the signaling path: `locust -f loadtest/signal.py --host ws://127.0.0.1:8000`; see README."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType


def _find_standard_module() -> ModuleType | None:
    """Return the `signal` of the standard library from a module that has imported it, if one has."""
    for module in list(sys.modules.values()):
        found = vars(module).get("signal")
        if isinstance(found, ModuleType) and found.__name__ == "signal" and hasattr(found, "SIGCHLD"):
            return found
    return None


def _load_standard_module() -> ModuleType:
    path = Path(sysconfig.get_path("stdlib"), "signal.py")
    spec = importlib.util.spec_from_file_location("signal", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["signal"] = module
    spec.loader.exec_module(module)
    return module


# Locust imports a file by its path and puts it into `sys.modules` under its name. There this one would stand
# for the standard module in every later `import signal`, so it gives the place back. The module is the one
# that gevent has patched, not a second copy.
_standard = _find_standard_module()
if __name__ == "signal":
    sys.modules["signal"] = _standard or _load_standard_module()

# Where nothing has imported the standard module yet, it is not Locust that imports this file, but an `import
# signal` with this folder on `sys.path` (`python -m locust` started here). Whoever it was has it now.
if _standard is not None:
    from signaling.user import SignalingUser

    __all__ = ["SignalingUser"]
