"""Tests of pyproject.toml, the lists of dependencies, the wheel, and scripts without the installed package."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import qwen
from tests.support import ROOT
from tests.support.markdown import repository_files
from tests.support.reader_machine import copy_repository

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
EVERYTHING = {Requirement(line) for lines in (PROJECT["dependencies"], *EXTRAS.values()) for line in lines}
OTHERS = sorted((one for one in EVERYTHING if one.name != PROJECT["name"]), key=str)

# Scripts that import `qwen` from another folder than the root's.
FOLDERS = ("examples/", "benchmarks/", "eval/", "finetune/")
SCRIPTS = [
    name
    for name in repository_files()
    if name.startswith(FOLDERS) and name.endswith(".py") and "__main__" in (ROOT / name).read_text(encoding="utf-8")
    if name != "finetune/launch.py"  # it starts finetune.py and does not import the package
]


def listed(name: str) -> list[Requirement]:
    """Return the requirements in a file, without comments."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def pins(name: str) -> dict[str, str]:
    """Return the pinned version of each package in a constraints file."""
    found = {}
    for requirement in listed(name):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        assert not specifier.version.endswith("*"), requirement
        assert canonicalize_name(requirement.name) not in found, f"{requirement.name} is there twice"
        found[canonicalize_name(requirement.name)] = specifier.version
    return found


# The dependencies


@pytest.mark.parametrize(
    ("name", "dependencies"),
    [("requirements.txt", PROJECT["dependencies"]), ("requirements_web_demo.txt", EXTRAS["web"])],
)
def test_requirements_files_match_pyproject(name: str, dependencies: list[str]) -> None:
    assert listed(name) == [Requirement(line) for line in dependencies]


def test_there_are_no_other_requirements_files() -> None:
    lists = {name for name in repository_files() if re.search("requirements.*[.](txt|in)$", name)}
    assert lists == {"requirements.txt", "requirements_web_demo.txt"}


def test_requirements_files_that_are_named_exist() -> None:
    for name in repository_files():
        if name.endswith((".py", ".toml", ".sh", ".yaml", "Makefile", "Dockerfile", ".dockerignore")):
            for found in re.findall(r"requirements\w*\.txt", (ROOT / name).read_text(encoding="utf-8")):
                assert (ROOT / found).is_file(), f"{name}: {found}"


@pytest.mark.parametrize("requirement", OTHERS, ids=str)
def test_requirements_allow_the_tested_version(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins("constraints.txt")[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("requirement", OTHERS, ids=str)
def test_lower_bounds_match_the_oldest_environment(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    if (oldest := pins("constraints-oldest.txt").get(name)) is None or oldest == pins("constraints.txt")[name]:
        return  # not in that environment, or a tool of the tests
    (floor,) = (one.version for one in requirement.specifier if one.operator == ">=")
    assert requirement.specifier.contains(oldest)
    assert Version(oldest).release[: len(Version(floor).release)] == Version(floor).release


def test_extras_refer_to_existing_extras_of_this_distribution() -> None:
    own = [one for one in EVERYTHING if one.extras and not one.specifier]
    assert own
    assert all(one.name == PROJECT["name"] and one.extras <= EXTRAS.keys() for one in own)


def test_each_package_is_required_with_one_specifier() -> None:
    names = [canonicalize_name(one.name) for one in OTHERS]
    assert len(names) == len(set(names))


def test_nothing_installs_the_unrelated_package_named_qwen() -> None:
    assert "qwen" not in {canonicalize_name(one.name) for one in EVERYTHING}
    for name in repository_files():
        if name.endswith((".py", ".md", ".toml", ".txt", ".ipynb", ".sh", "Makefile", "Dockerfile", ".html")):
            text = (ROOT / name).read_text(encoding="utf-8")
            wrong = re.search(r"""pip3? (?:install|download) (?:\S+ )*['"]?qwen(?![-\w/.])""", text, re.IGNORECASE)
            assert wrong is None, f"{name}: {wrong and wrong.group()}"


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    copy_repository(folder / "repository")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    done = subprocess.run([*pip, folder / "repository"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_contains_exactly_the_packages(wheel: zipfile.ZipFile) -> None:
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files == {name for name in repository_files() if name.startswith(("qwen/", "qwen_cli/"))}
    assert "qwen/py.typed" in files


def test_the_wheel_has_the_version_of_the_package(wheel: zipfile.ZipFile) -> None:
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    lines = wheel.read(metadata).decode().splitlines()
    assert f"Name: {PROJECT['name']}" in lines
    assert f"Version: {qwen.__version__}" in lines
    (commands,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "qwen = qwen_cli.__main__:main" in wheel.read(commands).decode()


@pytest.mark.process
def test_the_installed_package_works_without_the_repository(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    packages, model = tmp_path / "packages", tmp_path / "model"
    wheel.extractall(packages)
    shutil.copytree(ROOT / "checkpoints" / "qwen-tiny-chat", model)

    # In one process, because each start takes seconds.
    commands = [["chat", "-c", str(model), "--cpu-only"], ["chat"], ["eval", "long_context"], ["quantize"]]
    done = subprocess.run(
        [sys.executable, "-c", f"from qwen_cli.__main__ import main\nfor words in {commands}: print(main(words))"],
        input="What is 47 + 38?\n",
        env={**os.environ, "PYTHONPATH": str(packages)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "47 + 38 = 85.\n0\n1\n1\n1\n"), done.stderr
    assert done.stderr.count("The bundled model was not found") == 3
    assert "Traceback" not in done.stderr


# Scripts without the installed package


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_what_to_install(name: str) -> None:
    # Without site-packages: the first missing package is this one, or the client library that an example shows.
    done = subprocess.run([sys.executable, "-S", "-E", name], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert "pip install" in line
    if "'qwen'" in line:
        assert "pip install -e ." in line


def test_no_script_changes_sys_path() -> None:
    for name in repository_files():
        if name.startswith((*FOLDERS, "docker/")) and name.endswith(".py"):
            assert "sys.path" not in (ROOT / name).read_text(encoding="utf-8"), name
