"""A double of onnxruntime with CUDA on the simulated driver: it computes with the real ONNX Runtime, on the CPU, what is at the
addresses that were bound, when somebody waits for the stream that it was given.

It does what the documentation and the source of 1.31's CUDA provider say, and is strict: options that this does not have, two
runs at a time, addresses that are not the GPU's, and calls of the driver by other threads while it captures are violations.
"""

from __future__ import annotations

import ctypes
import math
import threading
import types
import weakref
from typing import Any

import numpy as np
import onnxruntime as real
from fake_driver import FakeDriver

NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bool)": np.bool_, "tensor(uint8)": np.uint8}
OPTIONS = {
    "CUDAExecutionProvider": {"device_id", "use_tf32", "enable_cuda_graph", "user_compute_stream"},
    "TensorrtExecutionProvider": {"device_id", "user_compute_stream"},
}
ENTRIES = {"disable_synchronize_execution_providers", "gpu_graph_id"}


class World:
    """What the tests set to go wrong, and read of what went on."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.opened: list[dict[str, Any]] = []  # the options of each provider of each session
        self.plain = self.captured = self.replayed = 0
        self.starts = True  # whether the provider finds CUDA's libraries
        self.graphs_allowed = True  # whether every node of the graph has a kernel on the GPU
        self.capture_fails = False
        self.stale = False  # whether a graph answers with something that it kept when it was captured
        self.hasty = False  # whether the GPU is done with what is in the stream before anybody waits for it
        self.fail = ""
        self.seconds_to_open = 0.0


class RunOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, name: str, value: str) -> None:
        assert name in ENTRIES, name
        self.entries[name] = value


class Binding:
    def __init__(self, device: int) -> None:
        self.device = device
        self.bound: dict[str, tuple[Any, tuple[int, ...], int]] = {}

    def bind_input(self, name: str, kind: str, number: int, dtype: Any, shape: tuple[int, ...], address: int) -> None:
        assert (kind, number) == ("cuda", self.device)
        self.bound[name] = (np.dtype(dtype), tuple(shape), address)

    bind_output = bind_input


class Session:
    def __init__(self, world: World, path: str, options: Any, providers: list[Any]) -> None:
        if world.fail:
            raise RuntimeError(world.fail)
        *gpu, last = providers
        assert last == "CPUExecutionProvider"
        given: dict[str, Any] = dict(gpu)
        for name, chosen in given.items():
            assert set(chosen) <= OPTIONS[name], f"{name} has no {set(chosen) - OPTIONS[name]}"
            assert all(isinstance(value, str) for value in chosen.values())
        world.opened.append(given)
        cuda = given["CUDAExecutionProvider"]
        self._world, self._stream, self._device = world, int(cuda["user_compute_stream"]), int(cuda["device_id"])
        assert options.use_deterministic_compute
        assert self._stream in world.driver.streams
        self._graphs = cuda.get("enable_cuda_graph") == "1"
        if self._graphs and not world.graphs_allowed:
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user")
        self._kept: dict[tuple[int, str], Any] = {}  # the graphs, for each thread its own
        threading.Event().wait(world.seconds_to_open)
        self._cpu = real.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._names = [[node.name for node in side] for side in (self._cpu.get_inputs(), self._cpu.get_outputs())]
        self._busy = threading.Lock()
        self._providers = [*given, last] if world.starts else [last]
        world.alive.add(self)
        weakref.finalize(self, _ended, world.driver, self._stream)

    def get_providers(self) -> list[str]:
        return self._providers

    def get_inputs(self) -> Any:
        return self._cpu.get_inputs()

    def get_outputs(self) -> Any:
        return self._cpu.get_outputs()

    def io_binding(self) -> Binding:
        return Binding(self._device)

    def run_with_iobinding(self, binding: Binding, options: RunOptions) -> None:
        world = self._world
        if not self._busy.acquire(blocking=False):
            world.driver.violations.append("two runs of a session at a time")
            return
        try:
            if world.fail:
                raise RuntimeError(world.fail)
            self._run(binding, options.entries)
        finally:
            self._busy.release()
        if options.entries.get("disable_synchronize_execution_providers") != "1" or world.hasty:
            self._flush()

    def _run(self, binding: Binding, entries: dict[str, str]) -> None:
        world, driver = self._world, self._world.driver
        graph = entries.get("gpu_graph_id", "0")
        assert self._graphs or "gpu_graph_id" not in entries
        key = (threading.get_ident(), graph)
        if not self._graphs or graph == "-1":
            world.plain += 1
            work = self._work(dict(binding.bound))
        elif key in self._kept:
            world.replayed += 1
            work = self._kept[key]
        else:
            self._flush()  # a run or two first, which allocate
            world.captured += 1
            driver.alone = threading.get_ident()
            threading.Event().wait(0.02)  # others would like to run
            if world.capture_fails:
                driver.streams[self._stream].capture = []  # it is left in the middle of it
                driver.alone = 0
                raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
            driver.alone = 0
            work = self._kept[key] = self._work(dict(binding.bound), world.stale)
        assert driver.enqueue(self._stream, work) == 0

    def _flush(self) -> None:
        self._world.driver.drain(self._world.driver.streams[self._stream])

    def _work(self, bound: dict[str, Any], stale: bool = False) -> Any:
        driver, cpu, (inputs, outputs) = self._world.driver, self._cpu, self._names

        def memory(name: str) -> np.ndarray:
            dtype, shape, address = bound[name]
            size = math.prod(shape) * dtype.itemsize
            if not driver.here(address, size, True):
                driver.violations.append(f"{name} is not in the GPU's memory")
            raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
            return raw.view(dtype).reshape(shape)

        # Nodes on the CPU read what is there when they are run, and do not wait for a stream that they do not know.
        early = None if self._world.graphs_allowed else {name: memory(name).copy() for name in inputs}

        def work() -> None:
            found = cpu.run(outputs, early or {name: memory(name) for name in inputs})
            for name, array in zip(outputs, found, strict=True):
                memory(name)[...] = array + 1 if stale else array

        return work


def _ended(driver: FakeDriver, stream: int) -> None:
    if stream in driver.streams and driver.capturing(stream):
        driver.violations.append("a session ended while it captured, and the process with it")


def module(driver: FakeDriver) -> Any:
    """onnxruntime, as it is where it has CUDA; `world` is for the tests."""
    made: Any = types.ModuleType("onnxruntime")
    made.world = World(driver)
    made.__version__ = "1.31.1"
    made.SessionOptions, made.RunOptions = real.SessionOptions, RunOptions
    made.get_available_providers = lambda: ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]

    def open_session(path: str, options: Any = None, providers: Any = None, enable_fallback: int = 1) -> Any:
        if providers == ["CPUExecutionProvider"]:
            return real.InferenceSession(path, options, providers=providers)
        assert enable_fallback == 0  # else a provider that fails is replaced with the CPU
        return Session(made.world, path, options, providers)

    def preload_dlls() -> None:
        if not made.world.starts:
            print("Failed to load libcudnn.so.9")

    made.InferenceSession, made.preload_dlls = open_session, preload_dlls
    return made
