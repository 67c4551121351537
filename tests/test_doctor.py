"""What doctor finds out about this machine and about versions, against independent sources."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import requires, version

import onnx
import pytest
from packaging.requirements import Requirement

from swin_deploy.dependencies import installed, installed_versions
from swin_deploy.doctor.checks import CHECKS, MICRO, Check, cannot_try
from swin_deploy.doctor.packages import known_faults, minimum_versions, version_conflicts, versions_of
from swin_deploy.machine import this_machine


def test_the_machine() -> None:
    pytest.importorskip("psutil", reason="it knows the memory")
    machine = this_machine()
    assert (machine.cores, machine.python.split()[1]) == (os.cpu_count(), platform.python_version())
    assert 1 <= machine.usable_cores <= machine.cores
    assert machine.memory is not None
    assert machine.free_memory is not None
    if hasattr(os, "sysconf"):
        assert machine.memory <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < machine.free_memory < machine.memory


def test_the_processor_on_a_system_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = pytest.importorskip("cpuinfo", reason="py-cpuinfo is not installed")
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: {"brand_raw": "Apple M9", "flags": ["asimddp", "bf16", "x"]})
    machine = this_machine()
    assert str(machine).startswith("Apple M9, ")
    assert machine.features == ("NEON dot product", "bf16")


def test_the_minimum_versions_are_those_of_the_package() -> None:
    """Every requirement has the one form that is read here, and packaging reads the same from it."""
    wanted = {}
    for line in requires("swin-deploy") or ():
        one = Requirement(line)
        if one.name != "swin-deploy" and str(one.marker) not in ('extra == "test"', 'extra == "docs"'):
            [clause] = one.specifier
            assert clause.operator == ">="
            wanted[one.name.lower().replace("_", "-")] = clause.version
    assert minimum_versions() == wanted


def test_no_installed_version_is_too_old() -> None:
    found = installed_versions(minimum_versions())
    assert found["numpy"] == version("numpy")
    assert version_conflicts(found, minimum_versions(), (), gpu=False) == ()


@pytest.mark.parametrize(
    ("found", "torchvision", "gpu", "words", "command"),
    [
        ({"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}, (), True, "both installed",
         'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "swin-deploy[gpu]"'),
        ({"onnxruntime": "1.31.1"}, (), True, "the CPU build",
         'pip uninstall -y onnxruntime && pip install "swin-deploy[gpu]"'),
        ({"torch": "2.13.0+cpu", "torchvision": "0.27.0"}, ("numpy", "torch==2.12.0", "pillow!=8.3.*,>=5.3.0"), False,
         "torchvision 0.27.0 needs torch 2.12.0, and torch 2.13.0+cpu is installed",
         "pip install --upgrade torch torchvision"),
        ({"onnx": "1.17.0"}, (), False, "onnx 1.17.0 is too old; 1.18 or newer", 'pip install --upgrade "onnx>=1.18"'),
        ({"tensorrt": "10.2.0"}, (), True, "tensorrt 10.2.0", 'pip install --upgrade "tensorrt>=10.3"'),
    ],
)  # fmt: skip
def test_known_version_conflicts(
    found: dict[str, str], torchvision: tuple[str, ...], gpu: bool, words: str, command: str
) -> None:
    [conflict] = version_conflicts(found, minimum_versions(), torchvision, gpu)
    assert words in conflict.problem
    assert conflict.command == command


@pytest.mark.parametrize(
    ("release", "gpu", "issues"),
    [("10.3.0", "sm_87", ["4723"]), ("10.5.0.18", "sm_87", []), ("10.16.1.11", "sm_120", ["4837"]), ("11.4.0.106", "sm_90", []),
     ("10.4.0.26", "sm_120", ["4723", "4837"])],
)  # fmt: skip
def test_known_faults_of_tensorrt(release: str, gpu: str, issues: list[str]) -> None:
    found = known_faults(release, [gpu])
    assert [re.findall(r"\d{4}", fault.problem)[0] for fault in found] == issues
    assert all("no-fused-attention" in fault.command for fault in found if "4837" in fault.problem)


def test_versions_that_fit_do_not_conflict() -> None:
    fitting = {"torch": "2.13.0+cu130", "torchvision": "0.28.0", "onnx": "1.18", "tensorrt": "10.3.0"}
    assert version_conflicts(fitting, minimum_versions(), ("torch==2.13.0",), gpu=True) == ()


@pytest.mark.parametrize(
    ("versions", "command"),
    [
        ({}, 'pip install "swin-deploy[export,onnxruntime]"'),
        ({"onnxruntime": "1.31.1"}, 'pip install "swin-deploy[export,onnxruntime]"'),
        ({"onnxruntime-gpu": "1.31.1"}, 'pip install "swin-deploy[export,gpu]"'),
    ],
)
def test_the_installed_onnxruntime_stays(versions: dict[str, str], command: str) -> None:
    result = cannot_try(Check("quantize", ("not_a_module",), "export,onnxruntime", str), False, versions)
    assert result is not None
    assert result.command == command


def test_the_graph_that_is_tried_is_valid() -> None:
    model = onnx.load_from_string(MICRO)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Relu"]


@pytest.mark.parametrize("check", [one for one in CHECKS if not one.needs_gpu], ids=lambda one: one.name)
def test_installed_libraries_work(check: Check) -> None:
    """The libraries that other tests run networks with must not be called broken."""
    for module in check.modules:
        if not installed(module):
            pytest.skip(f"{module} is not installed")
    assert versions_of(check.modules)
    assert check.probe()
