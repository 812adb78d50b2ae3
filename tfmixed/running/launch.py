"""Waits for the script to import Keras, and applies what is asked for then."""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

import wrapt

from tfmixed.running.ledger import Ledger
from tfmixed.running.policies import Policies
from tfmixed.running.saying import say
from tfmixed.running.wishes import Wish


class Launch:
    """One run of a Keras script.

    Args:
        wish: What the command line asks for.
    """

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.policies, self.ledger = Policies(wish), Ledger(wish)
        self.training: Any = None

    def prepare(self) -> None:
        """Has the script's own imports apply what is asked for."""
        # Where the first functions are defined: all the modules that hand them on take them from there later.
        wrapt.when_imported("keras.src.dtype_policies.dtype_policy")(self.policies.install)
        wrapt.when_imported("keras.src.saving.saving_api")(self._stand_around_files)
        wrapt.when_imported("keras")(self._apply)
        wrapt.when_imported("tf_keras")(_refuse_keras_2)

    def _apply(self, _keras: ModuleType) -> None:
        from tfmixed import promotion
        from tfmixed.running.loops import Loops
        from tfmixed.running.training import Training

        self.training = Training(self.wish, self.ledger)
        self.training.install()
        Loops(self.policies, self.training).install()
        promotion.switch(self.wish.promote)
        self.policies.ready = True

    def _stand_around_files(self, module: Any) -> None:
        def stand_around(name: str, method: str) -> None:
            plain = getattr(module, name)

            @functools.wraps(plain)
            def function(*arguments: Any, **named: Any) -> Any:
                return getattr(self.training, method)(plain, *arguments, **named)

            setattr(module, name, function)

        stand_around("save_model", "save")
        stand_around("load_model", "load")
        stand_around("load_weights", "load")

    def finish(self) -> None:
        """Says how the run ended."""
        if "keras" in sys.modules and (error := sys.exc_info()[1]) is not None:
            from tfmixed.running import mismatch

            mismatch.explain(error)
        if self.policies.is_settled:
            self.ledger.close()
        elif "keras" in sys.modules:
            say("nothing was applied: the script made no Keras model (one of TensorFlow 1 takes --tf1)")
        else:
            say("nothing was applied: the script never imported Keras (one of TensorFlow 1 takes --tf1)")


def _refuse_keras_2(module: Any) -> None:
    """Lets a script import Keras 2, and refuses a model of it."""
    from tfmixed.running.saying import place, refuse
    from tfmixed.running.wrapping import around

    def compile_(_plain: Any, model: Any, *_arguments: Any, **_named: Any) -> None:
        refuse(f"{place()} compiles a model of tf_keras, Keras 2: what is applied here is for Keras 3 ({model!r:.60})")

    around(module.Model, "compile", compile_)
