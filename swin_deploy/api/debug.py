"""Find the layers that cost a quantized graph its accuracy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Set
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swin_deploy.option_parsers import BundlePath, bundle_keywords
from swin_deploy.options import DebugSpec, QuantSpec

if TYPE_CHECKING:
    from swin_deploy.calib.accuracy_gate import LayerSensitivity

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PutBack:
    """The layers that stay in higher precision, and the relative L2 errors before and after; `layers` is their number in all.

    `reached` is whether the error is within the bound.
    """

    kept: tuple[str, ...]
    layers: int
    before: float
    after: float
    bound: float
    ranking: tuple[LayerSensitivity, ...]
    written: str | None = None

    @property
    def reached(self) -> bool:
        return self.after <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        figures = {name: value if isfinite(value) else None for name in ("before", "after") for value in [getattr(self, name)]}
        facts = {"kept": list(self.kept), "reached": self.reached, "ranking": [layer.to_dict() for layer in self.ranking]}
        return {**{key: value for key, value in asdict(self).items() if key not in ("kept", "ranking")}, **facts, **figures}


@bundle_keywords(DebugSpec)
def debug(bundle: BundlePath, spec: DebugSpec) -> PutBack:
    """Find the fewest layers that must stay in higher precision, so that a quantized graph is within a bound of fp32.

    The layers are quantized as `quantize` does it, with the same images. They are put back in the order of their sensitivity
    until the bound holds, by bisection. Then each is tried without, so that none is put back in vain.

    Args:
        bundle: Folder of the bundle.
        {options}

    Returns:
        The layers, and the error before and after.

    Raises:
        InputError: The images cannot be used.
        UsageError: An option is invalid, or nothing can be quantized.

    Example:
        >>> swin_deploy.debug("swinv2-tiny", "calibration-images", bound=0.02).kept
    """
    from swin_deploy.api.quantize import quantization_run
    from swin_deploy.calib.accuracy_gate import fewest_fp32_layers, rank_layers
    from swin_deploy.exporters.typed_graphs import opened_graph, with_shapes
    from swin_deploy.parity import compare
    from swin_deploy.runtimes.backends import runtime_to_check

    options = QuantSpec(spec.data, precision=spec.precision, target=spec.target, samples=spec.samples, progress=spec.progress)
    found, samples, layout_of = quantization_run(bundle, options)
    source = next(iter(found.graphs_of("fp32")))
    model = with_shapes(found.verified_path(source))
    del model.metadata_props[:]
    layout, feeds = layout_of(source, model, samples)
    batch = next(feeds.batches(min(len(feeds), 16)))
    wanted = _outputs(partial(opened_graph, runtime_to_check), model, batch)

    def outputs(keep: Set[str]) -> dict[str, Any]:
        return _outputs(partial(opened_graph, runtime_to_check), layout.graph(frozenset(keep)).model, batch)

    def loss(keep: Set[str]) -> float:
        made = outputs(keep)
        return max(compare(made[name], wanted[name]).relative_l2 for name in wanted)

    import numpy as np

    before = loss(frozenset())
    _LOG.info("Ranking the layers by sensitivity")
    ranking = rank_layers(
        layout.names, lambda keep: np.concatenate([one.ravel() for one in outputs(keep).values()]), spec.progress
    )
    kept, after = fewest_fp32_layers(ranking, loss, spec.bound)
    if after <= spec.bound:
        kept, after = _without_needless(kept, after, [layer.name for layer in reversed(ranking)], loss, spec.bound)
    written = None
    if spec.output is not None and len(kept) < len(layout.names):
        from swin_deploy.bundle import disk_errors

        with disk_errors(Path(spec.output)):
            Path(spec.output).write_bytes(layout.graph(kept).model.SerializeToString())
        written = str(spec.output)
    return PutBack(tuple(sorted(kept)), len(layout.names), before, after, spec.bound, ranking, written)


def _outputs(open_model: Callable[[Any], Any], model: Any, feeds: Any) -> dict[str, Any]:
    with open_model(model) as runtime:
        return dict(runtime.run(feeds))


def _without_needless(
    kept: frozenset[str], after: float, order: list[str], loss: Callable[[Set[str]], float], bound: float
) -> tuple[frozenset[str], float]:
    """Quantize each layer of `kept` again, the least sensitive first, if the bound still holds."""
    for name in order:
        if name in kept and (found := loss(kept - {name})) <= bound:
            kept, after = kept - {name}, found
    return kept, after
