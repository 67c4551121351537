"""`swin-deploy doctor` against what is installed here, and where something is missing."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from cli.exported import cli_without, copied, digits, result

from swin_deploy.gpus import cuda_devices
from swin_deploy.runtimes.backends import runtime_from_onnx

MAKERS = ("torch", "tensorrt_rtx", "huggingface_hub", "h5py")


def checks(found: Any) -> dict[str, Any]:
    return {check["name"]: check for check in found["checks"]}


def test_a_missing_library_comes_with_its_command(tmp_path: Path) -> None:
    """Without any library, every check names its command, and nothing can run a bundle."""
    done = cli_without((*MAKERS, "onnx", "onnxruntime", "openvino", "tensorrt", "psutil"), "doctor", "--json", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    done.returncode = 0
    found: Any = result(done)
    assert found["can_run"] is False
    assert found["machine"]["memory"] is None
    commands = {name: check["command"] for name, check in checks(found).items() if check["state"] == "not installed"}
    assert (
        commands.items()
        >= {
            "ONNX Runtime, CPU": 'pip install "swin-deploy[onnxruntime]"',
            "OpenVINO": 'pip install "swin-deploy[openvino]"',
            "TensorRT for RTX": 'pip install "swin-deploy[tensorrt-rtx]"',
            "export": 'pip install "swin-deploy[export]"',
            "quantize": 'pip install "swin-deploy[export,onnxruntime]"',
            "hub": 'pip install "swin-deploy[hub]"',
            "TensorFlow checkpoints": 'pip install "swin-deploy[tensorflow]"',
        }.items()
    )
    if not cuda_devices():
        assert {checks(found)[name]["state"] for name in ("ONNX Runtime, CUDA", "TensorRT")} == {"needs a GPU"}
        assert found["gpus"] == []


def test_an_edge_device_and_a_bundle(tmp_path: Path) -> None:
    """Without torch and onnx: what is installed works, and the bundle's graphs run where their back ends run them."""
    done = cli_without((*MAKERS, "onnx"), "doctor", digits(2), "--json", cwd=tmp_path)
    found: Any = result(done)
    assert found["swin_deploy"] == version("swin-deploy")
    runs = {(run["backend"], run["precision"]): run for run in found["runs"]}
    for name, backend in (("ONNX Runtime, CPU", "onnxruntime"), ("OpenVINO", "openvino")):
        try:
            wanted = version(backend)
        except PackageNotFoundError:
            continue
        assert checks(found)[name]["state"] == "works"
        assert checks(found)[name]["versions"] == {backend: wanted}
        for precision, file in (("fp32", "onnx/model.onnx"), ("fp16", "onnx/model_fp16.onnx")):
            runtime_from_onnx(digits(2) / file, backend).close()  # it really does
            assert runs[backend, precision]["works"], runs[backend, precision]["message"]
            assert wanted in runs[backend, precision]["message"]
    assert found["can_run"] is True


def test_the_table(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    copied(2, tmp_path / "b")
    with (tmp_path / "b/reference.npz").open("ab") as file:
        file.write(b"x")
    done = cli_without((*MAKERS, "onnx", "openvino"), "doctor", "b", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("Problem: ") and "sha256" in line] == ["b/reference.npz"]
    assert any(line.split()[:5] == ["onnx/model.onnx", "onnxruntime", "fp32", "yes", "onnxruntime"] for line in lines if line)
    assert any(line.split()[:3] == ["-", "openvino", "-"] and "cannot import" in line for line in lines)
    assert any(line.startswith("ONNX Runtime, CPU") and version("onnxruntime") in line for line in lines)
    assert any(line.split()[0] == "OpenVINO" and 'pip install "swin-deploy[openvino]"' in line for line in lines if line)
