"""`swin_deploy.serving:app` on a local Ray Serve, from the example configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.request import Request, urlopen

import pytest
from cli.exported import EXAMPLES, digits
from serving.service import IMAGE, RUN

import swin_deploy
from swin_deploy.errors import UsageError
from swin_deploy.serving import app

pytestmark = pytest.mark.filterwarnings("ignore")  # those of Ray


def test_an_application_without_a_bundle_is_refused() -> None:
    with pytest.raises(UsageError, match="bundle=PATH"):
        app({"workers": "1"})


@pytest.fixture
def serve() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="Ray Serve is not installed (extra ray)")
    serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed (extra ray)")
    ray.init(address="local", num_cpus=2, log_to_driver=False)
    yield serve
    serve.shutdown()
    ray.shutdown()


def test_replicas_answer_as_classify(serve: Any) -> None:
    import yaml
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.parse_obj(yaml.safe_load((EXAMPLES / "ray/serve.yaml").read_text()))
    [application] = config.applications
    assert application.import_path == "swin_deploy.serving:app"
    serve.start(http_options={"host": "127.0.0.1", "port": 8123})
    serve.run(app({**application.args, **RUN, "bundle": str(digits(2))}))
    with urlopen(Request("http://127.0.0.1:8123/?top_k=2", IMAGE, {"Content-Type": "image/png"})) as answer:
        found = json.load(answer)
    with swin_deploy.load(digits(2), **RUN) as model:
        assert found == [{"label": one.label, "score": one.score} for one in model.classify(IMAGE, top_k=2)[0]]
