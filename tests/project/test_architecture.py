"""Lazy imports, public names, and Keras's registration of classes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from thorough import thorough

import tfmixed
from tfmixed._utils import keras_registration


def python(code):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_import_loads_no_framework():
    """Keras is imported on first use, so `import tfmixed` is fast."""
    heavy = {"keras", "tensorflow", "torch", "jax", "matplotlib", "rich", "numpy"}
    assert not heavy & set(python("import tfmixed, sys; print(*sys.modules)"))


def test_every_public_name_exists():
    """All names of `dir()` can be used, other names raise AttributeError."""
    assert all(getattr(tfmixed, name) is not None for name in dir(tfmixed))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = tfmixed.nonsense


def test_classes_of_saved_models_are_registered():
    """Once `tfmixed` and Keras are imported."""
    import keras

    for name in ("Forced", "Float32Activation", "Softmax", "CategoricalCrossentropy", "LossScaleOptimizer"):
        assert keras.saving.get_registered_object(f"tfmixed>{name}") is not None


def test_a_module_that_does_not_work_with_keras_is_a_warning():
    """Imports continue with the next module."""
    with pytest.warns(UserWarning, match="no_such_module"):
        keras_registration.import_with_keras(["tfmixed.no_such_module", "tfmixed.layers"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import keras, tfmixed",
        "import tfmixed, keras",
        # Other packages look for it like this.
        pytest.param("import tfmixed, importlib.util; importlib.util.find_spec('keras'); import keras", marks=thorough),
    ],
)
def test_saved_models_load_in_a_fresh_process(tmp_path, imports):
    """Whichever package is imported first, and without use of any name of this package."""
    import keras

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2), tfmixed.layers.Softmax()])
    model.compile(tfmixed.LossScaleOptimizer("sgd", 64), loss="mse")
    model.save(tmp_path / "model.keras")
    code = f"{imports}; print(keras.models.load_model({str(tmp_path / 'model.keras')!r}).optimizer.rule.value)"
    assert python(code) == ["64.0"]


RENAMED = """
import builtins

def import_(name, globals=None, *rest, **named):
    if name.startswith("keras.src.") and (globals or {}).get("__name__", "").startswith("tfmixed."):
        raise ModuleNotFoundError(f"No module named {name!r}")
    return plain(name, globals, *rest, **named)

plain, builtins.__import__ = builtins.__import__, import_
import tfmixed
import keras, numpy
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
model.fit(numpy.ones((8, 2)), numpy.ones((8, 1)), verbose=0)
print(type(keras.__spec__.loader).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("filters", ["default", "error::UserWarning"])
def test_keras_imports_and_trains_if_its_private_modules_have_moved(filters):
    """A warning names the saved models that do not load, and cannot break the import."""
    command = [sys.executable, "-W", filters, "-c", RENAMED]
    run = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert (run.returncode, run.stdout) == (0, "SourceFileLoader\n"), run.stderr
    assert ("tfmixed._islands.layer_rewrite" in run.stderr) == (filters == "default")
