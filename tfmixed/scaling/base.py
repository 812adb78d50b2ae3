"""`ScalingRule`, the base class of all loss-scaling rules."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, ClassVar, cast

import numpy


class ScalingRule:
    """Base class of loss-scaling rules. A subclass is a frozen dataclass with `start`, `next` and `bounds`.

    Subclasses are registered by class name, so that a saved optimizer can be restored.
    """

    needs_amax: ClassVar[bool] = False
    skip_nonfinite: bool = True
    _classes: ClassVar[dict[str, type[ScalingRule]]] = {}

    def __init_subclass__(cls) -> None:
        ScalingRule._classes[cls.__name__] = cls

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest scale that this rule can reach."""
        raise NotImplementedError

    def start(self) -> Any:
        """Returns the initial state: a NamedTuple of NumPy scalars whose first field is `scale`."""
        raise NotImplementedError

    def next(self, state: Any, finite: Any, amax: Any = None, xp: Any = numpy) -> Any:
        """Returns the state after one training step.

        Args:
            state: The state before the step.
            finite: A boolean scalar, true if all unscaled gradients are finite.
            amax: A float32 scalar, the largest absolute unscaled gradient. Required if `needs_amax` is true.
                Defaults to None.
            xp: The array module: `numpy`, `tensorflow` or `keras.ops`. Defaults to `numpy`.
        """
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """Returns a dictionary from which `scaling.get` restores an equal rule."""
        return {"rule": type(self).__name__, **asdict(cast("Any", self))}

    @staticmethod
    def from_config(config: dict[str, Any]) -> ScalingRule:
        """Returns the rule that `get_config` described.

        Raises:
            ValueError: If the class is not registered or the fields do not match its constructor.
        """
        values = dict(config)
        name = values.pop("rule", None)
        if not isinstance(name, str) or name not in ScalingRule._classes:
            raise ValueError(f"`rule` must be one of {', '.join(ScalingRule._classes)}. Received: rule={name!r}")
        rule = ScalingRule._classes[name]
        try:
            return rule(**values)
        except TypeError:
            names = ", ".join(field.name for field in fields(cast("Any", rule)))
            raise ValueError(f"The parameters of {name} are {names}. Received: {', '.join(values) or 'none'}") from None
