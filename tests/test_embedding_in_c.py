"""examples/c/classify.c, compiled and run with both runtimes, answers as Python does."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cli.exported import EXAMPLES, WEIGHTS, exported_bundle
from PIL import Image

import swin_deploy

SIZE = (48, 64)


def folder_of(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        pytest.skip(f"{module} is not installed")
    return Path(spec.origin).parent


def flags(runtime: str, folder: Path) -> tuple[str, ...]:
    """The options of the compiler: where the header and the library of a runtime are."""
    if runtime == "openvino":
        place = folder_of("openvino")
        [library] = (place / "libs").glob("libopenvino_c.so*")
        return f"-I{place / 'include'}", str(library), f"-Wl,-rpath,{library.parent}"
    # The Python package has no header: ONNXRUNTIME_INCLUDE names its folder.
    header = Path(os.environ.get("ONNXRUNTIME_INCLUDE", "/usr/include/onnxruntime"))
    if not (header / "onnxruntime_c_api.h").exists():
        pytest.skip("onnxruntime_c_api.h is not installed (ONNXRUNTIME_INCLUDE)")
    [library] = (folder_of("onnxruntime") / "capi").glob("libonnxruntime.so.*")
    (folder / "libonnxruntime.so.1").symlink_to(library)  # the name that programs look for
    return "-DUSE_ONNXRUNTIME", f"-I{header}", str(library), f"-Wl,-rpath,{folder}"


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_the_c_program_answers_as_python(tmp_path: Path, runtime: str) -> None:
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    options = flags(runtime, tmp_path)
    bundle = exported_bundle("--weights", str(WEIGHTS[2]), "--embed-resize", "48x64", "--embed-postprocess", "top-k=3")
    command = [compiler, "-Wall", "-Wextra", "-Werror", "-o", "classify", str(EXAMPLES / "c/classify.c"), *options]
    subprocess.run(command, cwd=tmp_path, check=True)
    frames = []
    for path in sorted((EXAMPLES / "digits/images").glob("*.png")):
        frames.append(tmp_path / f"{path.stem}.ppm")
        Image.open(path).convert("RGB").resize(SIZE[::-1]).save(frames[-1])
    with swin_deploy.load(bundle, backend="onnxruntime", precision="fp32") as model:
        expected = [one for best in model.classify(frames, top_k=3) for one in best]
        labels = ["z" * 300, "", *model.labels[2:]]
    (tmp_path / "labels.txt").write_text("\n".join(labels))
    command = ["./classify", str(bundle / "onnx/model.onnx"), "labels.txt", *map(str, frames)]
    lines = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 30
    for line, best in zip(lines, expected, strict=True):
        score, _, label = line.partition(" ")
        assert label == labels[best.index][:255]
        assert float(score) == pytest.approx(best.score, abs=1e-5)
