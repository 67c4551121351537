"""Tests that need a device are skipped where there is none, and every skip is listed at the end with its reason.

SWIN_DEPLOY_REQUIRE=cuda,tensorrt turns the skips of tests with these markers into failures, on a machine that is meant to run
them all. A test that cannot apply to the machine at all (`not_applicable`) is listed as well, and never fails.

`pytest -n 3` runs the tests in several processes. What is expensive to make and only read they make once (once.py).
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Generator
from pathlib import Path

# Before torch is imported, and for the commands that tests start: networks this small only lose by more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import once
import pytest
from applicable import NOT_APPLICABLE


@functools.cache
def no_cuda() -> str | None:
    """Why tests marked `cuda` cannot run here; None where they can. The driver is asked: torch may be a CPU build."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "no CUDA device: the NVIDIA driver is not installed"
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "no CUDA device: the NVIDIA driver finds none"
    return None


@functools.cache
def no_tensorrt() -> str | None:
    """Why tests marked `tensorrt` cannot run here; None where they can."""
    if importlib.util.find_spec("tensorrt") is None:
        return 'TensorRT is not installed (pip install "swin-deploy[tensorrt]")'
    return no_cuda()


MISSING = {"cuda": no_cuda, "tensorrt": no_tensorrt}


def required() -> set[str]:
    return {name.strip() for name in os.environ.get("SWIN_DEPLOY_REQUIRE", "").split(",")} - {""}


def is_worker(config: pytest.Config) -> bool:
    """Whether this is one of the processes that `pytest -n` starts."""
    return hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    try:
        installed = importlib.util.find_spec("swin_deploy.exporters") is not None
    except ModuleNotFoundError:
        installed = False
    if not installed:
        pytest.exit('swin-deploy is not installed here. Run: make test, or: pip install -e ".[test]"', returncode=2)
    if unknown := required() - MISSING.keys():
        raise pytest.UsageError(f"SWIN_DEPLOY_REQUIRE names {sorted(unknown)}; it takes: {', '.join(MISSING)}.")
    if not is_worker(config):
        os.environ[once.FOLDER] = tempfile.mkdtemp(prefix="swin-deploy-tests-")  # the workers inherit it
        os.environ["XDG_CACHE_HOME"] = str(Path(os.environ[once.FOLDER]) / "cache")  # what "auto" measures


def pytest_unconfigure(config: pytest.Config) -> None:
    if not is_worker(config) and (folder := os.environ.pop(once.FOLDER, None)):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def every_graph_is_checked() -> Generator[None]:
    """Check the structure of the graphs that the tests write, as of those from elsewhere: a new operator must be allowed."""
    from swin_deploy.bundle import Bundle, recorded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Bundle,
            "_known",
            lambda self, file: not self.graphs[file].outputs or all(recorded("checked", key) for key in self._keys(file)),
        )
        yield


def pytest_collection_finish(session: pytest.Session) -> None:
    """Collect garbage less often: hundreds of thousands of objects live as long as the process."""
    if "torch" in sys.modules:
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, missing in MISSING.items():
        if item.get_closest_marker(marker) and (reason := missing()):
            pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    markers = sorted(name for name in required() if item.get_closest_marker(name))
    if item.get_closest_marker("tensorrt"):  # a machine with a GPU need not have TensorRT
        markers = [name for name in markers if name == "tensorrt"]
    skipped = report.skipped and not hasattr(report, "wasxfail") and not skip_reason(report).startswith(NOT_APPLICABLE)
    if markers and skipped:
        report.outcome = "failed"
        report.longrepr = f"SWIN_DEPLOY_REQUIRE={','.join(markers)}, and this test was skipped: {skip_reason(report)}"
    return report


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = Counter(skip_reason(report) for report in terminalreporter.stats.get("skipped", ()))
    if counts:
        terminalreporter.section("NOT EXERCISED")
        for reason, count in counts.most_common():
            terminalreporter.write_line(f"{count:5d}  {reason}")
