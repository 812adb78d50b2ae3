"""Tests of the wheel in a fresh environment, without this checkout, on the versions that pyproject.toml allows.

`nox` tests the oldest version of each dependency, `nox -t pairs` other pairs of TensorFlow and Keras, on the Python
versions that are installed. Arguments after `--` are passed to pytest: `nox -t pairs -- -x -n 2 tests/core`.
"""

from __future__ import annotations

import itertools
import platform
import shutil
import sys
import tarfile
from pathlib import Path

import nox

DIST = Path(__file__).parent / "dist"
PROJECT = nox.project.load_toml("pyproject.toml")["project"]
EXTRAS = ("examples", "plot", "tensorboard")
# The CPU build is a third of the download.
TENSORFLOW = "tensorflow-cpu" if (sys.platform, platform.machine()) == ("linux", "x86_64") else "tensorflow"
# Python, TensorFlow, Keras. TensorFlow has wheels for Python 3.13 from 2.20 on.
PAIRS = [
    ("3.11", "2.19.1", "3.15.0"),
    ("3.12", "2.18.1", "3.15.1"),
    ("3.12", "2.20.0", "3.14.1"),
    ("3.13", "2.20.0", "3.14.0"),
    ("3.13", "2.21.0", "3.15.1"),
]

nox.options.sessions = ["oldest"]


@nox.session
def dist(session: nox.Session) -> None:
    """Builds the sdist and from it the wheel, and checks their metadata."""
    shutil.rmtree(DIST, ignore_errors=True)
    session.install("build", "twine")
    session.run("python", "-m", "build", "--outdir", str(DIST), silent=True)
    session.run("twine", "check", "--strict", *map(str, DIST.iterdir()))


@nox.session(python="3.11", requires=["dist"])
def oldest(session: nox.Session) -> None:
    """Tests the wheel with the oldest version of each dependency."""
    extras = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"], *itertools.chain(*(extras[name] for name in (*EXTRAS, "tensorflow")))]
    pinned = [requirement.replace(">=", "==") for requirement in needed if not requirement.startswith("tfmixed[")]
    test_wheel(session, *(requirement.replace("tensorflow==", f"{TENSORFLOW}==") for requirement in pinned))


@nox.session(tags=["pairs"], requires=["dist"])
@nox.parametrize("python,tensorflow,keras", PAIRS)
def pair(session: nox.Session, tensorflow: str, keras: str) -> None:
    """Tests the wheel with one version of TensorFlow and one of Keras."""
    test_wheel(session, f"{TENSORFLOW}=={tensorflow}", f"keras=={keras}")


def test_wheel(session: nox.Session, *versions: str) -> None:
    """Installs the wheel, and runs an example and the tests of the sdist against it."""
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    session.install(f"{wheel}[{','.join((*EXTRAS, 'test'))}]", *versions)
    folder = Path(session.create_tmp())
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, [member for member in archive if "/tfmixed/" not in member.name], filter="data")
    session.chdir(folder / sdist.name.removesuffix(".tar.gz"))
    session.run("python", "-c", "import sys, tfmixed; assert tfmixed.__file__.startswith(sys.prefix), tfmixed.__file__")
    session.run("tfmixed", "run", "--policy", "mixed_float16", "examples/unchanged.py", "--epochs", "1")
    session.run("python", "-m", "pytest", *session.posargs, env={"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONPATH": None})
