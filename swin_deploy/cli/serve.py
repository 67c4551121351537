from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swin_deploy.cli.flags import given, spec_options
from swin_deploy.cli.output import console, json_option, print_json, stdout_kept_clean
from swin_deploy.options import ServeSpec


@click.command("serve")
@click.argument("bundle", type=click.Path(path_type=Path))
@spec_options(ServeSpec)
@json_option
def command(bundle: Path, as_json: bool, **options: Any) -> None:
    """Serve BUNDLE over HTTP.

    POST an image to / , open / in a browser, or send tensors by the Open Inference Protocol (KServe v2). The page /docs
    describes the routes. The URL is printed when the service is ready. SIGTERM and Ctrl-C end it with exit code 0, after the
    requests that it has accepted.
    """
    from swin_deploy.dependencies import require
    from swin_deploy.serving import application

    chosen = given(ServeSpec, options)
    spec = ServeSpec(**chosen)

    def ready(url: str) -> None:
        print_json({"url": url}) if as_json else click.echo(url)

    if spec.ray is not None:
        from swin_deploy.bundle import Bundle
        from swin_deploy.serving.ray_serve import run_on_ray

        with console():
            run_on_ray(spec.ray, Bundle.open(bundle, spec.trust).path.absolute(), spec, chosen, ready)
        return
    for module in ("uvicorn", "httptools"):
        require(module, "serve a bundle")
    from swin_deploy.serving.web_server import bound_socket, run_until_signal

    with console(), bound_socket(spec.host, spec.port) as listening:
        with stdout_kept_clean():
            app = application(bundle, **chosen)
        run_until_signal(app, listening, spec.timeout, ready)
