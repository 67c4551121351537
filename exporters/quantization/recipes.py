"""The two ways to a quantised graph: in the form for TensorRT, and in those for runtimes on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from swin_deploy.files import scratch_folder

if TYPE_CHECKING:
    from swin_deploy.bundle import Bundle
    from swin_deploy.calib.accuracy_gate import SpeedComparison
    from swin_deploy.calib.data import Samples
    from swin_deploy.exporters.passes import PassRecord
    from swin_deploy.qat_ranges import Ranges

    from .qat_layers import Own

ROUNDED_BY = 512  # samples at most; more change a weight's rounding little
CALIBRATED_BY = 256  # the same for a CPU, where every layer looks at what all samples make of those before
Made = tuple[Any, tuple["PassRecord", ...], dict[str, Any]]  # a graph, how it was made, and what else a manifest should know


class Form(Protocol):
    """One fp32 graph that was calibrated: `names` are the layers that may be quantised."""

    names: tuple[str, ...]

    def graph(self, keep: Set[str]) -> Made:
        """The quantised graph; the layers `keep` stay as they were."""

    def speed(self, model: Any, gpu: str | None) -> SpeedComparison:
        """How many times as fast `model`, one that `graph` made, is as what one would use instead of it."""


class TensorRTForm:
    """Ranges and moments are measured once; graphs with fp16 between the quantised layers are made of them."""

    def __init__(
        self,
        bundle: Bundle,
        source: str,
        model: Any,
        quantization: str,
        method: str | None,
        keep: Set[str],
        feeds: Samples | None,
        batch: int,
        tell: Callable[[str, int, int], None],
        ranges: Ranges | None,
    ) -> None:
        from swin_deploy.calib.collect import CACHE, collect
        from swin_deploy.calib.data import evenly_spread
        from swin_deploy.exporters.typed_graphs import config_and_task
        from swin_deploy.qat_ranges import lacking

        from .for_tensorrt import quantized_layers, refuse_unknown
        from .gptq import Repaired, balanced, input_moments
        from .qat_layers import own_layers
        from .qdq import linear_layers

        self._model, self._quantization = model, quantization
        self._config, self._task = config_and_task(bundle)
        layers = quantized_layers(model, self._config, quantization)
        refuse_unknown(layers, keep)
        self._layers = [layer for layer in layers if layer.name not in keep]
        self.names = tuple(layer.name for layer in self._layers)
        self._own = own_layers(ranges, layers, model, self._config, quantization)
        self._amplitudes = dict(self._own.amplitudes)
        self._rounding: Repaired | None = None
        # Where there are samples, all are measured: it is one pass, and its observations serve other options as well.
        missing = [name for layer in self._layers for name in layer.inputs if name not in self._amplitudes]
        if not missing:
            return
        if feeds is None:
            raise lacking(missing, self._own.source)
        file = bundle.path / source
        if ranges is None:  # else the weights were trained to be rounded to the nearest, and the channels as they are
            read = {layer.name: layer.input for layer in linear_layers(model) if layer.name in self.names}
            few = replace(feeds, chosen=evenly_spread(feeds.chosen, ROUNDED_BY))
            self._model, moments = balanced(model, input_moments(file, read, _told(few, batch, tell)))
            self._rounding = Repaired(moments, quantization)
        seen = collect(
            file if ranges is not None else self._model,
            [name for layer in layers for name in layer.inputs],
            feeds,
            batch=batch,
            cache=bundle.path / CACHE,
            progress=tell,
        )
        measured = {name: one.compute_amax(method or "mse", quantization) for name, one in seen.items()}
        self._amplitudes = {**measured, **self._amplitudes}

    def graph(self, keep: Set[str]) -> Made:
        from .for_tensorrt import quantized_from_fp32

        made, records = quantized_from_fp32(
            _copy(self._model), self._config, self._task, self._quantization, self._amplitudes,
            weight_scales={name: steps for name, steps in self._own.steps.items() if name not in keep}, keep=keep,
            rounding=self._rounding,
        )  # fmt: skip
        layers = self._own.records(layer for layer in self._layers if layer.name not in keep)
        return made, records, {"amplitudes": self._amplitudes, "layers": layers}

    def speed(self, model: Any, gpu: str | None) -> SpeedComparison:
        """By the roofline of `gpu`, from the compiler's report of both graphs."""
        from swin_deploy.calib.accuracy_gate import SpeedComparison
        from swin_deploy.errors import UsageError
        from swin_deploy.exporters.inspection.costs import inspect_onnx
        from swin_deploy.exporters.precision import typed_from_fp32

        fp16 = typed_from_fp32(_copy(self._model), self._config, self._task, "fp16", None).model
        seconds, where = [], ""
        for graph in (fp16, model):
            with _file(graph) as path:
                cost = inspect_onnx(path, gpu, 1, "auto").engines[0]
            if cost.roofline is None:
                raise UsageError(
                    f"The published peaks of a {cost.gpu} GPU are not known, and so not what {self._quantization} gains there. "
                    f"Name another one with --gpu, such as rtx-4090, or leave out --min-speedup."
                )
            where = f"roofline of {cost.roofline.gpu}, from the compiler's report"
            seconds.append(cost.roofline.seconds)
        before, after = seconds
        return SpeedComparison(where, "fp16", before, after, before / after)


class CpuForm:
    """The network is quantised once, layer after layer; graphs with fewer quantised layers leave some of them out."""

    def __init__(
        self,
        target: str,
        folder: Path,
        model: Any,
        method: str | None,
        keep: Set[str],
        feeds: Samples | None,
        batch: int,
        say: Callable[[str], None],
        own: Own,
    ) -> None:
        """What is done is kept in `folder` until all is, unless the network has ranges of its `own`."""
        from swin_deploy.calib.data import evenly_spread
        from swin_deploy.dependencies import require

        from .for_cpu import quantized_for
        from .qat_layers import Own
        from .resume import Stopped

        stopped = None
        if feeds is not None:
            few = replace(feeds, chosen=evenly_spread(feeds.chosen, CALIBRATED_BY))
            if len(few) < len(feeds):
                say(f"Calibrating with {len(few)} of the {len(feeds)} samples, evenly spread")
            if own == Own():
                release = require("onnxruntime", "quantise a model").__version__
                facts = (target, method, sorted(keep), batch, release, few.fingerprint)
                stopped = Stopped.of(folder, model, *facts)
            feeds = few
        self._model, self._target, self._feeds = model, target, feeds
        batches = None if feeds is None else lambda: feeds.batches(batch)
        self._made = quantized_for(target, model, batches, method, keep, say, own, stopped)
        self.names = self._made.names

    def graph(self, keep: Set[str]) -> Made:
        used = {} if self._feeds is None else {"calibrated_with": len(self._feeds)}
        return self._made.graph(keep), (), {"layers": self._made.records(keep), **used}

    def speed(self, model: Any, gpu: str | None) -> SpeedComparison:
        """Measured on this machine, one image at a time, in the runtime that the bundle is for."""
        from swin_deploy.calib.accuracy_gate import compare_speed
        from swin_deploy.runtimes.backends import runtime_from_onnx

        assert self._feeds is not None
        feed = next(self._feeds.batches(1))
        with _file(self._model) as before, _file(model) as after:
            return compare_speed(
                lambda: runtime_from_onnx(before, self._target), lambda: runtime_from_onnx(after, self._target), feed, "fp32"
            )


def _told(samples: Samples, batch: int, tell: Callable[[str, int, int], None]) -> Iterator[dict[str, Any]]:
    """The batches of `samples`, with word of each."""
    done = 0
    for feeds in samples.batches(batch):
        yield feeds
        done += len(next(iter(feeds.values())))
        tell("Measuring channels", done, len(samples))


@contextlib.contextmanager
def opened(model: Any) -> Iterator[Any]:
    """A runtime with the graph `model`, types that it has no kernels for emulated."""
    from swin_deploy.runtimes.backends import runtime_to_check

    with _file(model) as path, runtime_to_check(path) as runtime:
        yield runtime


@contextlib.contextmanager
def _file(model: Any) -> Iterator[Path]:
    with scratch_folder("quantize") as folder:
        path = folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
        yield path


def _copy(model: Any) -> Any:
    copy = type(model)()
    copy.CopyFrom(model)
    return copy
