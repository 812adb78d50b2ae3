"""Run of a TensorFlow 1 script: `tfmixed.compat.v1` with its graph rewrite and loss scaling."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import wrapt

from tfmixed._cli.run import messages
from tfmixed._cli.run.options import RunOptions
from tfmixed._cli.run.run_summary import RunSummary

_SCALING = "TF_ENABLE_AUTO_MIXED_PRECISION_LOSS_SCALING"  # NVIDIA's containers read it, and `v1.install` does too
_Method = Callable[..., Any]


class TF1Run:
    """Run of a TensorFlow 1 script.

    Args:
        options: Options of the run.
    """

    def __init__(self, options: RunOptions) -> None:
        self.summary = RunSummary(options)
        self._rewrite_dtype = options.requested_policy.removeprefix("mixed_")
        self._tf: Any = None
        self._has_begun = self._has_keras = False
        self._optimizers: dict[Any, list[Any]] = {}  # by graph
        self._sessions: weakref.WeakSet[Any] = weakref.WeakSet()

    def install(self) -> None:
        """Has the script's own import of TensorFlow install the shim."""
        wrapt.when_imported("tensorflow")(self._install)
        wrapt.when_imported("keras")(self._install_after_keras)
        messages.at_exit(self.finish)

    def _install_after_keras(self, _keras: ModuleType) -> None:
        self._has_keras = True
        if "tensorflow" in sys.modules:
            self._install(sys.modules["tensorflow"])

    def _install(self, tensorflow: Any) -> None:
        # The shim imports Keras. If the script's import of Keras imports TensorFlow, the shim must wait for its end.
        if self._tf is not None or ("keras" in sys.modules and not self._has_keras):
            return
        self._tf = tensorflow
        try:
            from tfmixed.compat import v1
        except ImportError as error:
            messages.refuse(f"--tf1: {error}")
        from tfmixed._utils.patching import around

        os.environ[_SCALING] = "0" if self._rewrite_dtype == "float32" else "1"
        v1.install()
        around(v1.LossScaleOptimizer, "apply_gradients", self._apply_gradients, traced=True)
        for kind in (tensorflow.compat.v1.Session, tensorflow.compat.v1.InteractiveSession):
            around(kind, "__init__", self._open)
            around(kind, "close", self._close)

    def _begin(self) -> None:
        """Enables the rewrite at the script's first step or session.

        It creates TensorFlow's context. In one that is created before the script calls `disable_eager_execution`,
        conditionals hold tensors that a graph cannot use.
        """
        if self._has_begun:
            return
        self._has_begun = True
        from tfmixed.compat import v1
        from tfmixed.compat.v1 import graph_rewrite

        lines: list[str] = []
        is_by_script, is_wanted = graph_rewrite.is_enabled(), self._rewrite_dtype != "float32"
        if is_wanted and not is_by_script:
            with _captured(lines):
                # The rewrite applies to the whole process. The optimizer is not used.
                v1.enable_mixed_precision_graph_rewrite(
                    v1.train.GradientDescentOptimizer(0.0), dtype=self._rewrite_dtype
                )
        half = f"graph rewrite to {graph_rewrite.active()}" if graph_rewrite.active() else "no graph rewrite"
        source = " as the script asks" if is_by_script else ""
        scaling = "a dynamic loss scale for optimizers that have none" if is_wanted else "no loss scale"
        messages.say("; ".join([f"TensorFlow 1 shim, {half}{source}, {scaling}", *lines]))

    def _apply_gradients(self, original: _Method, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        self._begin()
        with self._tf.init_scope():
            if self._tf.executing_eagerly():
                self.summary.begin(optimizer)
            else:
                optimizers = self._optimizers.setdefault(self._tf.compat.v1.get_default_graph(), [])
                optimizers += [] if optimizer in optimizers else [optimizer]
        return original(optimizer, *args, **kwargs)

    def _open(self, original: _Method, session: Any, *args: Any, **kwargs: Any) -> None:
        self._begin()
        original(session, *args, **kwargs)
        self._sessions.add(session)

    def _close(self, original: _Method, session: Any) -> None:
        self._read(session)
        original(session)

    def _read(self, session: Any) -> None:
        """Reads the counters of the optimizers in a session's graph, if the session is open."""
        for optimizer in self._optimizers.get(session.graph, []):
            with contextlib.suppress(Exception), session.graph.as_default():
                # These tensors exist since the optimizer was used: the graph may be final.
                counters = session.run((optimizer.attempted_steps, optimizer.skipped_steps, optimizer.loss_scale))
                record = self.summary.record(optimizer)
                if counters[0] >= record.steps:  # a session for evaluation may have taken fewer steps
                    record.steps, record.skipped, record.scale = int(counters[0]), int(counters[1]), float(counters[2])

    def finish(self) -> None:
        """Prints the last line."""
        for session in list(self._sessions):
            self._read(session)
        if self._tf is None:
            line = "nothing was applied: the script did not import TensorFlow"
        elif not self._has_begun:
            line = "nothing was applied: the script took no step of TensorFlow 1 (Keras scripts need no --tf1)"
        else:
            line = f"{self.summary.close()}; no log (tfmixed.compat.v1.LossScaleHook writes one)"
        messages.say_last(line, self.summary.has_steps)


@contextlib.contextmanager
def _captured(lines: list[str]) -> Iterator[None]:
    """Adds warnings to a list, and discards what is printed."""
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("always")
        yield
    lines += [str(warning.message) for warning in caught]
