"""What doctor takes from this machine and from version numbers, against those who know."""

from __future__ import annotations

import os
import platform
from importlib.metadata import requires, version

import onnx
import pytest
from packaging.requirements import Requirement

from swin_deploy.dependencies import installed, installed_versions
from swin_deploy.doctor.checks import MICRO, PROBES
from swin_deploy.doctor.packages import STEPS, Step, requirements, traps, unusable, versions_for
from swin_deploy.machine import this_machine


def test_the_machine() -> None:
    machine = this_machine()
    assert (machine.cores, machine.python.split()[1]) == (os.cpu_count(), platform.python_version())
    if hasattr(os, "sysconf"):
        assert machine.memory is not None
        assert machine.memory <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert machine.free_memory is not None
        assert 0 < machine.free_memory < machine.memory


def test_the_oldest_versions_are_those_of_the_package() -> None:
    """Every requirement is of the one form that is read here, and read as packaging reads it."""
    wanted = {}
    for line in requires("swin-deploy") or ():
        one = Requirement(line)
        if one.name != "swin-deploy" and str(one.marker) != 'extra == "test"':
            [clause] = one.specifier
            assert clause.operator == ">="
            wanted[one.name.lower().replace("_", "-")] = clause.version
    assert requirements() == wanted


def test_nothing_here_is_too_old() -> None:
    found = installed_versions(requirements())
    assert found["numpy"] == version("numpy")
    assert traps(found, requirements(), (), gpu=False) == ()


@pytest.mark.parametrize(
    ("found", "torchvision", "gpu", "words", "command"),
    [
        (
            {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"},
            (),
            True,
            "both installed",
            'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "swin-deploy[gpu]"',
        ),
        (
            {"onnxruntime": "1.31.1"},
            (),
            True,
            "the build for CPUs",
            'pip uninstall -y onnxruntime && pip install "swin-deploy[gpu]"',
        ),
        (
            {"torch": "2.13.0+cpu", "torchvision": "0.27.0"},
            ("numpy", "torch==2.12.0", "pillow!=8.3.*,>=5.3.0"),
            False,
            "torchvision 0.27.0 is made for torch 2.12.0, and torch is 2.13.0+cpu",
            "pip install --upgrade torch torchvision",
        ),
        ({"onnx": "1.17.0"}, (), False, "onnx is 1.17.0, and 1.18 or newer", 'pip install --upgrade "onnx>=1.18"'),
        ({"tensorrt": "10.9.0.34"}, (), True, "tensorrt is 10.9.0.34", 'pip install --upgrade "tensorrt>=10.12"'),
    ],
)
def test_traps(found: dict[str, str], torchvision: tuple[str, ...], gpu: bool, words: str, command: str) -> None:
    [trap] = traps(found, requirements(), torchvision, gpu)
    assert words in trap.what
    assert trap.command == command


@pytest.mark.parametrize(
    ("found", "command"),
    [
        ({}, 'pip install "swin-deploy[export,onnxruntime]"'),
        ({"onnxruntime": "1.31.1"}, 'pip install "swin-deploy[export,onnxruntime]"'),
        ({"onnxruntime-gpu": "1.31.1"}, 'pip install "swin-deploy[export,gpu]"'),
    ],
)
def test_the_onnxruntime_that_is_there_stays(found: dict[str, str], command: str) -> None:
    finding = unusable(Step("quantize", ("not_a_module",), "export,onnxruntime"), False, found)
    assert finding is not None
    assert finding.command == command


def test_versions_that_fit_are_no_traps() -> None:
    fitting = {"torch": "2.13.0+cu130", "torchvision": "0.28.0", "onnx": "1.18", "tensorrt": "10.12.0.36"}
    assert traps(fitting, requirements(), ("torch==2.13.0",), gpu=True) == ()


def test_the_graph_that_is_tried_is_one() -> None:
    model = onnx.load_from_string(MICRO)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Relu"]


def test_every_step_is_tried() -> None:
    assert PROBES.keys() == {step.name for step in STEPS}
    for step in STEPS:
        if all(map(installed, step.modules)):
            assert versions_for(step)


@pytest.mark.parametrize("step", [step for step in STEPS if not step.needs_gpu and step.name != "export"], ids=lambda s: s.name)
def test_what_is_installed_here_works(step: Step) -> None:
    """The libraries that other tests run networks with must not be called broken."""
    for module in step.modules:
        if not installed(module):
            pytest.skip(f"{module} is not installed")
    assert PROBES[step.name]()
