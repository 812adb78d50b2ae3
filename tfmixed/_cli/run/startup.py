"""Start of a script's process: patches that wait for the script's own imports, and the last line at its exit."""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from tfmixed._cli.run import messages
from tfmixed._cli.run.default_policy import DefaultPolicy
from tfmixed._cli.run.options import VARIABLE, RunOptions
from tfmixed._cli.run.run_summary import RunSummary


def start() -> None:
    """Prepares the process as `command` asks in the environment, which is then as it was before."""
    options = RunOptions(**json.loads(os.environ.pop(VARIABLE)))
    _, _, path = os.environ.pop("PYTHONPATH").partition(os.pathsep)
    if path:
        os.environ["PYTHONPATH"] = path
    if options.tf1:
        from tfmixed._cli.run.tf1 import TF1Run

        TF1Run(options).install()
    else:
        KerasRun(options).install()


class KerasRun:
    """Run of a Keras script.

    Args:
        options: Options of the run.
    """

    def __init__(self, options: RunOptions) -> None:
        self.options = options
        self.policy, self.summary = DefaultPolicy(options), RunSummary(options)
        self.patches: Any = None
        # Functions are patched in the modules that define them, before other modules import them from there.
        self._functions: dict[str, Callable[[Any], None]] = {
            "keras.src.dtype_policies.dtype_policy": self.policy.install,
            "keras.src.saving.saving_api": self._patch_save,
        }

    def install(self) -> None:
        """Has the script's own import of Keras apply the patches."""
        for name, patch in {**self._functions, "keras": self._patch_classes}.items():
            wrapt.when_imported(name)(functools.partial(_apply, patch))
        wrapt.when_imported("tf_keras")(lambda _: messages.say("tf_keras is Keras 2: its models train unchanged"))
        messages.at_exit(self.finish)

    def _patch_save(self, module: Any) -> None:
        original = module.save_model

        @functools.wraps(original)
        def save_model(model: Any, *args: Any, **kwargs: Any) -> Any:
            with self.patches.without_islands(model):
                return original(model, *args, **kwargs)

        module.save_model = save_model

    def _patch_classes(self, _keras: ModuleType) -> None:
        from tfmixed._cli.run.keras_patches import KerasPatches
        from tfmixed._cli.run.training_steps import ScaledModels, StepPatches
        from tfmixed._islands import gradient_sums, promotion

        for name in self._functions:
            importlib.import_module(name)  # fails if this version of Keras does not have the module
        models = ScaledModels()
        self.patches = KerasPatches(self.options, self.policy, self.summary, models)
        self.patches.install()
        StepPatches(models).install()
        promotion.switch(self.options.promote)
        gradient_sums.switch(self.options.float32_sums, self.options.float32_sums)
        self.policy.is_enabled = True
        messages.at_exit(self.finish)  # before the exit function of JAX, which deletes its arrays

    def finish(self) -> None:
        """Prints the last line, and writes the report."""
        error = getattr(sys, "last_value", None)
        if "keras" in sys.modules and isinstance(error, Exception):
            from tfmixed._cli.run import dtype_mismatch

            dtype_mismatch.explain(error)
        if self.policy.in_force is not None:
            line = self.summary.close()
        else:
            reason = "created no Keras layer" if "keras" in sys.modules else "did not import Keras"
            line = f"nothing was applied: the script {reason} (for TensorFlow 1, use --tf1)"
        messages.say_last(line, self.summary.has_steps)


def _apply(patch: Callable[[Any], None], module: ModuleType) -> None:
    try:
        patch(module)
    except (ImportError, AttributeError) as error:
        messages.refuse(f"this version of Keras is not supported. Received: {type(error).__name__}: {error}")
