"""The parity certificate of a bundle: inputs, what fp32 PyTorch answered to them, and the check of a graph against it.

PyTorch's answers travel in the bundle (reference.npz), so that any machine can repeat the comparison without torch and
without the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from swin_deploy.bundle import REFERENCE, Bundle
from swin_deploy.compare import TOLERANCES, Agreement, compare
from swin_deploy.errors import BundleError
from swin_deploy.specs import PRECISIONS, TensorSpec, graph_file

SEED = 20210325  # the day of the first Swin paper; any number would do


class Runnable(Protocol):
    """What a runtime must be able to do to be checked (see runtimes/base.py)."""

    title: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]: ...


OpenGraph = Callable[[Path], AbstractContextManager[Runnable]]


@dataclass(frozen=True)
class Reference:
    """Inputs [samples, channels, height, width] and PyTorch's logits [samples, classes], both float32.

    `noise` is how far fp32 PyTorch itself is from float64 PyTorch (relative L2); 0 where that was not needed.
    """

    pixel_values: NDArray[np.float32]
    logits: NDArray[np.float32]
    noise: float = 0.0

    def tolerance(self, precision: str) -> float:
        """The relative L2 distance up to which a graph counts as verified: fixed, but not below 4 times the noise."""
        return max(TOLERANCES[precision], 4 * self.noise)

    def save(self, path: Path) -> None:
        """Writes reference.npz; the inputs fit into float16 without loss (see `sample_inputs`)."""
        with path.open("wb") as file:
            np.savez_compressed(
                file,
                pixel_values=self.pixel_values.astype(np.float16),
                logits=self.logits,
                noise=np.float64(self.noise),
            )

    @classmethod
    def load(cls, bundle: Bundle) -> Reference:
        """The certificate in `bundle`, checked against its sha256 first."""
        try:
            with np.load(bundle.verified_path(REFERENCE), allow_pickle=False) as arrays:
                return cls(arrays["pixel_values"].astype(np.float32), arrays["logits"], float(arrays["noise"]))
        except (KeyError, ValueError) as error:
            raise BundleError(f"{bundle.path / REFERENCE} cannot be read ({error}). Export the bundle again.") from error


@dataclass(frozen=True)
class Verdict:
    """How one graph of a bundle compares with PyTorch. `agreement` is over a batch of all samples and over each alone."""

    file: str
    precision: str
    backend: str
    agreement: Agreement
    tolerance: float

    @property
    def verified(self) -> bool:
        return self.agreement.within(self.tolerance)

    def to_dict(self) -> dict[str, Any]:
        """What the manifest keeps of it."""
        return {
            "verified": self.verified,
            "against": "PyTorch fp32",
            "backend": self.backend,
            "tolerance_relative_l2": self.tolerance,
            **self.agreement.to_dict(),
        }


def sample_inputs(channels: int, image_size: tuple[int, int], seed: int = SEED) -> NDArray[np.float32]:
    """Two images [2, channels, height, width] as the preprocessing would leave them: noise, and smooth blobs.

    Every value is a float16 value, so that the file in the bundle is half as large and loses nothing.
    """
    rng = np.random.default_rng(seed)
    height, width = image_size
    noise = rng.standard_normal((channels, height, width))
    coarse = rng.standard_normal((channels, 9, 9))
    rows, columns = np.linspace(0, 8, height), np.linspace(0, 8, width)
    smooth = _interpolate(_interpolate(coarse, rows, axis=1), columns, axis=2) * 1.5
    return np.stack([noise, smooth]).astype(np.float16).astype(np.float32)


def check_graph(reference: Reference, open_graph: OpenGraph, path: Path, file: str, precision: str) -> Verdict:
    """The verdict on the ONNX graph at `path`, run with all samples at once and with each alone."""
    with open_graph(path) as runtime:
        name, output = runtime.inputs[0].name, runtime.outputs[0].name
        together = runtime.run({name: reference.pixel_values})[output]
        alone = [runtime.run({name: sample[None]})[output] for sample in reference.pixel_values]
        backend = runtime.title
    agreement = compare(np.concatenate([together, *alone]), np.concatenate([reference.logits, reference.logits]))
    return Verdict(file, precision, backend, agreement, reference.tolerance(precision))


def verify_bundle(bundle: Bundle, open_graph: OpenGraph) -> tuple[Verdict, ...]:
    """A verdict on every ONNX graph of `bundle`, run here and now; every file's sha256 is checked first."""
    for file in bundle.files:
        bundle.verified_path(file)
    reference = Reference.load(bundle)
    graphs = [(graph_file(p), p) for p in PRECISIONS if graph_file(p) in bundle.files]
    return tuple(check_graph(reference, open_graph, bundle.path / file, file, p) for file, p in graphs)


def _interpolate(values: NDArray[Any], places: NDArray[Any], axis: int) -> NDArray[Any]:
    low = np.minimum(places.astype(int), values.shape[axis] - 2)
    part = np.moveaxis(values, axis, -1)
    weight = places - low
    return np.moveaxis(part[..., low] * (1 - weight) + part[..., low + 1] * weight, -1, axis)


def described(verdict: Mapping[str, Any] | None) -> str:
    """One phrase on a manifest's verdict: "verified (relative L2 3.1e-07)" or "not verified"."""
    if not verdict or not verdict.get("verified"):
        return "not verified"
    return f"verified (relative L2 {verdict['relative_l2']:.1e})"
