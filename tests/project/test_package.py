"""Metadata of the package, and missing optional packages."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata, resources

import pytest

import tfmixed


def test_it_is_typed():
    """Type checkers read the annotations of an installed package only if it has `py.typed`."""
    assert resources.files(tfmixed).joinpath("py.typed").is_file()


def test_the_version_is_that_of_the_metadata():
    """It is defined in one place."""
    assert metadata.version("tfmixed") == tfmixed.__version__


@pytest.mark.parametrize(
    ("package", "name", "extra", "backend"),
    [
        ("tensorflow", "LossScaleOptimizer", "tensorflow", "tensorflow"),
        pytest.param("tensorflow", "compat", "tensorflow", "tensorflow", marks=pytest.mark.slow),
        pytest.param("jax", "layers", "jax", "jax", marks=pytest.mark.slow),
        pytest.param("torch", "audit", "torch", "torch", marks=pytest.mark.slow),
        pytest.param("matplotlib", "plotting", "plot", "tensorflow", marks=pytest.mark.slow),
    ],
)
def test_a_missing_package_is_named_with_its_extra(package, name, extra, backend):
    """In the last line of the traceback; names that need no backend work without one."""
    code = (
        f"import os, sys; os.environ['KERAS_BACKEND'] = {backend!r}; sys.modules[{package!r}] = None\n"
        "import tfmixed; tfmixed.DynamicScale(), tfmixed.records, tfmixed.formats.FORMATS['float16']\n"
        f"try: tfmixed.{name}\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False)
    assert run.stdout == f"tfmixed.{name} needs {package}: pip install 'tfmixed[{extra}]'\n", run.stderr
    assert extra in metadata.metadata("tfmixed").get_all("Provides-Extra")
