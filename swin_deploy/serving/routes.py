"""The application: its routes, its limits and its metrics. Uvicorn and Ray Serve run the same one."""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import swin_deploy
from swin_deploy.errors import InputError, SwinDeployError
from swin_deploy.files import json_from
from swin_deploy.option_parsers import whole

from .batching import Classification, Features, RefusedError, Tensors, Work, Workers, failure_of, refuse_image
from .tensor_protocol import BINARY, HEADER, read_request, tensor_metadata, written_response

RAW = ("", "application/octet-stream", "binary/octet-stream")
JSON, FORM = "application/json", "multipart/form-data"
NOT_FETCHED = "This service does not fetch images from addresses"
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; connect-src 'self'"
)
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LINGER = 1.0
SIZES = (1, 2, 4, 8, 16, 32)
Handler = Callable[[Request], Awaitable[Response]]


def routes(workers: Workers) -> FastAPI:
    """Return the application that serves the models of `workers`, which it closes when it ends."""
    model, spec, name = workers.model, workers.spec, workers.model.bundle.name

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(workers.close)

    app = FastAPI(title=f"swin-deploy: {name}", version=swin_deploy.__version__, lifespan=lifespan)
    metrics = _Metrics(workers)
    app.add_middleware(_Observed, metrics=metrics, seconds=3 * spec.timeout)

    async def answered(work: Work, content: Any) -> Any:
        """Return the answer of the workers to one request."""
        future = asyncio.wrap_future(workers.submit(work, content))
        try:
            return await asyncio.wait_for(future, spec.timeout)
        except asyncio.TimeoutError:
            raise RefusedError(503, f"The request was not answered within {spec.timeout:g} seconds. Send it again.") from None

    async def page(request: Request) -> Response:
        head = files("swin_deploy").joinpath("page_head.html").read_text("utf-8").replace("{{name}}", _escaped(name))
        text = files(__package__).joinpath("page.html").read_text("utf-8").replace("{{head}}\n", head)
        return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_POLICY})

    async def predict(request: Request) -> Response:
        body = await _body(request, spec.max_body, spec.timeout)
        top_k = request.query_params.get("top_k", "5")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == FORM:
            image = await _form_image(request, body)
        elif kind == JSON:
            image, top_k = _json_image(body, top_k)
        elif kind in RAW or kind.startswith("image/"):
            image = body
        else:
            raise RefusedError(415, f"The content type is not supported. Send an image as {RAW[1]}, image/*, {FORM} or {JSON}.")
        if model.task.name == "masked-image-modeling":
            raise RefusedError(422, f"This model reconstructs masked images. Send tensors to /v2/models/{name}/infer.")
        refuse_image(image, spec.max_pixels)
        if model.task.name == "image-classification" and model.config.has_classes:
            return JSONResponse(await answered(Classification(whole(1)("top_k", top_k)), image))
        if model.task.name == "image-classification":
            raise RefusedError(422, f"This model has no classes. Send tensors to /v2/models/{name}/infer.")
        found = await answered(Features(), image)
        return JSONResponse({output: array.tolist() for output, array in found.items()})

    async def infer(request: Request) -> Response:
        check_name(request)
        body = await _body(request, spec.max_body, spec.timeout)
        try:
            given = read_request(body, request.headers.get(HEADER))
            if given.outputs and (missing := given.outputs.keys() - {output.name for output in model.outputs}):
                raise InputError(f'The model has no output "{min(missing)}".')
            arrays = await answered(Tensors(), given.feeds)
            content, headers = written_response(given, name, arrays)
        except InputError as error:
            raise RefusedError(400, str(error)) from error
        return Response(content, headers=headers)

    def check_name(request: Request) -> None:
        asked, version = request.path_params["model"], request.path_params.get("version", "1")
        if asked != name or version != "1":
            raise RefusedError(404, f'There is no such model. This service has "{name}", version 1.')

    async def server_metadata(request: Request) -> Response:
        return JSONResponse({"name": "swin-deploy", "version": swin_deploy.__version__, "extensions": [BINARY]})

    async def model_metadata(request: Request) -> Response:
        check_name(request)
        about = model.describe()
        kinds = {"inputs": model.inputs, "outputs": model.outputs}
        tensors = {kind: [tensor_metadata(one) for one in specs] for kind, specs in kinds.items()}
        return JSONResponse({"name": name, "versions": ["1"], "platform": f"{about.backend}_{about.precision}", **tensors})

    async def model_ready(request: Request) -> Response:
        check_name(request)
        return JSONResponse({"name": name, "ready": True})

    async def live(request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(request: Request) -> Response:
        return JSONResponse({"ready": True})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def prometheus(request: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    tables: list[tuple[str, str, Handler, str, dict[str, Any]]] = [
        ("GET", "/health", health, "Whether the service answers", {}),
        ("GET", "/metrics", prometheus, "Metrics for Prometheus", {}),
        ("POST", "/", predict, "Classify an image, or compute its features", _PREDICT),
        ("GET", "/v2", server_metadata, "Name, version and extensions of the server", {}),
        ("GET", "/v2/health/live", live, "Whether the server is alive", {}),
        ("GET", "/v2/health/ready", ready, "Whether the server answers requests", {}),
    ]
    for version in ("", "/versions/{version}"):
        path = "/v2/models/{model}" + version
        tables += [
            ("GET", path, model_metadata, "Inputs and outputs of the model", _parameters(path)),
            ("GET", path + "/ready", model_ready, "Whether the model answers requests", _parameters(path)),
            ("POST", path + "/infer", infer, "Run the model on tensors", {**_parameters(path), **_INFER}),
        ]
    for method, path, handler, summary, extra in tables:
        named = f"{handler.__name__} {path}"
        app.add_api_route(
            path, handler, methods=[method], summary=summary, openapi_extra=extra, response_model=None, operation_id=named
        )
    app.add_api_route("/", page, methods=["GET"], include_in_schema=False, response_model=None)
    for kind in (SwinDeployError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _failed)
    return app


async def _failed(request: Request, error: Exception) -> Response:
    """Answer with the sentence of an error. The connection is closed if a part of the body may be left unread."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": f"{error.detail}."}, error.status_code, headers=error.headers)
    if isinstance(error, ClientDisconnect):
        return JSONResponse({"error": "The client ended the connection."}, 400)
    failure = failure_of(error)
    headers = {"Retry-After": "1"} if failure.status == 503 else {}
    if failure.status in (408, 413):
        headers["Connection"] = "close"
    return JSONResponse({"error": str(failure)}, failure.status, headers=headers)


async def _body(request: Request, most: int, seconds: float) -> bytes:
    """Return the body of a request, of at most so many bytes and received within so many seconds.

    The rest of a body that is too large is read for a second: a client that still sends would not see the answer.
    """
    length = request.headers.get("content-length", "0")
    too_large, content = length.isdigit() and int(length[:20]) > most, bytearray()
    try:
        with anyio.fail_after(LINGER if too_large else seconds) as scope:
            async for part in request.stream():
                content += b"" if too_large else part
                if len(content) > most:
                    too_large, scope.deadline = True, anyio.current_time() + LINGER
                    content.clear()
    except TimeoutError:
        if not too_large:
            raise RefusedError(408, f"The body was not received within {seconds:g} seconds. Send it again.") from None
    if too_large:
        raise RefusedError(413, f"The body has more than {most} bytes. Send a smaller image, or raise --max-body.")
    if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
        raise RefusedError(415, f"The content encoding {encoding} is not supported. Send the body without one.")
    return bytes(content)


async def _form_image(request: Request, body: bytes) -> bytes:
    """Return the first file of a form."""

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        parser = MultiPartParser(request.headers, stream(), max_files=1, max_fields=8, max_part_size=1 << 16)
        parser.spool_max_size = len(body) + 1  # in memory
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise RefusedError(422, f"The form is invalid ({error}). Send multipart/form-data with one file.") from error
    for value in form.values():
        if isinstance(value, UploadFile):
            return await value.read()
    raise RefusedError(422, "The form has no file. Send the image as a file: curl -F image=@photo.jpg ...")


def _json_image(body: bytes, top_k: str) -> tuple[bytes, Any]:
    """Return the image and the number of classes of {"inputs": base64, "parameters": {"top_k": 5}}."""
    raw = json_from(body, "The request", advice='Send {"inputs": "<base64>"}.')
    if not isinstance(raw, dict) or (unknown := raw.keys() - {"inputs", "parameters"}):
        what = f"{NOT_FETCHED}" if isinstance(raw, dict) and {"url", "image_url"} & unknown else "The request has unknown keys"
        what = what if isinstance(raw, dict) else "The request is not a JSON object"
        raise RefusedError(422, f'{what}. Send {{"inputs": "<base64>"}} with the contents of the image file.')
    image, parameters = raw.get("inputs"), raw.get("parameters") or {}
    if not isinstance(image, str):
        raise RefusedError(422, 'The request has no "inputs". Send the contents of the image file in base64.')
    if image[:8].lower().startswith(("http:/", "https:/", "file:/", "data:")):
        raise RefusedError(422, f'{NOT_FETCHED}. Send {{"inputs": "<base64>"}} with the contents of the image file.')
    if not isinstance(parameters, dict) or parameters.keys() - {"top_k"}:
        raise RefusedError(422, 'The request has parameters that are not supported. Expected at most {"top_k": 5}.')
    try:
        return base64.b64decode(image, validate=True), parameters.get("top_k", top_k)
    except (binascii.Error, ValueError):
        raise RefusedError(422, 'The "inputs" are not base64. Send the contents of the image file in base64.') from None


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


class _Metrics:
    """What /metrics shows."""

    def __init__(self, workers: Workers) -> None:
        self._registry = own = CollectorRegistry()
        names = ["route", "status"]
        self.requests = Counter("swin_deploy_requests", "Answered requests", names, registry=own)
        self.seconds = Histogram("swin_deploy_request_seconds", "Time to answer", names[:1], buckets=BUCKETS, registry=own)
        workers.observe = Histogram("swin_deploy_batch_size", "Requests run together", buckets=SIZES, registry=own).observe
        self.running = Gauge("swin_deploy_requests_in_progress", "Requests that are not yet answered", registry=own)
        waiting = Gauge("swin_deploy_queue_length", "Requests that wait for a worker", registry=own)
        waiting.set_function(lambda: workers.waiting)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Observed:
    """Middleware: counts and times requests, and ends those that take longer, such as those of clients that do not read."""

    def __init__(self, app: ASGIApp, metrics: _Metrics, seconds: float) -> None:
        self._app, self._metrics, self._seconds = app, metrics, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 499

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.running.inc()
        try:
            with anyio.move_on_after(self._seconds):
                await self._app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.running.dec()
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - start)


# What the page /docs shows.
_BINARY_BODY = {"schema": {"type": "string", "format": "binary"}}
_PREDICT = {
    "parameters": [
        {"name": "top_k", "in": "query", "description": "Number of classes", "schema": {"type": "integer", "default": 5}}
    ],
    "requestBody": {
        "required": True,
        "content": {
            "image/*": _BINARY_BODY,
            "application/octet-stream": _BINARY_BODY,
            FORM: {"schema": {"type": "object", "properties": {"image": {"type": "string", "format": "binary"}}}},
            JSON: {
                "schema": {
                    "type": "object",
                    "required": ["inputs"],
                    "properties": {
                        "inputs": {"type": "string", "format": "byte", "description": "The image file in base64"},
                        "parameters": {"type": "object", "properties": {"top_k": {"type": "integer"}}},
                    },
                }
            },
        },
    },
}
_INFER = {"requestBody": {"required": True, "content": {JSON: {"schema": {"type": "object"}}}}}


def _parameters(path: str) -> dict[str, Any]:
    names = [name for name in ("model", "version") if f"{{{name}}}" in path]
    return {"parameters": [{"name": one, "in": "path", "required": True, "schema": {"type": "string"}} for one in names]}
