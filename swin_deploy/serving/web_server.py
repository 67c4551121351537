"""Uvicorn with time limits for clients that send no request, and an end that loses no accepted request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from swin_deploy.errors import UsageError

BACKLOG = 2048
GRACE = 0.5  # seconds for a request that was sent just before the end
FILES = 65536  # open connections


class PatientProtocol(HttpToolsProtocol):
    """Closes connections on which no complete request head arrives in time: Uvicorn limits only the time between requests."""

    head_seconds = 30.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()  # which holds this connection and its last request
        super().connection_lost(exc)

    def shutdown(self) -> None:
        if self._idle:
            self.loop.call_later(GRACE, super().shutdown)
        else:
            super().shutdown()

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        self._timer = self.loop.call_later(self.head_seconds, self._close_unused, self.cycle if self._idle else self)

    def _close_unused(self, before: object) -> None:
        if self.transport.is_closing():
            return
        if self._idle and self.cycle is before:
            self.transport.close()
        else:
            self._watch()


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket on an address of this machine. Raises UsageError if that fails."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except BaseException:
            made.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"Cannot listen on {host}:{port} ({reason}). Pass another --host or --port.") from error
    return made


def run_until_signal(app: Any, listening: socket.socket, seconds: float, ready: Callable[[str], None]) -> None:
    """Serve `app` until SIGINT or SIGTERM, then answer the accepted requests and return.

    Args:
        app: The ASGI application.
        listening: A bound socket.
        seconds: How long a client may take to send a request, and a service to answer at its end.
        ready: Called with the URL once connections are accepted.
    """
    _allow_connections()
    for name in ("uvicorn", "python_multipart"):
        logging.getLogger(name).setLevel(logging.ERROR)  # not a line for each malformed request
    protocol = type("Protocol", (PatientProtocol,), {"head_seconds": seconds})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(3 * seconds) + 1,
    )
    host, port = listening.getsockname()[:2]
    listening.listen(BACKLOG)
    # Uvicorn raises the signal that ended it once more, which would end the command as an interrupt.
    before = {signum: signal.signal(signum, lambda *_: None) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        uvicorn.Server(config).run([listening])
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _allow_connections() -> None:
    """Raise the limit of open files, which is often 1024, as far as this process may."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
