"""TensorRT has one logger in a process: what it says reaches whoever is working with it, and nobody else."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from engine_graphs import SM89, attention, compiler_messages
from test_engine_from_onnx import python

from swin_deploy.exporters.engines.engine_from_onnx import engine_from_onnx
from swin_deploy.tensorrt_log import log_callback, logger_of

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is what speaks")

ONE_AFTER_THE_OTHER = """
from engine_graphs import SM89, compiler_messages, linear
from swin_deploy.exporters.engines.engine_from_onnx import engine_from_onnx
from swin_deploy.tensorrt_log import logger_of
import tensorrt_rtx as trt

said = [], []
for one in said:
    with compiler_messages() as messages:
        engine_from_onnx(linear().SerializeToString(), SM89)
    one.extend(messages)
before = [len(one) for one in said]
logger, ours = logger_of(trt)
ours.clear()
assert trt.Runtime(logger).deserialize_cuda_engine(b"no plan" * 100) is None
assert before == [len(one) for one in said]
print(*(text for one in said for severity, text in one if severity == "WARNING"))
print(sum("LayerType: " in text for _, text in said[0]), sum("LayerType: " in text for _, text in said[1]))
print(ours.sentence())
"""


def test_no_logger_is_ignored() -> None:
    """TensorRT warns of each that is not its first. Two compilers and a runtime, one after the other."""
    done = python(ONE_AFTER_THE_OTHER)
    assert done.returncode == 0, done.stderr
    warnings, layers, error = done.stdout.splitlines()
    assert warnings == ""
    assert layers == "1 1"
    assert "Serialization" in error


def test_who_works_at_the_same_time_hears_its_own() -> None:
    """While one thread compiles, a runtime fails in another."""
    logger, said = logger_of(trt)
    compiling, failed = threading.Event(), threading.Event()

    def progress(phase: str, step: int, steps: int) -> None:
        compiling.set()
        assert failed.wait(600)  # so that the failure falls into the compilation

    def fails() -> str:
        said.clear()
        assert compiling.wait(600)
        assert trt.Runtime(logger).deserialize_cuda_engine(b"no plan" * 100) is None
        failed.set()
        return said.sentence()

    with ThreadPoolExecutor(1) as pool, compiler_messages() as words:
        reason = pool.submit(fails)
        engine_from_onnx(attention().SerializeToString(), replace(SM89, progress=progress))
        assert "Serialization" in reason.result()
    assert not [text for level, text in words if level == "ERROR"]
    assert any(text.startswith("Layers:") for _, text in words)


def test_a_thread_of_tensorrts_own_is_heard_by_who_works() -> None:
    logger, said = logger_of(trt)
    words: list[tuple[str, str]] = []
    said.clear()
    with log_callback(trt, lambda *both: words.append(both)) as same:
        assert same is logger
        native = threading.Thread(target=logger.log, args=(trt.ILogger.Severity.ERROR, "from elsewhere"))
        native.start()
        native.join()
    logger.log(trt.ILogger.Severity.ERROR, "afterwards")
    assert words == [("error", "from elsewhere")]
    assert said.errors == ["afterwards"]
