"""An HTTP service for a bundle. `swin-deploy serve` runs it with Uvicorn, and `app` is the same for Ray Serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from swin_deploy.errors import UsageError
from swin_deploy.option_parsers import BundlePath, bundle_keywords
from swin_deploy.options import ServeSpec

if TYPE_CHECKING:
    from fastapi import FastAPI


@bundle_keywords(ServeSpec)
def application(bundle: BundlePath, spec: ServeSpec) -> FastAPI:
    """Load a bundle and return the ASGI application that serves it, for a server of your own.

    The models are loaded by this call, and freed when the application ends. A server that starts several processes calls it in
    each of them.

    Args:
        bundle: Folder of the bundle.
        {options}

    Returns:
        The application. `host` and `port` have no effect on it.

    Raises:
        MissingDependencyError: The extra `serve` is not installed.
        BundleError: The folder is not a bundle, or a file in it is damaged.
        UsageError: The bundle does not have what was named, or the back end does not support it.
    """
    from swin_deploy.dependencies import require

    for module in ("fastapi", "python_multipart", "prometheus_client"):
        require(module, "serve a bundle")
    from .batching import Workers
    from .routes import routes

    return routes(Workers(bundle, spec))


def app(options: dict[str, str]) -> Any:
    """Return the application for Ray Serve: `serve run swin_deploy.serving:app bundle=swinv2-tiny`.

    Args:
        options: The path of the bundle as `bundle`, and options of `application`. Each replica has one worker by default.

    Returns:
        The application. The number of replicas, autoscaling and resources are options of the deployment `swin-deploy`.

    Raises:
        MissingDependencyError: The extra `ray` is not installed.
        UsageError: An option is invalid.
    """
    from .ray_serve import ray_application

    given = dict(options)
    if "bundle" not in given:
        raise UsageError("Ray Serve was given no bundle. Pass its path: serve run swin_deploy.serving:app bundle=PATH")
    return ray_application(given.pop("bundle"), given)
