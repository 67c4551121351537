"""`swin-deploy serve`: answers, refusals, clients that stall, and the end, with a real server."""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.exported import EXAMPLES, THREE, WEIGHTS, cli_here, digits, exported_bundle, one_block, refused
from serving.service import IMAGE, LIMITS, RUN, SEVEN, Served, served

import swin_deploy
import swin_deploy.serving
from swin_deploy.option_parsers import options_of
from swin_deploy.options import ServeSpec
from swin_deploy.tasks import TaskSpec

pytest.importorskip("fastapi", reason="the extra serve is not installed")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(digits(2), *LIMITS) as one:
        yield one


def form(name: str, content: bytes, file: str = '; filename="3.png"') -> tuple[bytes, dict[str, str]]:
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
    return head + content + b"\r\n--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}


def as_json(value: Any) -> tuple[bytes, dict[str, str]]:
    return json.dumps(value).encode(), {"Content-Type": "application/json"}


INPUTS = base64.b64encode(IMAGE).decode()


def test_answers_are_those_of_classify_and_of_transformers(server: Served) -> None:
    import transformers

    with swin_deploy.load(digits(2), **RUN) as model:
        expected = [{"label": one.label, "score": one.score} for one in model.classify(IMAGE)[0]]
        best = [{"label": one.label, "score": one.score} for one in model.classify(IMAGE, top_k=2)[0]]
    for body, headers in (
        (IMAGE, {"Content-Type": "image/png"}),
        (IMAGE, {"Content-Type": "application/octet-stream"}),
        (IMAGE, {}),
        form("image", IMAGE),
        form("file", IMAGE),
        as_json({"inputs": INPUTS}),
        as_json({"inputs": INPUTS, "parameters": {"top_k": 5}}),
    ):
        assert server.ask("POST", "/", body, headers) == (200, expected)
    assert server.ask("POST", "/?top_k=2", *form("image", IMAGE)) == (200, best)
    assert server.ask("POST", "/", *as_json({"inputs": INPUTS, "parameters": {"top_k": 2}})) == (200, best)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = transformers.pipeline("image-classification", model=str(WEIGHTS[2]), device="cpu")
        found = pipeline(str(THREE))
    assert [one["label"] for one in found] == [one["label"] for one in expected]
    np.testing.assert_allclose([one["score"] for one in found], [one["score"] for one in expected], rtol=1e-4)


def test_tritonclient_gets_the_outputs_of_run(server: Served) -> None:
    from tritonclient import http as triton

    with swin_deploy.load(digits(2), **RUN) as model:
        x = model.preparation([THREE, EXAMPLES / "digits/images/7.png"])
        expected = model.run({"pixel_values": x})["logits"]
    client, name = triton.InferenceServerClient(f"127.0.0.1:{server.port}"), WEIGHTS[2].name
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(name)
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    about = client.get_model_metadata(name, model_version="1")
    assert about["inputs"] == [{"name": "pixel_values", "datatype": "FP32", "shape": [-1, 3, 32, 32]}]
    assert about["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}]
    for binary in (True, False):
        given = triton.InferInput("pixel_values", list(x.shape), "FP32").set_data_from_numpy(x, binary_data=binary)
        for outputs in (None, [triton.InferRequestedOutput("logits", binary_data=not binary)]):
            answer = client.infer(name, [given], outputs=outputs, request_id="7")
            np.testing.assert_array_equal(answer.as_numpy("logits"), expected)
            assert answer.get_response()["id"] == "7"
    with pytest.raises(triton.InferenceServerException, match="no such model"):
        client.infer("other", [given])
    client.close()


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, 32, 32], "data": [0.5] * 3072, **changes}


def infer(*inputs: Any, **more: Any) -> tuple[str, str, bytes, dict[str, str]]:
    body, headers = as_json({"inputs": list(inputs), **more})
    return "POST", f"/v2/models/{WEIGHTS[2].name}/infer", body, headers


def post(body: bytes, kind: str = "image/png", path: str = "/", **headers: str) -> tuple[str, str, bytes, dict[str, str]]:
    return "POST", path, body, {"Content-Type": kind, **headers}


def large_image(size: int) -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (size, size)).save(file, "PNG")
    return file.getvalue()


BINARY = {"parameters": {"binary_data_size": 12288}, "data": None}
MALFORMED = [
    (422, "empty", post(b"")),
    (415, "not a valid image", post(b"hello")),
    (415, "not a valid image", post(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")),
    (422, "damaged", post(IMAGE[:100])),
    (413, "262144 bytes", post(bytes(300_000))),
    (413, "51x51 pixels", post(large_image(51))),
    (415, "content type", post(IMAGE, "text/plain")),
    (415, "content type", post(IMAGE, "application/x-www-form-urlencoded")),
    (415, "encoding gzip", post(IMAGE, **{"Content-Encoding": "gzip"})),
    (422, "top_k", post(IMAGE, path="/?top_k=0")),
    (422, "top_k", post(IMAGE, path="/?top_k=many")),
    (422, "no file", ("POST", "/", *form("image", IMAGE[:4], ""))),
    (415, "not a valid image", ("POST", "/", *form("image", b"hello"))),
    (422, "form is invalid", ("POST", "/", IMAGE, {"Content-Type": "multipart/form-data"})),
    (422, "form is invalid", ("POST", "/", IMAGE, {"Content-Type": "multipart/form-data; boundary=y"})),
    (422, "not fetch", ("POST", "/", *as_json({"url": "http://127.0.0.1/3.png"}))),
    (422, "not fetch", ("POST", "/", *as_json({"inputs": "http://127.0.0.1/3.png"}))),
    (422, "not fetch", ("POST", "/", *as_json({"inputs": "file:///etc/passwd"}))),
    (422, "not base64", ("POST", "/", *as_json({"inputs": "/etc/passwd!"}))),
    (422, "empty", ("POST", "/", *as_json({"inputs": ""}))),
    (422, 'no "inputs"', ("POST", "/", *as_json({}))),
    (422, 'no "inputs"', ("POST", "/", *as_json({"inputs": [INPUTS]}))),
    (422, "JSON object", ("POST", "/", *as_json([INPUTS]))),
    (422, "not supported", ("POST", "/", *as_json({"inputs": INPUTS, "parameters": {"function_to_apply": "none"}}))),
    (422, "top_k", ("POST", "/", *as_json({"inputs": INPUTS, "parameters": {"top_k": 1.5}}))),
    (422, "JSON", post(b"{", "application/json")),
    (422, "nested", post(b"[" * 9000 + b"]" * 9000, "application/json")),
    (422, "JSON", post(b'{"inputs": NaN}', "application/json")),
    (404, "Not Found", ("GET", "/nothing", None, {})),
    (405, "Not Allowed", ("DELETE", "/", None, {})),
    (404, "no such model", ("GET", "/v2/models/other", None, {})),
    (404, "no such model", ("GET", f"/v2/models/{WEIGHTS[2].name}/versions/2/ready", None, {})),
    (400, 'no "inputs"', infer()),
    (400, 'valid "inputs"', infer("pixel_values")),
    (400, "datatype", infer(tensor(datatype="FP31"))),
    (400, "dtype float64", infer(tensor(datatype="FP64"))),
    (400, "valid shape", infer(tensor(shape=[1, 3, -32, 32]))),
    (400, "match its shape", infer(tensor(shape=[1 << 30, 3, 32, 32]))),
    (400, "no input", infer(tensor(name="pixels"))),
    (400, "twice", infer(tensor(), tensor())),
    (400, "not a list of FP32", infer(tensor(data="0.5"))),
    (400, "not a list of FP32", infer(tensor(data=["0.5"] * 3072))),
    (400, "not a list of UINT8", infer(tensor(datatype="UINT8", data=[256] * 3072))),
    (400, "beyond the range", infer(tensor(data=[1e300] * 3072))),
    (400, "batch", infer(tensor(shape=[0, 3, 32, 32], data=[]))),
    (400, "no output", infer(tensor(), outputs=[{"name": "scores"}])),
    (400, "classification", infer(tensor(), outputs=[{"name": "logits", "parameters": {"classification": 3}}])),
    (400, "binary_data_size", infer(tensor(**BINARY))),
    (400, "Header-Content-Length", (*infer(tensor())[:3], {"Inference-Header-Content-Length": "-1"})),
    (400, '"id"', infer(tensor(), id=7)),
]
RAW = [
    b"hello\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /\0 HTTP/1.1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
]


def test_malformed_requests_are_refused_with_a_sentence(server: Served) -> None:
    for status, part, request in MALFORMED:
        code, answer = server.ask(*request)
        assert (code, isinstance(answer, dict)) == (status, True), (part, answer)
        assert part in answer["error"]
        assert answer["error"].endswith(".")
    for content in RAW:
        with server.send(content) as link:
            link.shutdown(socket.SHUT_WR)
            assert link.recv(9) in (b"HTTP/1.1 ", b""), content
    assert server.ask("POST", "/", IMAGE)[0] == 200


def test_pages(server: Served) -> None:
    status, page = server.ask("GET", "/")
    assert (status, b"<title>swinv2-digits</title>" in page) == (200, True)
    assert re.findall(rb'(?:src|href)="(?!data:|docs")|https?://', page) == []
    assert server.ask("GET", "/docs")[0] == server.ask("GET", "/health")[0] == 200
    paths = server.ask("GET", "/openapi.json")[1]["paths"]
    assert {"/", "/health", "/metrics", "/v2/models/{model}/infer"} <= paths.keys()
    assert b'swin_deploy_requests_total{route="/health",status="200"}' in server.ask("GET", "/metrics")[1]


def test_other_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feature extractor answers images with its outputs; masked image modeling states where to send tensors."""
    fastapi = pytest.importorskip("fastapi.testclient", reason="the test client of Starlette needs httpx")
    bundle = exported_bundle("--weights", str(one_block()), "--task", "feature-extraction", "--output-attentions")
    with swin_deploy.load(bundle, **RUN) as model:
        expected = {name: array[0].tolist() for name, array in model.features(IMAGE).items()}
    with fastapi.TestClient(swin_deploy.serving.application(bundle, **RUN, workers=1, batch=2)) as client:
        assert client.post("/", content=IMAGE).json() == expected
        monkeypatch.setattr(type(model), "task", TaskSpec("masked-image-modeling"))
        answer = client.post("/", content=IMAGE)
        assert (answer.status_code, "masked images" in answer.json()["error"]) == (422, True)


def test_stalled_clients_do_not_block_and_sigterm_answers_what_was_accepted() -> None:
    head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(IMAGE)}\r\n\r\n".encode()
    with served(digits(2), "--timeout", "1") as server:
        stalled = [server.send(content) for content in (b"", b"POST / HT", head, head + IMAGE[:50]) for _ in range(10)]
        with ThreadPoolExecutor(8) as clients:
            assert {status for status, _ in clients.map(lambda _: server.ask("POST", "/", IMAGE), range(40))} == {200}
        ends = [link.recv(12) for link in stalled]  # after the time limit
        assert ends == [b""] * 20 + [b"HTTP/1.1 408"] * 20
        for link in stalled:
            link.close()
    with served(digits(2)) as server:
        accepted = [server.send(head + IMAGE[:-1]) for _ in range(8)]
        while b"in_progress 9.0" not in server.ask("GET", "/metrics")[1]:  # with this one
            pass
        ended = threading.Thread(target=server.end)
        ended.start()
        for link in accepted:
            link.sendall(IMAGE[-1:])
        answers = [link.makefile("rb").read() for link in accepted]
        ended.join()
        assert [answer[:12] for answer in answers] == [b"HTTP/1.1 200"] * 8
        assert (server.process.returncode, all(b'"three"' in answer for answer in answers)) == (0, True)


def test_waiting_requests_run_together_and_too_many_are_refused() -> None:
    from swin_deploy.serving.batching import Classification, RefusedError, Workers

    entered, go = threading.Event(), threading.Event()

    def blocks(model: Any, requests: list[Any]) -> list[Any]:
        entered.set()
        go.wait()
        return requests

    workers, sizes = Workers(digits(2), ServeSpec(**RUN, workers=1, batch=4, queue=6)), list[int]()
    workers.observe = sizes.append
    with swin_deploy.load(digits(2), **RUN) as model:
        expected = [model.classify(image, top_k=1)[0][0] for image in (IMAGE, SEVEN)]
    first = workers.submit(blocks, None)
    entered.wait()
    waiting = [workers.submit(Classification(1), image) for image in (IMAGE, SEVEN, b"damaged", IMAGE, SEVEN)]
    cancelled = workers.submit(Classification(1), IMAGE)
    with pytest.raises(RefusedError, match="6 requests are waiting already"):
        workers.submit(Classification(1), IMAGE)
    assert cancelled.cancel()
    go.set()
    workers.close()
    assert (first.result(), sizes) == (None, [1, 4, 1])
    assert "not a valid image" in str(waiting.pop(2).exception())
    for request, one in zip(waiting, (*expected, *expected), strict=True):
        [found] = request.result()
        assert found["label"] == one.label
        assert found["score"] == pytest.approx(one.score, rel=1e-5)
    with pytest.raises(RefusedError, match="ending"):
        workers.submit(Classification(1), IMAGE)


def test_an_address_in_use_and_a_missing_bundle_are_errors(server: Served) -> None:
    refused(cli_here("serve", digits(2), "--port", server.port, cwd=Path()), "Cannot listen on 127.0.0.1")
    refused(cli_here("serve", "nothing", "--port", 0, cwd=Path()), "nothing")
    assert options_of(ServeSpec).keys() >= {"host", "port", "backend"}
