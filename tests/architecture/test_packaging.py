"""pyproject.toml matches the folders, and a wheel contains exactly the package and runs."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# where a folder of the checkout is installed -> the folder
FOLDERS = {
    "swin_deploy": "swin_deploy",
    "swin_deploy/calib": "calib",
    "swin_deploy/exporters": "exporters",
    "swin_deploy/runtimes": "runtimes",
}


def installed_files(pattern: str) -> set[str]:
    """Return the installed path of every file in the four folders that matches a pattern."""
    return {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for target, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob(pattern)
    }


def test_packages_are_the_folders_with_an_init() -> None:
    found = {path.removesuffix("/__init__.py").replace("/", ".") for path in installed_files("__init__.py")}
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(found)


def test_package_dir_maps_the_top_folders() -> None:
    expected = {target.replace("/", "."): folder for target, folder in FOLDERS.items()}
    assert PYPROJECT["tool"]["setuptools"]["package-dir"] == expected


def test_every_module_is_in_a_package() -> None:
    parents = {path.rpartition("/")[0] for path in installed_files("*.py")}
    assert parents == {path.rpartition("/")[0] for path in installed_files("__init__.py")}


def test_version_is_the_newest_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[?(\d[^\s\]]*)", changelog, flags=re.MULTILINE)
    assert versions[:1] == [PYPROJECT["project"]["version"]]


def test_every_extra_that_an_extra_names_exists() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    named = re.findall(r"swin-deploy\[([^]]*)]", " ".join(line for lines in extras.values() for line in lines))
    assert {extra.strip() for group in named for extra in group.split(",")} <= extras.keys()


def test_command_resolves() -> None:
    module, _, name = PYPROJECT["project"]["scripts"]["swin-deploy"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy of the checkout: a build/ folder left in the checkout would add removed files."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return built


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    data = {f"swin_deploy/{path.name}" for path in (ROOT / "swin_deploy").glob("*.txt")}
    expected = installed_files("*.py") | installed_files("*.html") | data | {"swin_deploy/py.typed"}
    assert {name for name in files_of(wheel) if ".dist-info/" not in name} == expected


def test_wheel_installs_one_top_level_name(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in files_of(wheel)}
    assert tops == {"swin_deploy", f"swin_deploy-{PYPROJECT['project']['version']}.dist-info"}


@pytest.mark.parametrize("place", ["checkout", "elsewhere"])
def test_wheel_runs_in_and_outside_a_checkout(place: str, wheel: Path, tmp_path: Path) -> None:
    """In the root of a checkout, its folder swin_deploy comes before the installed package and lacks the top folders."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    there = tmp_path / place
    there.mkdir()
    if place == "checkout":
        for folder in FOLDERS.values():
            shutil.copytree(ROOT / folder, there / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import swin_deploy.runtimes.model as model, swin_deploy.calib; print(model.__file__)"
    # -S leaves out the editable install of this very checkout; the libraries are found by PYTHONPATH.
    path = os.pathsep.join([str(tmp_path / "installed"), *(folder for folder in sys.path if folder.endswith("-packages"))])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=there, env=environment, capture_output=True, text=True)
    expected = there / "runtimes" if place == "checkout" else tmp_path / "installed/swin_deploy/runtimes"
    assert (done.stdout.strip(), done.stderr) == (str(expected / "model.py"), "")
    done = subprocess.run(
        [sys.executable, "-S", "-m", "swin_deploy", "--version"], cwd=there, env=environment, capture_output=True, text=True
    )
    assert done.stdout.endswith(f"version {PYPROJECT['project']['version']}\n"), done.stderr


def test_pyinstaller_finds_its_hook() -> None:
    module, _, name = PYPROJECT["project"]["entry-points"]["pyinstaller40"]["hook-dirs"].partition(":")
    [folder] = getattr(importlib.import_module(module), name)()
    assert (Path(folder) / "hook-swin_deploy.py").is_file()
