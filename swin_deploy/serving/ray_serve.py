"""The application as a deployment of Ray Serve, on this machine or a cluster."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from swin_deploy.dependencies import require
from swin_deploy.errors import SwinDeployError, UsageError
from swin_deploy.option_parsers import BundlePath
from swin_deploy.options import ServeSpec

PURPOSE = "serve a bundle with Ray"


def ray_application(bundle: BundlePath, options: dict[str, Any]) -> Any:
    """Return an application of Ray Serve whose replicas each serve the bundle, with one worker unless stated otherwise."""
    serve = require("ray.serve", PURPOSE)
    options = {"workers": 1, **options}
    spec = ServeSpec(**options)
    path = os.fspath(bundle)

    def build() -> Any:
        from swin_deploy.serving import application

        return application(path, **options)

    actor = {"num_cpus": spec.workers, "num_gpus": int(spec.device.startswith("cuda"))}
    replica = serve.deployment(
        serve.ingress(build)(),
        name="swin-deploy",
        ray_actor_options=actor,
        max_ongoing_requests=spec.queue,
        graceful_shutdown_timeout_s=2 * spec.timeout,
    )
    return replica.bind()


def run_on_ray(
    address: str, bundle: BundlePath, spec: ServeSpec, options: dict[str, Any], ready: Callable[[str], None]
) -> None:
    """Deploy the application on a cluster and return; with the address "local", start one that ends at SIGINT or SIGTERM."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray, serve = require("ray", PURPOSE), require("ray.serve", PURPOSE)
    ended = threading.Event()
    try:
        ray.init(address=address, log_to_driver=False, namespace="serve")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"No Ray cluster answers at {address} ({str(error).splitlines()[0]}). Start one with ray start --head, or pass "
            f"local."
        ) from error
    try:
        serve.start(http_options={"host": spec.host, "port": spec.port})
        try:
            serve.run(ray_application(bundle, options))
        except RuntimeError as error:
            if address == "local":
                serve.shutdown()
            raise SwinDeployError(f"Ray Serve cannot deploy the bundle ({error}). Its own log has the reason.") from error
        if address == "local":
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, lambda *_: ended.set())
        ready(f"http://{spec.host}:{spec.port}")
        if address == "local":
            ended.wait()
            serve.delete("default")  # its replicas answer what they have accepted; the proxies that shutdown ends do not wait
            serve.shutdown()
    finally:
        ray.shutdown()
