"""Compare two graphs of one network, and name the first part that differs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from swin_deploy.option_parsers import BundlePath, bundle_keywords
from swin_deploy.options import COMPILERS, DiffSpec

if TYPE_CHECKING:
    from swin_deploy.diagnosis.comparison import Difference


@bundle_keywords(DiffSpec)
def diff(a: BundlePath, spec: DiffSpec) -> Difference:
    """Compare two graphs of one network part by part, and name the first part that differs and the likely cause.

    Each is a bundle, an ONNX file of any exporter, or a checkpoint: `BUNDLE`, `BUNDLE:int8`,
    `BUNDLE:int8@openvino`, `BUNDLE:fp16@tensorrt`, `FILE.onnx` or `FOLDER`. Graphs may differ in layout, types and exporter.
    They are aligned by their structure, and tokens are put into row-major order.

    Args:
        a: The network that is right.
        {options}

    Returns:
        The first difference that the types of the graphs do not explain, and the error at every point.

    Raises:
        UsageError: One of the two is not a Swin Transformer, or they take images of different sizes.

    Example:
        >>> swin_deploy.diff("swinv2-tiny", "swinv2-tiny:int8@openvino").first
    """
    from swin_deploy.diagnosis.comparison import compared
    from swin_deploy.diagnosis.sides import give_images, side_from

    sides = side_from(a), side_from(spec.b)
    give_images(sides, spec.data, spec.samples)
    found = compared(*sides)
    if sides[1].backend in COMPILERS:
        from swin_deploy.diagnosis.engine_side import with_fault_of_compiler

        found = with_fault_of_compiler(found, sides[1])
    if spec.polygraphy is not None:
        from swin_deploy.diagnosis.interchange import polygraphy_inputs, polygraphy_outputs, write_json

        folder = Path(spec.polygraphy)
        write_json(folder / "inputs.json", polygraphy_inputs(sides[1].feeds))
        for name, side in zip(("a", "b"), sides, strict=True):
            outputs = side.run([value.name for value in side.model.graph.output])
            write_json(folder / f"{name}.json", polygraphy_outputs(f"swin-deploy-{name}", outputs))
    return found
