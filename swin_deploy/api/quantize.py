"""A bundle and images -> the same bundle with graphs in INT8 or FP8."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Set
from typing import TYPE_CHECKING, Any

from swin_deploy.api.evaluate import evaluate, wanted_classes
from swin_deploy.arguments import checked
from swin_deploy.exporters.quantization.recipes import CpuForm, Form, TensorRTForm, opened
from swin_deploy.specs import Say, silent

if TYPE_CHECKING:
    from swin_deploy.calib.accuracy_gate import LayerSensitivity
    from swin_deploy.evaluation import Evaluation

Progress = Callable[[str, int, int], None]


@checked
def quantize(
    bundle: str | os.PathLike[str],
    data: str | os.PathLike[str] | Iterable[Any] | None = None,
    *,
    quantization: str = "int8",
    target: str | None = None,
    method: str | None = None,
    samples: int | None = None,
    batch: int = 8,
    keep: Iterable[str] = (),
    max_drop: float | None = None,
    min_speedup: float | None = None,
    labels: str | os.PathLike[str] | None = None,
    gpu: str | None = None,
    ranges: str | os.PathLike[str] | None = None,
    say: Say = silent,
    progress: Progress | None = None,
) -> Evaluation:
    """Writes the graphs of "int8" or "fp8" of a bundle into it, and returns how far they are from fp32 on the samples.

    `data`, of it `samples`, are images like those of the application (see `evaluate`), on which the ranges of activations
    are measured; these are kept in the bundle, and a measurement that was interrupted goes on. `method` is how a range is
    chosen, one of calib.ranges.METHODS; without it, the one with the least squared error. `keep` names layers that are not
    quantised. `target` is what the graph is for, one of specs.TARGETS, by default what the bundle was exported for: for
    TensorRT, fp16 is between the quantised layers, for `build_engine`; for ONNX Runtime and OpenVINO fp32, and weights are
    rounded so that each layer makes up for those before it.

    `max_drop` is how much may be lost on the samples, in percentage points: of top-1 where their classes are known (`labels`
    as for `evaluate`), else of images classified otherwise than by fp32, else of relative L2. Layers are ranked by the damage
    that they do, and the fewest that it takes are left as they are. `min_speedup` is how many times as fast the graph must
    be: as the fp32 graph, measured on this machine, or, for TensorRT, as the fp16 graph, by the compiler's report and the
    roofline of `gpu` (see `inspect`). Raises errors.GateError when the graph cannot be both; the bundle is then as it was.

    Ranges that the bundle's checkpoint brought along are taken as they are, or those of `ranges`, an ONNX graph with Q/DQ of
    the same network; "none" stands for neither. Without `data` there must be all of them, and nothing is compared. Raises
    errors.InputError for data or a graph that does not fit and errors.UsageError for a layer or method that there is not, and
    for ranges that are missing.
    """
    from swin_deploy.bundle import Bundle
    from swin_deploy.calib.accuracy_gate import AccuracyGate, sensitivity_svg
    from swin_deploy.calib.calibrators import METHODS
    from swin_deploy.calib.collect import CACHE
    from swin_deploy.calib.data import preparation_and_inputs, samples_for
    from swin_deploy.errors import UsageError
    from swin_deploy.evaluation import Evaluation
    from swin_deploy.exporters.engines.targets import has_fp8
    from swin_deploy.exporters.inspection.roofline import find_gpu
    from swin_deploy.exporters.quantization.qat_layers import own_of
    from swin_deploy.exporters.quantization.qat_ranges_from_onnx import ranges_for
    from swin_deploy.exporters.typed_graphs import NewGraph, config_and_task, with_graphs
    from swin_deploy.files import bytes_writer
    from swin_deploy.runtimes.backends import runtime_to_check
    from swin_deploy.specs import QUANTIZED, TARGETS

    found, kept = Bundle.open(bundle), frozenset(keep)
    form_of_bundle, title = str(found.manifest.get("target", TARGETS[0])), quantization.upper()
    target = target or form_of_bundle
    for what, given, known in (
        ("quantisation", quantization, QUANTIZED), ("target", target, TARGETS), ("method", method or METHODS[0], METHODS)
    ):  # fmt: skip
        if given not in known:
            raise UsageError(f'There is no {what} "{given}". There are: {", ".join(known)}.')
    if quantization == "fp8" and target != TARGETS[0]:
        raise UsageError(f"The graph is for {target}, which does not compute in FP8. Take int8, or --target tensorrt.")
    if target == TARGETS[0] != form_of_bundle:
        raise UsageError(
            f"{found.path} was exported for {form_of_bundle}, in a form that TensorRT compiles badly. Export it with "
            f'"--target tensorrt", or quantise it for {form_of_bundle}.'
        )
    for what, number in (("--max-drop", max_drop), ("--min-speedup", min_speedup)):
        if number is not None and not 0 <= number < float("inf"):
            raise UsageError(f"{what} is {number}, and must be a number from 0 on.")
    if gpu is not None and (min_speedup is None or target != TARGETS[0]):
        raise UsageError("A GPU is named for the roofline of --min-speedup, of a bundle for TensorRT. Leave it out.")
    if gpu is not None and not has_fp8(find_gpu(gpu).capability) and quantization == "fp8":
        raise UsageError(f"{gpu} has no FP8, which came with sm_89. Name a newer GPU with --gpu, or take int8.")
    if data is None and (max_drop, min_speedup) != (None, None):
        raise UsageError("--max-drop and --min-speedup are judged on samples: name images with --data.")
    for what, value in (("--samples", samples), ("--labels", labels), ("--method", method)):
        if data is None and value is not None:
            raise UsageError(f"{what} is about the images of --data, and none are named. Name them, or leave {what} out.")
    chosen = None if data is None else samples_for(found, data, samples, None if labels == "none" else labels)
    classes, wanted, _ = (0, None, None) if chosen is None or max_drop is None else wanted_classes(found, chosen, labels)
    brought, fingerprint = ranges_for(found, ranges)
    if chosen is None and brought is None:
        raise UsageError(
            "Ranges are measured on images: name some like those of the application with --data, or a graph with Q/DQ of the "
            "same network with --ranges."
        )
    tell: Progress = progress or (lambda phase, done, total: None)
    rankings: dict[str, tuple[tuple[LayerSensitivity, ...], Set[str]]] = {}

    def make(source: str, model: Any) -> NewGraph:
        feeds = None if chosen is None else chosen.with_size(*preparation_and_inputs(found, source))
        if target == TARGETS[0]:
            form: Form = TensorRTForm(found, source, model, quantization, method, kept, feeds, batch, tell, brought)
        else:
            own = own_of(brought, model, config_and_task(found)[0])
            form = CpuForm(target, found.path / CACHE, model, method, kept, feeds, batch, say, own)
        if not form.names:
            small = ", or too small to be faster in 8 bits there" if target == "openvino" else ""
            raise UsageError(f"Nothing is left to quantise for {target}: all layers are kept{small}. Use the fp32 graph.")
        facts: dict[str, Any] = {}
        left = kept
        if max_drop is not None and feeds is not None:
            accuracy = AccuracyGate(
                model, lambda: feeds.batches(batch), len(feeds), feeds.image_size, wanted, classes, opened, tell
            )
            passed = accuracy.select_layers(title, form.names, lambda more: form.graph(kept | more)[0], max_drop)
            facts, left = passed.to_dict(), kept | passed.kept
            rankings[source] = (passed.ranking, passed.kept)
        graph, records, more = form.graph(left)
        if min_speedup is not None:
            say("Comparing the speed")
            speed = form.speed(graph, gpu)
            speed.require(min_speedup, title, len(set(form.names) & left), len(form.names))
            say(f"{speed.ratio:.2f} times as fast as {speed.baseline} ({speed.where})")
            facts = {**facts, "speed": speed.to_dict()}
        return NewGraph(graph, records, {**more, **facts})

    with found.compiling(lambda: say(f"Waiting for another process that works on {found.path}")) as found:
        count, data_sum = (0, None) if chosen is None else (len(chosen), chosen.fingerprint)
        asked = {"target": target, "samples": count, "data": data_sum, "method": method, "keep": sorted(kept)}
        if fingerprint is not None:
            asked["ranges"] = fingerprint
        gate: dict[str, Any] = {}
        if (max_drop, min_speedup) != (None, None):
            sums = None if wanted is None else hashlib.sha256(json.dumps(wanted).encode()).hexdigest()
            gate = {"max_drop": max_drop, "min_speedup": min_speedup, "labels": sums, "gpu": gpu}
        found = with_graphs(found, quantization, make, {"calibration": {**asked, **gate}}, runtime_to_check)
        for file, entry in list(found.graphs.items()):
            picture = file.removesuffix(".onnx") + ".sensitivity.svg"
            source = next((name for name in rankings if found.files[name]["sha256"] == entry.get("parent")), None)
            fresh = source is not None and entry["precision"] == quantization
            drawn = sensitivity_svg(f"{found.name}, {title}, {file}", *rankings[source]) if fresh and source else None
            if drawn is not None:
                found = found.with_file(picture, {"parent": entry["sha256"]}, bytes_writer(drawn))
            elif picture in found.files and (fresh or "sensitivity" not in entry):  # of the previous graph
                found = found.without(picture)
        if chosen is None:
            return Evaluation(0, None, "the fp32 graph", ())
        say("Comparing with fp32 on the samples")
        result = evaluate(
            found.path, chosen, labels="none", batch=batch, precisions=[quantization],
            progress=tell,
        )  # fmt: skip
        for score in result.scores:
            if score.precision == quantization:
                found = found.with_entry(score.file, {"on_samples": score.to_dict()})
    return result
