"""Report which modules each verb enters. Run: python tests/architecture/module_budget.py [VERB ...]

A module is entered when one of its functions is called; loading a module is not counted. The verbs run in one process on
a Swin V2 of one block.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("swin_deploy", "exporters", "runtimes", "calib")
# Most modules that a verb may enter.
LIMITS = {"export": 30, "load": 15, "classify": 7, "build-engine": 28, "quantize": 36}


def _module_of(file: str) -> str | None:
    """Return the path of one of the package's modules inside the checkout, without its suffix; None for other files."""
    path = Path(file)
    if not path.is_relative_to(ROOT) or path.relative_to(ROOT).parts[0] not in FOLDERS:
        return None
    return path.relative_to(ROOT).with_suffix("").as_posix()


def _loads_a_module(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "<module>" and _module_of(frame.f_code.co_filename):
            return True
        frame = frame.f_back
    return False


@contextmanager
def traced() -> Iterator[set[str]]:
    """Collect the modules of the package that are entered inside the block, in any thread."""
    entered: set[str] = set()
    modules: dict[str, str | None] = {}

    def called(frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if file not in modules:
            modules[file] = _module_of(file)
        module = modules[file]
        if module is not None and module not in entered and not _loads_a_module(frame):
            entered.add(module)

    threading.settrace(called)
    sys.settrace(called)
    try:
        yield entered
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]


def entered_modules(folder: Path) -> Iterator[tuple[str, set[str]]]:
    """Run the five verbs in `folder` and yield each with the modules that it entered."""
    from safetensors.torch import save_file

    from swin_deploy import build_engine, export, load, quantize
    from swin_deploy.config import SwinConfig
    from swin_deploy.models.checkpoints import random_checkpoint
    from swin_deploy.tasks import TaskSpec

    config = SwinConfig(version=2, image_size=(32, 32), embed_dim=32, depths=(1,), num_heads=(2,), window_size=(4,))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(dict(random_checkpoint(config, TaskSpec()).tensors), folder / "model.safetensors")
    bundle, images = folder / "bundle", ROOT / "examples/digits/images"
    model: Any = None

    def open_model() -> None:
        nonlocal model
        model = load(bundle, backend="onnxruntime", device="cpu")

    steps: dict[str, Callable[[], object]] = {
        "export": lambda: export(weights=folder, output=bundle),
        "load": open_model,
        "classify": lambda: model.classify(images / "3.png"),
        "build-engine": lambda: build_engine(bundle, precision="fp16", gpus=("sm_89",)),
        "quantize": lambda: quantize(bundle, images),
    }
    for verb, run in steps.items():
        start = time.perf_counter()
        with traced() as entered:
            run()
        print(f"{verb} took {time.perf_counter() - start:.1f} s", file=sys.stderr)
        yield verb, entered


def main() -> int:
    """Print the modules per verb and return 1 if a verb enters more than its limit."""
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        for verb, entered in entered_modules(Path(folder)):
            over = len(entered) > LIMITS[verb]
            code |= over
            if not sys.argv[1:] or verb in sys.argv[1:]:
                print(f"{verb}: {len(entered)} modules, limit {LIMITS[verb]}{', OVER' if over else ''}")
                print("".join(f"  {module}\n" for module in sorted(entered)), end="")
    return code


if __name__ == "__main__":
    sys.exit(main())
