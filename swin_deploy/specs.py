"""Small frozen values that several layers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PRECISIONS = ("fp32", "fp16")


@dataclass(frozen=True)
class TensorSpec:
    """A named input or output: numpy dtype name, and a shape whose free axes are names (`("batch", 3, 224, 224)`)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> TensorSpec:
        return cls(str(raw["name"]), str(raw["dtype"]), tuple(raw["shape"]))

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(str(size) for size in self.shape)}]"


def graph_file(precision: str) -> str:
    """Where a bundle keeps the ONNX graph of `precision`."""
    return "onnx/model.onnx" if precision == "fp32" else f"onnx/model_{precision}.onnx"
