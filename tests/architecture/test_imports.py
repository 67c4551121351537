"""Which module may import which, what an edge device imports, and that names are unique."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from cli.exported import digits

import swin_deploy

ROOT = Path(__file__).resolve().parents[2]
TOP_FOLDERS = ("calib", "exporters", "runtimes")
HEAVY = (
    "torch",
    "onnx",
    "onnx_graphsurgeon",
    "transformers",
    "safetensors",
    "tensorrt",
    "tensorrt_rtx",
    "openvino",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "swin_deploy" else ("swin_deploy", *parts)
    return ".".join(part for part in parts if part != "__init__")


SOURCES = {module_name(path): path for top in ("swin_deploy", *TOP_FOLDERS) for path in (ROOT / top).rglob("*.py")}
MODULES = sorted(name for name in SOURCES if not name.endswith(".__main__"))


def run(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter outside the checkout, so that it finds only what is installed."""
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize(
    "module",
    [
        "swin_deploy",
        "swin_deploy.cli",
        "swin_deploy.frame_input",
        "swin_deploy.preprocess",
        "swin_deploy.runtimes.model",
        "swin_deploy.runtimes.onnxruntime",
        "swin_deploy.variants",
    ],
)
def test_edge_device_imports(module: str, tmp_path: Path) -> None:
    done = run(f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r})); import {module}", tmp_path)
    assert done.returncode == 0, done.stderr


def test_bare_import_is_light(tmp_path: Path) -> None:
    names = (*HEAVY, "onnxruntime", "PIL", "huggingface_hub")
    done = run(f"import swin_deploy, sys; print([name for name in {names!r} if name in sys.modules])", tmp_path)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_modules_import_in_any_order_and_quietly(tmp_path: Path) -> None:
    """The imports at the top of the modules form no circle, and none of them configures logging or prints."""
    graph: dict[str, set[str]] = {}
    for module, path in SOURCES.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found = [name for _, name, inside in imports(ast.parse(path.read_text(encoding="utf-8")), package) if not inside]
        named = {name if name in SOURCES else name.rpartition(".")[0] for name in found}
        graph[module] = {name for name in named if name in SOURCES and name != module}
    TopologicalSorter(graph).prepare()  # raises CycleError
    code = f"""
import importlib, logging
for module in {MODULES!r}:
    importlib.import_module(module)
assert not logging.root.handlers
"""
    done = run(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names_resolve_and_are_sorted() -> None:
    assert list(swin_deploy.__all__) == sorted(swin_deploy.__all__)
    assert [name for name in swin_deploy.__all__ if not hasattr(swin_deploy, name)] == []


def imports(node: ast.AST, package: str, inside: bool = False) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, absolute module, whether in a function or TYPE_CHECKING block) of each import below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
            module = ".".join([*parents, *([child.module] if child.module else [])])
            yield from ((child.lineno, f"{module}.{alias.name}", inside) for alias in child.names)
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        )
        yield from imports(child, package, inside or deferred)


# Which of the three top folders a folder may import at all. api/, cli/, bench/, datasets/ and doctor/ put them together.
MAY_IMPORT = {"exporters": ("calib",), "runtimes": (), "calib": ()}
COMPOSE = ("api", "cli", "bench", "datasets", "diagnosis", "doctor", "publishing", "reporting", "serving")


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_point_one_way(module: str) -> None:
    """exporters may import calib; runtimes and calib import neither of the others; the core imports none of them."""
    folder = (module.split(".") + [""])[1]
    allowed = (*MAY_IMPORT.get(folder, ()), folder)
    path = SOURCES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    wrong = []
    for line, name, inside in imports(ast.parse(path.read_text(encoding="utf-8")), package):
        parts = [*name.split("."), ""]
        forbidden = parts[0] == "swin_deploy" and parts[1] in TOP_FOLDERS and parts[1] not in allowed
        if parts[0] in TOP_FOLDERS or (forbidden and not (folder in COMPOSE and inside)):
            wrong.append(f"line {line}: {name}")
    assert wrong == []


def test_a_cpu_load_imports_little(tmp_path: Path) -> None:
    """Loading and running a bundle on a CPU imports nothing that makes graphs, and nothing for GPUs."""
    image = ROOT / "examples/digits/images/3.png"
    code = f"""
import sys, swin_deploy
with swin_deploy.load({str(digits(2))!r}, backend="onnxruntime", device="cpu") as model:
    model.classify({str(image)!r})
unwanted = ("swin_deploy.exporters", "swin_deploy.runtimes.gpu", "torch", "onnx", "onnx_graphsurgeon")
print([name for name in sys.modules if any(name == one or name.startswith(one + ".") for one in unwanted)])
"""
    done = run(code, tmp_path)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_base_names_are_unique() -> None:
    """Only cli/X.py and api/X.py share a name, and every package has __init__ and may have base."""
    found: dict[str, list[str]] = {}
    for name, path in SOURCES.items():
        if path.stem not in ("__init__", "__main__", "base"):
            found.setdefault(path.stem, []).append(name)
    shared = {
        stem: names
        for stem, names in found.items()
        if len(names) > 1 and set(names) != {f"swin_deploy.api.{stem}", f"swin_deploy.cli.{stem}"}
    }
    assert shared == {}


def test_public_definitions_are_unique() -> None:
    """No two classes or public functions of one name; a verb's function in api/ and click's `command` in cli/ aside."""
    found: dict[str, list[str]] = {}
    for name, path in SOURCES.items():
        if not name.startswith("swin_deploy.cli."):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                    found.setdefault(node.name, []).append(name)
    assert {one: names for one, names in found.items() if len(names) > 1} == {}
