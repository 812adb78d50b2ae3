"""The requested dtype policy as Keras's default; a policy that the script sets takes precedence."""

from __future__ import annotations

import functools
from typing import Any

from tfmixed import hardware
from tfmixed._cli.run.messages import place, say
from tfmixed._cli.run.options import HALF, RunOptions


class DefaultPolicy:
    """Patch of Keras's `dtype_policy`, which sets the requested policy where none is set.

    The policy is chosen when Keras first asks for it, since the script may choose its devices until then. Keras forgets
    policies in new threads and after `clear_session`: the requested one is set again.

    Args:
        options: Options of the run.
    """

    def __init__(self, options: RunOptions) -> None:
        self.options = options
        self.is_enabled = False
        self.requested: str | None = None
        self.in_force: str | None = None
        self._reported: set[str] = set()

    def install(self, module: Any) -> None:
        """Patches the module that defines `dtype_policy`, before other modules import the function from it."""
        original = module.dtype_policy

        @functools.wraps(original)
        def dtype_policy() -> Any:
            if self.is_enabled:
                self._set_default(module)
                if self.in_force is None and self.requested is not None:
                    self._announce(original())
            return original()

        module.dtype_policy = dtype_policy

    def _set_default(self, module: Any) -> None:
        is_set = module.global_state.get_global_attribute("dtype_policy") is not None
        if self.requested is None:
            self.is_enabled = False  # detection of the hardware may ask for the policy
            policy = self.options.requested_policy
            self.requested = hardware.describe().policy if policy == "auto" else policy
            self.is_enabled = True
        if not is_set and module.backend.floatx() == "float32":  # `set_floatx` also chooses a policy
            module.set_dtype_policy(self.requested)

    def _announce(self, policy: Any) -> None:
        self.in_force, dtype = policy.name, policy.compute_dtype
        applied = self.options.describe(dtype)
        if policy.name == self.requested:
            say(f"{policy.name} ({self._reason(dtype)}), {applied}")
        else:
            say(f"{place()} uses {policy.name}, which the script sets instead of {self.requested}; {applied}")

    def _reason(self, dtype: str) -> str:
        source, device = self.options.policy_source, hardware.describe().main
        if self.options.requested_policy != "auto":
            return f"{source}; {dtype} is slow here" if dtype in HALF and dtype not in device.fast else source
        capability = f"compute capability {device.compute_capability}" if device.compute_capability else ""
        return f"{source}: {capability or ', '.join(device.features) or 'no half precision is fast here'}"

    def report_overrides(self, model: Any) -> None:
        """Reports a policy that the script set since, and layers of a compiled model with a policy of their own."""
        import keras

        policy = keras.config.dtype_policy()
        if policy.name != self.in_force:
            self.in_force = policy.name
            applied = self.options.describe(policy.compute_dtype)
            say(f"{place()} uses {policy.name}, which the script sets; from here on {applied}")
        own = {layer.name: layer.dtype_policy.name for layer in model._flatten_layers() if _has_own(layer, policy)}
        name, dtype = next(iter(own.items()), ("", ""))
        if own and place() not in self._reported:
            self._reported.add(place())
            others = f" and {len(own) - 1} more layers" if len(own) > 1 else ""
            say(f"{place()} compiles layer {name!r}{others} with the script's dtype ({dtype}), which is kept")


def _has_own(layer: Any, policy: Any) -> bool:
    import keras

    own = layer.dtype_policy
    is_input = isinstance(layer, keras.layers.InputLayer) or type(layer).__module__.startswith("tfmixed.")
    return not is_input and own.name != policy.name and "float" in str(getattr(own, "compute_dtype", None))
