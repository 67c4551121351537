"""Measure what "auto" selects, and store it in the bundle for other machines of the same kind."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from swin_deploy.option_parsers import BundlePath, bundle_keywords
from swin_deploy.options import LoadSpec, TuneSpec

if TYPE_CHECKING:
    from swin_deploy.runtimes.autoselect import Description

_LOG = logging.getLogger(__name__)


@bundle_keywords(TuneSpec)
def tune(bundle: BundlePath, spec: TuneSpec) -> tuple[Description, ...]:
    """Measure which back end, device and precision runs a bundle fastest, and store the result in its manifest.

    `load` then selects from these measurements, without a measurement of its own, on machines with the same processor, cores,
    GPUs, CUDA version and back end versions. A bundle can hold measurements of several kinds of machines. A new measurement
    replaces the one of the same kind.

    Args:
        bundle: Folder of the bundle.
        {options}

    Returns:
        What `load` now selects for each number of threads, and why.

    Raises:
        BundleError: The folder is not a bundle, cannot be written, or a file in it is damaged.
        UsageError: The bundle does not have what was named, or the back end does not support it.
        BackendError: No candidate runs and agrees with PyTorch.

    Example:
        >>> print(*swin_deploy.tune("swinv2-tiny"), sep="\n")
    """
    from swin_deploy.bundle import Bundle
    from swin_deploy.runtimes.model_from_bundle import model_from_bundle

    Bundle.open(bundle, spec.trust).refuse_read_only()
    named, found = {name: getattr(spec, name) for name in ("backend", "precision", "device", "trust")}, list[Any]()
    for threads in dict.fromkeys(spec.threads):
        with model_from_bundle(bundle, LoadSpec(**named, threads=threads), tune=True) as model:
            found.append(model.describe())
    if found[0].measured:
        _LOG.info("Stored the measurement of %d candidates in %s", len(found[0].measured), bundle)
    else:
        _LOG.info("There is only one candidate, so nothing was measured or stored")
    return tuple(found)
