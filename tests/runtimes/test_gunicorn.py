"""A WSGI application in gunicorn, with and without "preload": where a model may be loaded, and what a wrong place answers."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli.exported import digits

import swin_deploy

pytest.importorskip("gunicorn", reason="the server under test")

APPLICATION = """
import os
import numpy as np
import swin_deploy

def load():
    return swin_deploy.load(os.environ["BUNDLE"], backend="onnxruntime", precision="fp32", threads=1)

def application(environ, start_response):
    place = environ["PATH_INFO"][1:]
    if place == "request" and place not in models:
        models[place] = load()
    try:
        logits = models[place].run({"pixel_values": np.ones((1, 3, 32, 32), np.float32)})["logits"]
        status, answer = "200 OK", logits.tobytes().hex()
    except swin_deploy.errors.BackendError as error:
        status, answer = "503 Service Unavailable", str(error)
    start_response(status, [("Content-Type", "text/plain")])
    return [answer.encode()]

models = {"import": load()}
"""
CONFIGURATION = """
import sys

def post_fork(server, worker):
    if application := sys.modules.get("application"):  # with "preload"
        application.models["post_fork"] = application.load()

def when_ready(server):
    print("ready", flush=True)
"""


class Connection(http.client.HTTPConnection):
    """To the socket in the current directory."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect("socket")


def asked(place: str) -> tuple[int, str]:
    connection = Connection("localhost")
    connection.request("GET", f"/{place}")
    response = connection.getresponse()
    return response.status, response.read().decode()


@pytest.mark.parametrize("preload", [True, False])
def test_where_the_model_is_loaded(preload: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "application.py").write_text(APPLICATION)
    (tmp_path / "configuration.py").write_text(CONFIGURATION)
    with swin_deploy.load(digits(2), backend="onnxruntime", precision="fp32", threads=1) as model:
        right = model.run({"pixel_values": np.ones((1, 3, 32, 32), np.float32)})["logits"].tobytes().hex()
    command = [sys.executable, "-m", "gunicorn", "-c", "configuration.py", "-b", "unix:socket", "-w", "2", "application"]
    environment = {**os.environ, "BUNDLE": str(digits(2)), "HOME": str(tmp_path)}
    with subprocess.Popen(
        command + ["--preload"] * preload, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            for _ in range(4):  # one worker or the other answers
                status, answer = asked("import")
                assert (status, "in its fork" in answer) == (503, True) if preload else (status, answer) == (200, right)
                assert asked("request") == (200, right)
                if preload:
                    assert asked("post_fork") == (200, right)
        finally:
            server.terminate()
        errors = server.communicate()[1]
    assert (server.returncode, "Traceback" in errors) == (0, False), errors
