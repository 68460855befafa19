"""pyproject.toml and what is made of it: lists of dependencies, the wheel, scripts where nothing is installed."""

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
from tests.support.reader_machine import copy_of_the_repository

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
    if name != "finetune/launch.py"  # which starts finetune.py, and imports nothing of the package
]


def listed(name: str) -> list[Requirement]:
    """The requirements of a file, without its remarks."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def pins(name: str) -> dict[str, str]:
    """Package → the one version that a file of constraints allows."""
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
def test_a_plain_list_is_its_extra(name: str, dependencies: list[str]) -> None:
    assert listed(name) == [Requirement(line) for line in dependencies]


def test_no_other_list() -> None:
    lists = {name for name in repository_files() if re.search("requirements.*[.](txt|in)$", name)}
    assert lists == {"requirements.txt", "requirements_web_demo.txt"}


def test_no_file_names_a_list_that_is_not_there() -> None:
    for name in repository_files():
        if name.endswith((".py", ".toml", ".sh", ".yaml", "Makefile", "Dockerfile", ".dockerignore")):
            for found in re.findall(r"requirements\w*\.txt", (ROOT / name).read_text(encoding="utf-8")):
                assert (ROOT / found).is_file(), f"{name}: {found}"


@pytest.mark.parametrize("requirement", OTHERS, ids=str)
def test_what_was_tested_is_allowed(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins("constraints.txt")[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("requirement", OTHERS, ids=str)
def test_a_floor_is_what_the_oldest_environment_has(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    if (oldest := pins("constraints-oldest.txt").get(name)) is None or oldest == pins("constraints.txt")[name]:
        return  # not in that environment, or a tool of the tests
    (floor,) = (one.version for one in requirement.specifier if one.operator == ">=")
    assert requirement.specifier.contains(oldest)
    assert Version(oldest).release[: len(Version(floor).release)] == Version(floor).release


def test_extras_refer_to_this_distribution_and_to_extras_that_are_there() -> None:
    own = [one for one in EVERYTHING if one.extras and not one.specifier]
    assert own
    assert all(one.name == PROJECT["name"] and one.extras <= EXTRAS.keys() for one in own)


def test_a_package_has_one_floor() -> None:
    names = [canonicalize_name(one.name) for one in OTHERS]
    assert len(names) == len(set(names))


def test_nobody_is_sent_to_the_package_of_a_stranger() -> None:
    for name in repository_files():
        if name.endswith((".py", ".md", ".toml", ".txt", ".ipynb", ".sh", "Makefile", "Dockerfile", ".html")):
            text = (ROOT / name).read_text(encoding="utf-8")
            wrong = re.search(r"""pip3? (?:install|download) (?:\S+ )*['"]?qwen(?![-\w/.])""", text, re.IGNORECASE)
            assert wrong is None, f"{name}: {wrong and wrong.group()}"


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    copy_of_the_repository(folder / "repository")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    done = subprocess.run([*pip, folder / "repository"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_has_the_packages_and_no_more(wheel: zipfile.ZipFile) -> None:
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
def test_the_installed_package_answers_away_from_the_repository(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    packages, model = tmp_path / "packages", tmp_path / "model"
    wheel.extractall(packages)
    shutil.copytree(ROOT / "checkpoints" / "qwen-tiny-chat", model)

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *words],
            input="What is 47 + 38?\n",
            env={**os.environ, "PYTHONPATH": str(packages)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = run("-m", "qwen_cli", "chat", "-c", str(model), "--cpu-only")
    assert (done.returncode, done.stdout) == (0, "47 + 38 = 85.\n"), done.stderr
    assert "Traceback" not in done.stderr

    # In one process, for each start takes seconds.
    commands = [["chat"], ["eval", "long_context"], ["quantize"]]
    done = run("-c", f"from qwen_cli.__main__ import main\nfor words in {commands}: print(main(words))")
    assert (done.returncode, done.stdout.split()) == (0, ["1"] * len(commands)), done.stderr
    assert done.stderr.count("The bundled model is not here") == len(commands)
    assert "Traceback" not in done.stderr


# Scripts where the package is not installed


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_what_to_install(name: str) -> None:
    # Without site-packages: what it says first is about this package, or about the client that it is an example of.
    done = subprocess.run([sys.executable, "-S", "-E", name], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert "pip install" in line
    if "'qwen'" in line:
        assert "pip install -e ." in line


def test_no_script_looks_for_the_package_itself() -> None:
    for name in repository_files():
        if name.startswith((*FOLDERS, "docker/")) and name.endswith(".py"):
            assert "sys.path" not in (ROOT / name).read_text(encoding="utf-8"), name
