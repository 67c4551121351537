"""A `swin-deploy serve` for tests."""

from __future__ import annotations

import http.client
import json
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cli.exported import EXAMPLES, SCRIPT, THREE, started

RUN = {"backend": "onnxruntime", "precision": "fp32"}
IMAGE = THREE.read_bytes()
SEVEN = (EXAMPLES / "digits/images/7.png").read_bytes()
LIMITS = ("--max-body", "256KiB", "--max-pixels", "2500", "--timeout", "30")
Answer = tuple[int, Any]


class Served:
    """A running `swin-deploy serve`."""

    def __init__(self, bundle: Path, *options: str) -> None:
        flags = [part for name, value in RUN.items() for part in (f"--{name}", value)]
        command = [SCRIPT, "serve", str(bundle), "--port", "0", *flags, "--workers", "2", "--batch", "1", *options]
        self.process = started(*command, cwd=bundle)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        self.port = int(self.url.rpartition(":")[2] or 0)
        assert self.port, self.process.communicate()[1]

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        """The status of the answer and its JSON value."""
        link = http.client.HTTPConnection("127.0.0.1", self.port)
        link.request(method, path, body, headers or {})
        answer = link.getresponse()
        status, content = answer.status, answer.read()
        link.close()
        return status, json.loads(content) if "json" in answer.headers["content-type"] else content

    def send(self, content: bytes) -> socket.socket:
        """A connection on which `content` was sent."""
        link = socket.create_connection(("127.0.0.1", self.port))
        link.sendall(content)
        return link

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate()
        return self.process.returncode


@contextmanager
def served(bundle: Path, *options: str) -> Iterator[Served]:
    server = Served(bundle, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()
