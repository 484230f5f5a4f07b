"""The parent of the workers: starts them, links them, restarts what dies, passes signals on."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import structlog

from aiconexus.protocol import DIDKey
from gateway._mesh import socket_pair
from gateway._routing import TableBusyError
from gateway.config import Settings
from gateway.node import Node
from gateway.process import LINK, LINKED, READY, SERVE, STOP_SIGNALS, WorkerProcess
from gateway.worker import Gateway

# A worker that dies is started again after this; twice the time after every death that follows soon.
RESTART_SECONDS = 0.1
RESTART_MAX_SECONDS = 10.0
# One that ran so long was healthy.
HEALTHY_SECONDS = 30.0
# Deaths of one worker before it ever served, in a row, after which the gateway gives up.
START_ATTEMPTS = 5
# How long a new worker waits for the others to take their link to it; one that is stopped does not.
LINK_SECONDS = 1.0
# A worker whose event loop does not turn for so long is killed, so that its agents can go elsewhere.
HANG_SECONDS = 60.0
WATCH_SECONDS = 1.0

# A gateway that was told to stop leaves the port within this time; the next one may be started at once.
RESERVE_SECONDS = 1.0

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class _Worker:
    """What the supervisor knows of one worker. Times are in seconds of the monotonic clock."""

    number: int
    pid: int = 0  # 0: not running
    line: socket.socket | None = None
    started_at: float = 0.0
    restart_at: float | None = None
    generation: int = -1  # processes that have had the number before this one
    deaths: int = 0  # in quick succession
    is_forgotten: bool = True  # what the last process with its number had in shared memory
    has_served: bool = False
    is_serving: bool = False  # it was told to
    waits_for: set[int] = field(default_factory=set)  # workers that have not taken their link to it
    heartbeats: int = -1
    silent_since: float = 0.0


class Supervisor:
    """Runs the workers of a node.

    Args:
        settings: What the operator set.
        key: The gateway's identity.
        address: Bound with SO_REUSEPORT, not listening: it keeps the port, and workers bind to its name.
        on_ready: Called once all workers accept connections.
    """

    def __init__(
        self, settings: Settings, key: DIDKey, address: socket.socket, on_ready: Callable[[], None]
    ) -> None:
        self._settings = settings
        self._key = key
        self._address = address
        self._on_ready: Callable[[], None] | None = on_ready
        # An agent that is away has a route and no connection.
        agents = 2 * settings.max_connections
        self._node = Node.create(settings.workers, agents, agents if settings.redis else 0)
        self._workers = [_Worker(number) for number in range(settings.workers)]
        self._log = structlog.get_logger("gateway.supervisor")
        self._selector = selectors.DefaultSelector()
        self._is_stopping = False
        self._status = 0

    def run(self) -> int:
        """Run until a signal ends it; return the exit status."""
        wake, wakeup = socket.socketpair()
        wake.setblocking(False)
        wakeup.setblocking(False)
        self._inherited = [wake, wakeup]
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGHUP, *STOP_SIGNALS):
            signal.signal(number, lambda *_: None)
        self._selector.register(wake, selectors.EVENT_READ)
        # What is there now is never collected: workers then share its pages.
        gc.collect()
        gc.freeze()
        for worker in self._workers:
            self._start(worker)
        watch_at = time.monotonic() + WATCH_SECONDS
        while any(worker.pid for worker in self._workers) or not self._is_stopping:
            now = time.monotonic()
            due = [
                watch_at,
                *(worker.restart_at for worker in self._workers if worker.restart_at is not None),
            ]
            for key, _ in self._selector.select(max(min(due) - now, 0)):
                if key.fileobj is wake:
                    self._on_signals(wake.recv(4096))
                elif key.fileobj is key.data.line:  # it may have died earlier in this round
                    self._on_line(key.data)
            now = time.monotonic()
            for worker in self._workers:
                if worker.restart_at is not None and worker.restart_at <= now and self._forget(worker):
                    worker.restart_at = None
                    try:
                        self._start(worker)
                    except OSError as error:  # no process, no memory or no descriptor now
                        self._log.error("worker not started", worker=worker.number, reason=str(error))
                        worker.restart_at = now + RESTART_MAX_SECONDS
                elif worker.restart_at is not None and worker.restart_at <= now:
                    worker.restart_at = now + WATCH_SECONDS
            if watch_at <= now:
                watch_at = now + WATCH_SECONDS
                self._watch(now)
        signal.set_wakeup_fd(-1)
        self._log.info("stopped", status=self._status, counters=self._node.totals())
        return self._status

    # --- starting ------------------------------------------------------------------------------

    def _start(self, worker: _Worker) -> None:
        line, their_line = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # One whose line is closed is dying: its SIGCHLD is still to come.
        running = [other for other in self._workers if other.pid and other.line is not None]
        pairs = [(other, *socket_pair()) for other in running]
        parent = os.getpid()
        worker.generation += 1
        self._node.set_draining(worker.number, False)
        # A signal that comes before the worker can take it must wait for that, not be lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            worker.pid = os.fork()
        except OSError:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            raise
        if worker.pid == 0:
            line.close()
            for _, _, far in pairs:
                far.close()
            self._be_worker(
                worker.number,
                parent,
                their_line,
                [(other.number, other.generation, near) for other, near, _ in pairs],
            )
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        their_line.close()
        worker.line = line
        worker.started_at = worker.silent_since = time.monotonic()
        worker.has_served = worker.is_serving = False
        worker.waits_for = set()
        self._selector.register(line, selectors.EVENT_READ, worker)
        for other, near, far in pairs:
            near.close()
            # One that does not read its line is stopped or dying; the new one does not wait for it.
            with suppress(OSError):
                assert other.line is not None
                socket.send_fds(
                    other.line,
                    [LINK + b" %d %d" % (worker.number, worker.generation)],
                    [far.fileno()],
                    socket.MSG_DONTWAIT,
                )
                worker.waits_for.add(other.number)
            far.close()
        self._let_serve(worker)

    def _be_worker(
        self, number: int, parent: int, line: socket.socket, links: list[tuple[int, int, socket.socket]]
    ) -> None:
        """Become a worker; does not return."""
        status = 1
        try:
            self._node.lifeline.let_go()
            # No orphan survives the supervisor, however that ends (prctl(2)).
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that closes sends it to the whole group
            self._selector.close()
            for end in self._inherited:
                end.close()
            for worker in self._workers:
                if worker.line is not None:
                    worker.line.close()
            listener = bind(self._address)
            self._address.close()
            self._node.ledger.begin(number, self._workers[number].generation, self._key.did.encode())
            gateway = Gateway(self._settings, self._key, self._node, number)
            WorkerProcess(gateway, line, links, listener).run()
            status = 0
        except BaseException:  # whatever it is, the process ends here, and not in the supervisor's code
            self._log.exception("worker failed", worker=number)
        finally:
            os._exit(status)

    def _let_serve(self, worker: _Worker) -> None:
        if not worker.is_serving and not worker.waits_for and worker.line is not None:
            worker.is_serving = True
            with suppress(OSError):
                worker.line.send(SERVE)

    def _on_line(self, worker: _Worker) -> None:
        assert worker.line is not None
        try:
            data = worker.line.recv(64)
        except OSError:
            data = b""
        if not data:
            self._hang_up(worker)  # its death is reported by SIGCHLD
            return
        word, _, argument = data.partition(b" ")
        if word == LINKED:
            other = self._workers[int(argument)]
            other.waits_for.discard(worker.number)
            self._let_serve(other)
        elif word == READY:
            worker.has_served = True
            if self._on_ready is not None and all(each.has_served for each in self._workers):
                self._log.info("serving", did=self._key.did, workers=len(self._workers))
                self._on_ready()
                self._on_ready = None

    def _hang_up(self, worker: _Worker) -> None:
        if worker.line is not None:
            self._selector.unregister(worker.line)
            worker.line.close()
            worker.line = None

    # --- watching ------------------------------------------------------------------------------

    def _watch(self, now: float) -> None:
        """Kill workers whose event loop does not turn; let new ones serve that waited for such a one."""
        for worker in self._workers:
            if not worker.pid:
                continue
            if not worker.is_serving and now - worker.started_at > LINK_SECONDS:
                worker.waits_for.clear()
                self._let_serve(worker)
            heartbeats = self._node.counters.get(worker.number, "heartbeats")
            if heartbeats != worker.heartbeats:
                worker.heartbeats = heartbeats
                worker.silent_since = now
            elif now - worker.silent_since > HANG_SECONDS:
                self._log.error("worker hangs", worker=worker.number, pid=worker.pid, seconds=HANG_SECONDS)
                worker.silent_since = now
                os.kill(worker.pid, signal.SIGKILL)

    def _on_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number in STOP_SIGNALS:
                self._stop()
            elif number == signal.SIGHUP:
                self._log.info("SIGHUP", text="there is nothing to reload: options are read at the start")
        while any(worker.pid for worker in self._workers):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            for worker in self._workers:
                if worker.pid == pid:
                    self._on_death(worker, os.waitstatus_to_exitcode(status))

    def _forget(self, worker: _Worker) -> bool:
        """Clean up after a worker that is gone; False if that must wait for a process that is stopped."""
        if not worker.is_forgotten:
            with suppress(TableBusyError):
                self._node.forget(worker.number)
                worker.is_forgotten = True
        return worker.is_forgotten

    def _stop(self) -> None:
        self._is_stopping = True
        # The next gateway may have the port while this one drains.
        self._address.close()
        for worker in self._workers:
            if worker.pid:  # all of them, before one is told: it is to wait for the others
                self._node.set_draining(worker.number, True)
        for worker in self._workers:
            worker.restart_at = None
            if worker.pid:
                os.kill(worker.pid, signal.SIGTERM)

    def _on_death(self, worker: _Worker, status: int) -> None:
        worker.pid = 0
        self._hang_up(worker)
        worker.is_forgotten = False
        self._forget(worker)
        for other in self._workers:
            other.waits_for.discard(worker.number)
            self._let_serve(other)
        if self._is_stopping:
            if status != 0:
                self._log.error("worker died while draining", worker=worker.number, status=status)
                self._status = 1
            return
        lived = time.monotonic() - worker.started_at
        worker.deaths = 1 if lived > HEALTHY_SECONDS else worker.deaths + 1
        self._log.error("worker died", worker=worker.number, status=status, lived_seconds=round(lived, 1))
        if not worker.has_served and worker.deaths >= START_ATTEMPTS:
            self._log.error("giving up: a worker cannot start", worker=worker.number, attempts=worker.deaths)
            self._status = 1
            self._stop()
            return
        delay = min(RESTART_SECONDS * 2 ** (worker.deaths - 1), RESTART_MAX_SECONDS)
        worker.restart_at = time.monotonic() + delay


def bind(address: socket.socket) -> socket.socket:
    """Return a new socket bound to the same address, for one worker to listen on."""
    listener = socket.socket(address.family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if address.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind(address.getsockname())
    return listener


def reserve(host: str, port: int) -> socket.socket:
    """Bind an address for the workers, unless somebody listens there already.

    With SO_REUSEPORT alone a second gateway would start beside the first one and get half of its agents.
    So the address is tried without it first: that fails while anybody listens.

    Raises:
        OSError: The address is in use, not this machine's, or not allowed.
    """
    info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, _, _, name = info[0]
    deadline = time.monotonic() + RESERVE_SECONDS
    while True:
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(name)
                probe.listen(1)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    raise
            else:
                name = probe.getsockname()
                break
        time.sleep(0.05)
    address = socket.socket(family, kind)
    address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    address.bind(name)
    return address
