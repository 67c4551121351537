"""Add INT8 or FP8 graphs to a bundle."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swin_deploy.api.evaluate import evaluate_samples, targets_for
from swin_deploy.bundle import Bundle, sha256_of
from swin_deploy.errors import InputError, UsageError
from swin_deploy.option_parsers import BundlePath, bundle_keywords
from swin_deploy.options import TARGETS, EvaluateSpec, QuantSpec
from swin_deploy.qat_ranges import RANGES, QatRanges

if TYPE_CHECKING:
    from swin_deploy.calib.accuracy_gate import GateResult
    from swin_deploy.calib.data import Samples
    from swin_deploy.evaluation import Evaluation, Targets
    from swin_deploy.exporters.quantization.for_cpu import CpuLayout
    from swin_deploy.exporters.quantization.for_tensorrt import TensorRTLayout
    from swin_deploy.exporters.typed_graphs import NewGraph

_LOG = logging.getLogger(__name__)


@bundle_keywords(QuantSpec)
def quantize(bundle: BundlePath, spec: QuantSpec) -> Evaluation:
    """Write the INT8 or FP8 graphs of a bundle into it, and compare them with fp32 on the data.

    Activation ranges are measured on the data and kept in the bundle, so that an interrupted run resumes. QAT ranges that the
    checkpoint brought are used as they are; if they are complete, no data is needed, and nothing is compared. With `max_drop`,
    as few layers as possible stay in higher precision, the most sensitive ones first.

    Args:
        bundle: Folder of the bundle.
        {options}

    Returns:
        The agreement with fp32 on the data, one score for each graph.

    Raises:
        GateError: The graph is less accurate than `max_drop` or slower than `min_speedup` allows. The bundle stays as it was.
        InputError: The data, or the graph in `ranges`, cannot be used.
        UsageError: An option is invalid, a layer does not exist, or ranges are missing and there is no data.

    Example:
        >>> swin_deploy.quantize("swinv2-tiny", "calibration-images", precision="int8", max_drop=0.5)
    """
    from swin_deploy.calib.data import samples_for

    found = Bundle.open(bundle)
    spec = _resolved(found, spec)
    if spec.data is None:
        return _quantized(found, spec, None)
    skip = spec.on_error == "continue"
    data = samples_for(found, spec.data, spec.samples, spec.labels, skip)
    data = data.readable() if data.failures else replace(data, skip=False)
    try:
        return _quantized(found, spec, data)
    except InputError:  # look for images that cannot be read only if there is one: reading all takes a while
        readable = data.readable() if skip and not data.failures else data
        if len(readable) == len(data):
            raise
        _LOG.warning("%d of %d images cannot be read and are left out", len(data) - len(readable), len(data))
        return _quantized(found, spec, readable)


def quantization_run(bundle: BundlePath, spec: QuantSpec) -> tuple[Bundle, Samples, Any]:
    """Return a bundle, its samples, and the function that makes the layout of one of its fp32 graphs, with its samples."""
    from swin_deploy.calib.data import preparation_and_inputs, samples_for

    found = Bundle.open(bundle)
    spec = _resolved(found, spec)
    data = samples_for(found, spec.data, spec.samples)
    run = _Run(found, spec, data, *_qat_ranges(found, spec))

    def layout(source: str, model: Any, samples: Samples) -> tuple[TensorRTLayout | CpuLayout, Samples]:
        feeds = samples.with_size(*preparation_and_inputs(found, source))
        return run._layout(source, model, feeds), feeds

    return found, data, layout


def _quantized(found: Bundle, spec: QuantSpec, data: Samples | None) -> Evaluation:
    from swin_deploy.evaluation import Evaluation
    from swin_deploy.exporters.typed_graphs import with_graphs
    from swin_deploy.runtimes.backends import runtime_to_check

    run = _Run(found, spec, data, *_qat_ranges(found, spec))
    if data is None and run.ranges is None:
        raise UsageError(
            "Activation ranges are measured on images. Pass images like those of the application with --data, or a graph with "
            "Q/DQ of the same network with --ranges."
        )
    with found.compiling(lambda: _LOG.info("Waiting for another process that works on %s", found.path)) as found:
        run.bundle = found
        found = with_graphs(found, spec.precision, run.make, {"calibration": run.request()}, runtime_to_check)
        found = run.with_plots(found)
        if data is None:
            return Evaluation(0, None, "the fp32 graph", ())
        _LOG.info("Comparing with fp32 on the samples")
        options = EvaluateSpec(
            spec.data, ignore_labels=True, batch=spec.batch, precisions=spec.precision, progress=spec.progress
        )
        result = evaluate_samples(found, data, options)
        for score in result.scores:
            if score.precision == spec.precision:
                found = found.with_entry(score.file, {"on_samples": score.to_dict()})
    return result


def _resolved(bundle: Bundle, spec: QuantSpec) -> QuantSpec:
    """`spec` with the target of `bundle` if it names none. Raises UsageError for what the bundle or a GPU does not support."""
    from swin_deploy.exporters.typed_graphs import NO_CALIBRATION, refuse_opset

    exported_for = bundle.manifest.target
    spec = replace(spec, target=spec.target or exported_for)
    if (static := bundle.static_batch) is not None:
        if static > 1:
            raise UsageError(NO_CALIBRATION.format(bundle.path, static))
        spec = replace(spec, batch=1)
    refuse_opset(bundle, spec.precision, str(spec.target))
    if spec.target == TARGETS[0] != exported_for:
        raise UsageError(
            f"{bundle.path} was exported for {exported_for}, in a layout that TensorRT compiles to slow engines. Export it "
            f"with --target tensorrt, or quantize it for {exported_for}."
        )
    if spec.gpu is not None:
        from swin_deploy.exporters.engines.targets import has_fp8
        from swin_deploy.exporters.inspection.roofline import find_gpu

        if spec.target != TARGETS[0]:
            raise UsageError(f"--gpu is for bundles for TensorRT, and this one is quantized for {spec.target}. Leave it out.")
        if not has_fp8(find_gpu(spec.gpu).capability) and spec.precision == "fp8":
            raise UsageError(f"{spec.gpu} has no FP8, which needs sm_89 or later. Name a newer GPU with --gpu, or use int8.")
    return spec


def _qat_ranges(bundle: Bundle, spec: QuantSpec) -> tuple[QatRanges | None, str | None]:
    """The QAT ranges to use, and the sha256 of their file; None if all ranges are to be measured."""
    if spec.ranges is not None:
        from swin_deploy.exporters.quantization.qat_ranges_from_onnx import ranges_from_onnx

        return ranges_from_onnx(bundle, Path(spec.ranges)), sha256_of(Path(spec.ranges))
    if spec.ignore_ranges or RANGES not in bundle.files:
        return None, None
    return QatRanges.from_dict(bundle.read_json(RANGES)), bundle.files[RANGES].sha256


@dataclass
class _Run:
    """One call of `quantize`."""

    bundle: Bundle
    spec: QuantSpec
    data: Samples | None
    ranges: QatRanges | None
    ranges_sha256: str | None
    gates: dict[str, GateResult] = field(default_factory=dict)  # by the file of the fp32 graph

    def __post_init__(self) -> None:
        self.title = self.spec.precision.upper()
        self.targets: Targets | None = None
        if self.data is not None and self.spec.max_drop is not None:
            self.targets = targets_for(self.bundle, self.data, self.spec.ignore_labels)

    def request(self) -> dict[str, Any]:
        """The manifest entry by which a later call finds out whether it asks for the same graphs."""
        spec, data = self.spec, self.data
        asked: dict[str, Any] = {"target": spec.target, "method": spec.method, "keep": sorted(set(spec.keep))}
        asked |= {"samples": 0, "data": None} if data is None else {"samples": len(data), "data": data.fingerprint}
        if spec.target != TARGETS[0]:
            from swin_deploy.exporters.quantization.for_cpu import ALGORITHM

            asked["algorithm"] = ALGORITHM
        if self.ranges_sha256 is not None:
            asked["ranges"] = self.ranges_sha256
        if (spec.max_drop, spec.min_speedup) != (None, None):
            values = None if self.targets is None or self.targets.values is None else self.targets.values.tolist()
            labels = None if values is None else hashlib.sha256(json.dumps(values).encode()).hexdigest()
            asked |= {"max_drop": spec.max_drop, "min_speedup": spec.min_speedup, "labels": labels, "gpu": spec.gpu}
        return asked

    def make(self, source: str, model: Any) -> NewGraph:
        """Make the quantized graph of the fp32 graph `model`, the file `source` of the bundle."""
        from swin_deploy.calib.data import preparation_and_inputs

        spec = self.spec
        feeds = None if self.data is None else self.data.with_size(*preparation_and_inputs(self.bundle, source))
        layout = self._layout(source, model, feeds)
        if not layout.names:
            small = ", or too small to be faster in 8 bits" if spec.target == "openvino" else ""
            raise UsageError(
                f"Nothing is left to quantize for {spec.target}: all layers are kept{small}. Use the fp32 graph instead."
            )
        keep: frozenset[str] = frozenset()
        facts: dict[str, Any] = {}
        if feeds is not None and spec.max_drop is not None:
            self.gates[source] = gate = self._gate(model, layout, feeds, spec.max_drop)
            facts, keep = gate.to_dict(), gate.kept
        made = layout.graph(keep)
        if spec.min_speedup is not None:
            _LOG.info("Comparing the speed")
            speed = layout.speed(made.model, spec.gpu)
            speed.require(spec.min_speedup, self.title, len(keep), len(layout.names))
            _LOG.info("%.2f times as fast as %s (%s)", speed.ratio, speed.baseline, speed.where)
            facts["speed"] = speed.to_dict()
        return replace(made, facts={**made.facts, **facts})

    def _layout(self, source: str, model: Any, feeds: Samples | None) -> TensorRTLayout | CpuLayout:
        if self.spec.target == TARGETS[0]:
            from swin_deploy.exporters.quantization.for_tensorrt import TensorRTLayout

            return TensorRTLayout(self.bundle, source, model, self.spec, feeds, self.ranges)
        from swin_deploy.exporters.quantization.for_cpu import CpuLayout
        from swin_deploy.runtimes.backends import runtime_from_onnx

        open_graph = partial(runtime_from_onnx, backend=str(self.spec.target))
        return CpuLayout(self.bundle, source, model, self.spec, feeds, self.ranges, open_graph)

    def _gate(self, model: Any, layout: TensorRTLayout | CpuLayout, feeds: Samples, max_drop: float) -> GateResult:
        from swin_deploy.calib.accuracy_gate import AccuracyGate
        from swin_deploy.exporters.typed_graphs import opened_graph
        from swin_deploy.runtimes.backends import runtime_to_check

        batches, open_model = partial(feeds.batches, self.spec.batch), partial(opened_graph, runtime_to_check)
        size, progress = feeds.image_size, self.spec.progress
        assert self.targets is not None  # there are images and a limit
        rewrites = str(layout.check or AccuracyGate.rewrites)
        gate = AccuracyGate(model, batches, len(feeds), size, self.targets, open_model, progress, rewrites)
        return gate.select_layers(self.title, layout.names, lambda keep: layout.graph(keep).model, max_drop)

    def with_plots(self, bundle: Bundle) -> Bundle:
        """`bundle` with a plot of the sensitivity of the layers beside each graph, and without those of earlier graphs."""
        from swin_deploy.calib.accuracy_gate import sensitivity_svg

        for file, entry in list(bundle.graphs.items()):
            plot, drawn = file.removesuffix(".onnx") + ".sensitivity.svg", None
            gates = [gate for source, gate in self.gates.items() if bundle.files[source].sha256 == entry.parent]
            fresh = bool(gates) and entry.precision == self.spec.precision
            if fresh:
                drawn = sensitivity_svg(f"{bundle.name}, {self.title}, {file}", gates[0].ranking, gates[0].kept)
            if drawn is not None:
                bundle = bundle.with_file(plot, {"parent": entry.sha256}, drawn)
            elif plot in bundle.files and (fresh or entry.sensitivity is None):  # of an earlier graph
                bundle = bundle.without(plot)
        return bundle
