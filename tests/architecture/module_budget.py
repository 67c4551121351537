"""Report which modules each verb enters. Run: python tests/architecture/module_budget.py [VERB ...]

A module is entered when one of its functions is called; loading a module is not counted. The verbs run in one process on
a Swin V2 of one block.
"""

from __future__ import annotations

import ast
import builtins
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Most modules that a verb may enter.
LIMITS = {"export": 30, "load": 15, "classify": 7, "build-engine": 28, "quantize": 36}


ENTERED: set[str] = set()
_LOADING = [0]  # modules of the package that are being loaded


def _entered(module: str) -> None:
    if not _LOADING[0]:
        ENTERED.add(module)


class _Loader(SourceFileLoader):
    """Adds to each function a call that records its module. A trace of all calls would take much longer."""

    def get_code(self, fullname: str) -> CodeType:
        path = Path(self.path)
        tree = ast.parse(path.read_bytes())
        module = ast.Constant(path.relative_to(ROOT).with_suffix("").as_posix())
        call = ast.Expr(ast.Call(ast.Name(_entered.__name__, ast.Load()), [module], []))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                node.body.insert(0 if ast.get_docstring(node, clean=False) is None else 1, call)
        return compile(ast.fix_missing_locations(tree), path, "exec")

    def exec_module(self, module: ModuleType) -> None:
        _LOADING[0] += 1
        try:
            super().exec_module(module)
        finally:
            _LOADING[0] -= 1


class _Finder:
    """Gives the modules of the package this loader."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] != "swin_deploy":
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((one for one in found if one is not None), None)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(name, str(Path(spec.loader.path).resolve()))
        return spec


def record() -> None:
    """Record which modules are entered from now on. None of the package may be loaded yet."""
    vars(builtins)[_entered.__name__] = _entered
    sys.meta_path.insert(0, _Finder())


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
        ENTERED.clear()
        run()
        print(f"{verb} took {time.perf_counter() - start:.1f} s", file=sys.stderr)
        yield verb, set(ENTERED)


def main() -> int:
    """Print the modules per verb and return 1 if a verb enters more than its limit."""
    code = 0
    record()
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
