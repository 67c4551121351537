"""A server in a process of its own, until the client is done."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@contextmanager
def running(command, ready, environment=None):
    """Run a command until the address `ready` answers, and end it after the block."""
    process = subprocess.Popen(command, env={**os.environ, **(environment or {})}, stdout=sys.stderr, start_new_session=True)
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(ready, timeout=10).read()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        else:
            raise RuntimeError(f"{command[0]} ended with {process.returncode}")
        yield
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
