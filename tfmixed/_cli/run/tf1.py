"""Runs a script of TensorFlow 1 with `tfmixed.compat.v1` installed, and the rewrite and loss scaling switched on."""

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

from tfmixed._cli.run.ledger import Ledger
from tfmixed._cli.run.saying import refuse, say, say_end
from tfmixed._cli.run.wishes import Wish

# What NVIDIA's containers read; `install` does what they do.
_SCALING = "TF_ENABLE_AUTO_MIXED_PRECISION_LOSS_SCALING"


class Launch1:
    """One run of a script of TensorFlow 1.

    Args:
        wish: What the command line asks for.
    """

    def __init__(self, wish: Wish) -> None:
        self.wish, self.ledger = wish, Ledger(wish)
        self._wanted = "auto" if wish.policy == "auto" else wish.policy.removeprefix("mixed_")
        self._tf: Any = None
        self._has_keras = False
        self._has_begun = False
        self._scalers: dict[Any, list[Any]] = {}  # which optimizers step in a graph
        self._sessions: weakref.WeakSet[Any] = weakref.WeakSet()
        self._eager: weakref.WeakSet[Any] = weakref.WeakSet()

    def prepare(self) -> None:
        """Has the script's own import of TensorFlow install the shim."""
        wrapt.when_imported("tensorflow")(self._install)
        wrapt.when_imported("keras")(self._after_keras)

    def _after_keras(self, _keras: ModuleType) -> None:
        self._has_keras = True
        if "tensorflow" in sys.modules:
            self._install(sys.modules["tensorflow"])

    def _install(self, tensorflow: ModuleType) -> None:
        # The shim needs Keras: where the script's import of it is what imports TensorFlow, it is not done yet.
        if self._tf is not None or ("keras" in sys.modules and not self._has_keras):
            return
        self._tf = tensorflow
        try:
            from tfmixed.compat import v1
        except ImportError as error:
            refuse(f"--tf1: {error}")
        from tfmixed._cli.run.wrapping import around

        # For the whole run: it is asked for at each step that is built.
        os.environ[_SCALING] = "0" if self._wanted == "float32" else "1"
        v1.install()
        around(v1.LossScaleOptimizer, "apply_gradients", self._apply_gradients, traced=True)
        for kind in (tensorflow.compat.v1.Session, tensorflow.compat.v1.InteractiveSession):
            around(kind, "__init__", self._open)
            around(kind, "close", self._close)

    def _begin(self) -> None:
        """Switches the rewrite on, and says what is applied.

        Not before the script's first step or session: it makes TensorFlow's context, and in one that was made before
        the script calls `disable_eager_execution` conditionals hold tensors that no graph can.
        """
        if self._has_begun:
            return
        self._has_begun = True
        from tfmixed.compat import v1
        from tfmixed.compat.v1 import graph_rewrite

        said: list[str] = []
        is_own, is_wanted = graph_rewrite.is_enabled(), self._wanted != "float32"
        if is_wanted and not is_own:
            with _heard(said):
                # An optimizer that nobody uses: the switch is of the whole process.
                v1.enable_mixed_precision_graph_rewrite(v1.train.GradientDescentOptimizer(0.0), dtype=self._wanted)
        half = f"graph rewrite to {graph_rewrite.active()}" if graph_rewrite.active() else "no graph rewrite"
        by = " as the script itself asks" if is_own else ""
        scaling = "a dynamic loss scale for optimizers that have none" if is_wanted else "no loss scale added"
        say("; ".join([f"TensorFlow 1 shim, {half}{by}, {scaling}", *said]))

    def _apply_gradients(self, plain: Callable[..., Any], optimizer: Any, *arguments: Any, **named: Any) -> Any:
        self._begin()
        with self._tf.init_scope():
            if self._tf.executing_eagerly():
                self._eager.add(optimizer)
            else:
                known = self._scalers.setdefault(self._tf.compat.v1.get_default_graph(), [])
                known += [] if optimizer in known else [optimizer]
        return plain(optimizer, *arguments, **named)

    def _open(self, plain: Callable[..., Any], session: Any, *arguments: Any, **named: Any) -> None:
        self._begin()
        plain(session, *arguments, **named)
        self._sessions.add(session)

    def _close(self, plain: Callable[..., Any], session: Any) -> None:
        self._look(session)
        plain(session)

    def _look(self, session: Any) -> None:
        """Notes where the optimizers in a session's graph stand, if it can still say so."""
        for optimizer in self._scalers.get(session.graph, []):
            # Tensors that are there since the optimizer was used: the graph may be final.
            with contextlib.suppress(Exception), session.graph.as_default():
                wanted = optimizer.attempted_steps, optimizer.skipped_steps, optimizer.loss_scale
                steps, skipped, scale = session.run(wanted)
                entry = self.ledger.entry(optimizer)
                if steps >= entry.steps:  # a session that evaluates may know of fewer
                    entry.steps, entry.skipped, entry.scale = int(steps), int(skipped), float(scale)

    def finish(self, reason: BaseException | None) -> None:
        """Says how the run ended, by which exception if by any."""
        if self._tf is None:
            say_end("nothing was applied: the script never imported TensorFlow", reason)
            return
        if not self._has_begun:
            none = "nothing was applied: the script took no step of TensorFlow 1 (one of Keras needs no --tf1)"
            say_end(none, reason)
            return
        for session in list(self._sessions):
            self._look(session)
        for optimizer in list(self._eager):
            self.ledger.note(optimizer)
        known = self.ledger.summary() if self.ledger.has_steps else "steps unknown, no step of a loss scale was seen"
        said = f"{known}; no log: tfmixed.compat.v1.LossScaleHook writes one"
        say_end(said, None if self.ledger.has_steps else reason)


@contextlib.contextmanager
def _heard(said: list[str]) -> Iterator[None]:
    """Adds to a list what is printed and warned of within."""
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("always")
        yield
    said += [str(each.message) for each in caught]
