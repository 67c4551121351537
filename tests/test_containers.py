"""The Dockerfiles, by a linter; the manifests of Kubernetes and KServe, by their schemas."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from swin_deploy.cli import cli

ROOT = Path(__file__).resolve().parents[1]
DOCKER, KUBERNETES = ROOT / "examples/docker", ROOT / "examples/kubernetes"
# Fields that KServe 0.21 (the model V1beta1PredictorSpec of its Python SDK) adds to those of a pod, without those of objects.
KSERVE = {
    **dict.fromkeys(
        ("canaryTrafficPercent", "containerConcurrency", "maxReplicas", "minReplicas", "scaleTarget", "timeout"), int
    ),
    **dict.fromkeys(("name", "scaleMetric", "scaleMetricType", "storageContainerName"), str),
}
NEWEST, OLDEST = "1.37", "1.30"


def test_the_linter_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    files = sorted(DOCKER.glob("*Dockerfile"))
    assert len(files) == 3
    done = subprocess.run([hadolint, *files], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_build_context_has_what_is_copied() -> None:
    """All packages of the distribution, and nothing that the ignore file leaves out."""
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    copied = {name for line in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE) for name in line.split()}
    kept = {
        line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines() if line[0] == "!"
    }
    tops = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert copied == kept == tops | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}


def documents(name: str) -> list[Any]:
    yaml = pytest.importorskip("yaml", reason="reads the manifests")
    return list(yaml.safe_load_all((KUBERNETES / name).read_text(encoding="utf-8")))


@pytest.mark.parametrize("release", [OLDEST, NEWEST])
def test_the_manifests_fit_kubernetes(release: str) -> None:
    check = pytest.importorskip("kubernetes_validate", reason="it has the schemas").validate
    found = documents("serve.yaml")
    assert [one["kind"] for one in found] == ["Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"]
    for one in found:
        check(one, release, strict=True)
    deployment, service, scaler, budget = (one["spec"] for one in found)
    labels = deployment["template"]["metadata"]["labels"]
    assert labels == deployment["selector"]["matchLabels"] == service["selector"] == budget["selector"]["matchLabels"]
    assert scaler["scaleTargetRef"]["name"] == found[0]["metadata"]["name"]
    del deployment["selector"]
    with pytest.raises(Exception, match="'selector' is a required property"):
        check(found[0], release, strict=True)


def test_the_inference_service_fits_kserve() -> None:
    check = pytest.importorskip("kubernetes_validate", reason="it has the schemas").validate
    [service] = documents("inferenceservice.yaml")
    assert (service["apiVersion"], service["kind"], list(service["spec"])) == (
        "serving.kserve.io/v1beta1", "InferenceService", ["predictor"],
    )  # fmt: skip
    predictor = service["spec"]["predictor"]
    own = {key: predictor.pop(key) for key in KSERVE if key in predictor}
    assert {key: type(value) for key, value in own.items()} == {key: KSERVE[key] for key in own}
    check({"apiVersion": "v1", "kind": "Pod", "metadata": service["metadata"], "spec": predictor}, NEWEST, strict=True)
    assert predictor["containers"][0]["name"] == "kserve-container"


def test_the_image_installs_and_runs_what_exists() -> None:
    text, project = (DOCKER / "Dockerfile").read_text(encoding="utf-8"), (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    [extras] = re.findall(r'"\.\[(.+)\]"', text)
    [backend] = re.findall(r"^ARG BACKEND=(.+)$", text, re.MULTILINE)
    assert [name for name in extras.replace("${BACKEND}", backend).split(",") if f"\n{name} = [" not in project] == []
    [command] = re.findall(r"^CMD (\[.+\])$", text, re.MULTILINE)
    verb, *arguments = json.loads(command)
    found = cli.get_command(click.Context(cli), verb)
    assert found is not None
    assert str(found.make_context(verb, arguments).params["bundle"]) == "/bundle"


@pytest.mark.parametrize("name", ["serve.yaml", "inferenceservice.yaml"])
def test_both_run_the_image_alike(name: str) -> None:
    """As the user of the image, with the options and the port of its command."""
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    spec = documents(name)[0]["spec"]
    pod = spec["predictor"] if "predictor" in spec else spec["template"]["spec"]
    [container] = pod["containers"]
    [command] = re.findall(r"^CMD (\[.+\])$", text, re.MULTILINE)
    assert container["args"] == ["serve", container["args"][1], *json.loads(command)[2:]]
    assert f"USER {pod['securityContext']['runAsUser']}\n" in text
    assert f"EXPOSE {container['ports'][0]['containerPort']}\n" in text
