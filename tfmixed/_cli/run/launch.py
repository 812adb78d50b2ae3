"""Waits for the script to import Keras, and applies what is asked for then."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from tfmixed._cli.run.ledger import Ledger
from tfmixed._cli.run.policies import Policies
from tfmixed._cli.run.saying import refuse, say_end
from tfmixed._cli.run.wishes import Wish


class Launch:
    """One run of a Keras script.

    Args:
        wish: What the command line asks for.
    """

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.policies, self.ledger = Policies(wish), Ledger(wish)
        self.training: Any = None
        # Where the first functions are defined: all the modules that hand them on take them from there later.
        self._private: dict[str, Callable[[Any], None]] = {
            "keras.src.dtype_policies.dtype_policy": self.policies.install,
            "keras.src.saving.saving_api": self._stand_around_files,
        }

    def prepare(self) -> None:
        """Has the script's own imports apply what is asked for."""
        for name, apply in {**self._private, "keras": self._apply}.items():
            wrapt.when_imported(name)(functools.partial(_or_refuse, apply))
        wrapt.when_imported("tf_keras")(_refuse_keras_2)

    def _apply(self, _keras: ModuleType) -> None:
        from tfmixed._islands import promotion

        for name in self._private:
            importlib.import_module(name)  # fails if this version of Keras has it under another name
        from tfmixed._cli.run.loops import Loops
        from tfmixed._cli.run.training import Training

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

    def finish(self, reason: BaseException | None) -> None:
        """Says how the run ended, by which exception if by any."""
        if "keras" in sys.modules and reason is not None:
            from tfmixed._cli.run import mismatch

            mismatch.explain(reason)
        if self.policies.is_settled:
            self.ledger.close(reason)
        elif "keras" in sys.modules:
            say_end("nothing was applied: the script made no Keras model (one of TensorFlow 1 takes --tf1)", reason)
        else:
            say_end("nothing was applied: the script never imported Keras (one of TensorFlow 1 takes --tf1)", reason)


def _or_refuse(apply: Callable[[Any], None], module: ModuleType) -> None:
    try:
        apply(module)
    except (ImportError, AttributeError) as error:
        refuse(f"tfmixed run does not work with this version of Keras. Received: {type(error).__name__}: {error}")


def _refuse_keras_2(module: Any) -> None:
    """Lets a script import Keras 2, and refuses a model of it."""
    from tfmixed._cli.run.saying import place
    from tfmixed._cli.run.wrapping import around

    def compile_(_plain: Any, model: Any, *_arguments: Any, **_named: Any) -> None:
        refuse(f"{place()} compiles a model of tf_keras, Keras 2: what is applied here is for Keras 3 ({model!r:.60})")

    around(module.Model, "compile", compile_)
