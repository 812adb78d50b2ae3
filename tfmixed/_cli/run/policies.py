"""The dtype policy of an unchanged script: what the command asks for is the default, what the script sets wins."""

from __future__ import annotations

import functools
import weakref
from typing import Any

from tfmixed import hardware
from tfmixed._cli.run import saying
from tfmixed._cli.run.saying import place, say
from tfmixed._cli.run.wishes import HALF, Wish


class Policies:
    """Stands behind Keras's `dtype_policy` and `set_dtype_policy`, and says once what is applied.

    Nothing is decided before the first layer is made or somebody asks: until then a script may choose its devices.
    Where Keras has forgotten the policy (a new thread, `clear_session`), it finds that of the command again.

    Args:
        wish: What the command line asks for.
    """

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.float16_layers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.ready = False  # once Keras is imported
        self._asked: str | None = None
        self._in_force = ""
        self._set_at: str | None = None  # the script's line, until all is said
        self._said: set[str] = set()

    @property
    def is_settled(self) -> bool:
        """Whether anything was made yet."""
        return self._asked is not None

    def install(self, module: Any) -> None:
        """Stands behind the functions of the module that defines them, before others import them from there."""
        get, set_ = module.dtype_policy, module.set_dtype_policy

        @functools.wraps(get)
        def dtype_policy() -> Any:
            if self.ready:
                is_set = module.global_state.get_global_attribute("dtype_policy") is not None
                self._settle(get, None if is_set else set_)
            return get()

        @functools.wraps(set_)
        def set_dtype_policy(policy: Any) -> None:
            set_(policy)
            by = saying.caller("keras")
            if by == "tfmixed.policy" or not by.startswith("tfmixed."):  # others here set it for a moment
                self._was_set(get().name, get().compute_dtype)

        module.dtype_policy, module.set_dtype_policy = dtype_policy, set_dtype_policy

    def _settle(self, get: Any, set_: Any) -> None:
        """Chooses the policy, and sets it where the script has not."""
        if self._asked is None:
            self._asked = self.wish.policy  # already here: what asks the hardware may ask for the policy too
            machine = hardware.describe()
            self._asked = machine.policy if self.wish.policy == "auto" else self.wish.policy
            self._begin(get, set_)
        elif set_ is not None and self._floatx() == "float32":
            set_(self._asked)

    def _begin(self, get: Any, set_: Any) -> None:
        # `set_floatx` is another way of choosing a policy, where nobody sets one.
        if set_ is not None and self._floatx() == "float32":
            set_(self._asked)
        policy = get()
        self._in_force, words = policy.name, self.wish.in_words(policy.compute_dtype)
        if self._in_force == self._asked:
            say(f"{self._asked} ({self._why(policy.compute_dtype)}), {words}")
        else:
            who = f"{self._set_at} sets" if self._set_at else "floatx is set and means"
            say(f"{who} {self._in_force}, which wins over {self._asked} ({self._why('')}); {words}")

    def _floatx(self) -> str:
        import keras

        return str(keras.config.floatx())

    def _why(self, compute_dtype: str) -> str:
        device = hardware.describe().main
        if self.wish.policy != "auto":
            slow = compute_dtype in HALF and compute_dtype not in device.fast
            return f"{self.wish.source}; {compute_dtype} is slow here" if slow else self.wish.source
        capability = f"compute capability {device.compute_capability}" if device.compute_capability else ""
        return f"{self.wish.source}: {capability or ', '.join(device.features) or 'no half precision is fast here'}"

    def _was_set(self, name: str, compute_dtype: str) -> None:
        where = place()
        if not self.is_settled:
            self._set_at = where
        elif name != self._in_force:
            self._in_force = name
            over = f", which wins over {self._asked}" if name != self._asked else ""
            self._say_once(where + name, f"{where} sets {name}{over}; from here on {self.wish.in_words(compute_dtype)}")

    def saw(self, layer: Any, dtype: Any) -> None:
        """Notes a layer that was made, and the `dtype` that it was given."""
        import keras

        policy = layer.dtype_policy
        if getattr(policy, "compute_dtype", None) == "float16":
            self.float16_layers.add(layer)
        given = dtype.name if isinstance(dtype, keras.DTypePolicy) else dtype
        if not isinstance(given, str) or "float" not in policy.compute_dtype:
            return
        keras.config.dtype_policy()  # to be settled, where this is the first layer
        ours = type(layer).__module__.startswith("tfmixed.")
        if given != self._in_force and not ours and not isinstance(layer, keras.layers.InputLayer):
            kind, is_read = type(layer).__name__, saying.is_within("keras.src.saving.serialization_lib")
            what = f"loads a {kind} of dtype {given}" if is_read else f"gives a {kind} the dtype {given}"
            self._say_once(what[:5], f"{place()} {what}, which it keeps; elsewhere {self._in_force} holds")

    def _say_once(self, key: str, what: str) -> None:
        if key not in self._said:
            self._said.add(key)
            say(what)
