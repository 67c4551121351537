"""A bundle and images -> the same bundle with graphs in INT8 or FP8."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from swin_deploy.api.evaluate import evaluate
from swin_deploy.api.say import Say, silent

if TYPE_CHECKING:
    from swin_deploy.evaluation import Evaluation


def quantize(
    bundle: str | os.PathLike[str],
    data: str | os.PathLike[str] | Iterable[Any],
    *,
    quantization: str = "int8",
    method: str | None = None,
    samples: int | None = None,
    batch: int = 8,
    keep: Iterable[str] = (),
    say: Say = silent,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Writes the graphs of "int8" or "fp8" of a bundle into it, and returns how far they are from fp32 on the samples.

    `data`, of it `samples`, are images like those of the application (see `evaluate`), on which the ranges of activations
    are measured; these are kept in the bundle, and a measurement that was interrupted goes on. `method` is how a range is
    chosen, one of calib.ranges.METHODS; without it, the one with the least squared error. `keep` names layers that are not
    quantised. A bundle for TensorRT gets fp16 between the quantised layers, for `build_engine`; one for ONNX Runtime or
    OpenVINO fp32, and weights rounded so that each layer makes up for those before it. Raises errors.InputError for data
    that does not fit and errors.UsageError for a layer or method that there is not.
    """
    from swin_deploy.bundle import Bundle
    from swin_deploy.calib.collect import CACHE, collect
    from swin_deploy.calib.data import preparation, samples_for
    from swin_deploy.calib.forms import quantized_for
    from swin_deploy.calib.ranges import METHODS
    from swin_deploy.errors import UsageError
    from swin_deploy.exporters.graphs import NewGraph, config_and_task, with_graphs
    from swin_deploy.exporters.quantized import quantized_from_fp32, quantized_layers, refuse_unknown
    from swin_deploy.runtimes.backends import runtime_to_check
    from swin_deploy.specs import QUANTIZED, TARGETS

    found, kept = Bundle.open(bundle), frozenset(keep)
    target = str(found.manifest.get("target", TARGETS[0]))
    for what, given, known in (("quantisation", quantization, QUANTIZED), ("method", method or METHODS[0], METHODS)):
        if given not in known:
            raise UsageError(f'There is no {what} "{given}". There are: {", ".join(known)}.')
    if quantization == "fp8" and target != TARGETS[0]:
        raise UsageError(f"{found.path} was exported for {target}, which does not compute in FP8. Take int8.")
    chosen = samples_for(found, data, samples)
    (config, task), tell = config_and_task(found), progress or (lambda phase, done, total: None)

    def make(source: str, model: Any) -> NewGraph:
        feeds = chosen.with_size(*preparation(found, source))
        if target != TARGETS[0]:
            graph, done = quantized_for(target, model, lambda: feeds.batches(batch), method, kept, say)
            return NewGraph(graph, (), {"layers": done})
        layers = quantized_layers(model, config, quantization)
        refuse_unknown(layers, kept)
        seen = collect(
            found.path / source,
            [name for layer in layers for name in layer.inputs],
            feeds,
            batch=batch,
            cache=found.path / CACHE,
            progress=lambda done, total: tell("Measuring ranges", done, total),
        )
        amplitudes = {name: one.amplitude(method or "mse", quantization) for name, one in seen.items()}
        made, records = quantized_from_fp32(model, config, task, quantization, amplitudes, keep=kept)
        return NewGraph(made, records, {"amplitudes": amplitudes})

    with found.compiling(lambda: say(f"Waiting for another process that works on {found.path}")) as found:
        facts = {"samples": len(chosen), "data": chosen.fingerprint, "method": method, "keep": sorted(kept)}
        found = with_graphs(found, quantization, make, {"calibration": facts}, runtime_to_check, say)
        say("Comparing with fp32 on the samples")
        result = evaluate(
            found.path, chosen, labels="none", batch=batch, precisions=[quantization],
            progress=lambda done, total: tell("Comparing", done, total),
        )  # fmt: skip
        for score in result.scores:
            if score.precision == quantization:
                found = found.with_entry(score.file, {"on_samples": score.to_dict()})
    return result
