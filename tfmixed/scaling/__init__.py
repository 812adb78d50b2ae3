"""Loss-scaling rules as values: pure state transitions with no framework in them.

A rule defines how the loss scale changes from one training step to the next:

    state = rule.start()
    state = rule.next(state, finite)  # after each step; the next loss is multiplied by state.scale

`next` selects with `where` and never branches on a tensor. The same code runs on NumPy, TensorFlow (eager,
`tf.function` and TF1 graphs) and `keras.ops`, so `simulate` predicts the scales of a training run. `DynamicScale` gives
bit-identical scales on all of them, except on JAX with factors that float32 cannot represent. `LogMaxScale` differs by
the rounding of each framework's logarithm and exponential.
"""

from tfmixed.records.scale_history import ScaleHistory
from tfmixed.scaling.base import ScalingRule
from tfmixed.scaling.constant import ConstantScale, ConstantState
from tfmixed.scaling.dynamic import DynamicScale, DynamicState
from tfmixed.scaling.logmax import LogMaxScale, LogMaxState
from tfmixed.scaling.presets import PEERS, RULES, get, like
from tfmixed.scaling.replay import simulate

__all__ = [
    "PEERS",
    "RULES",
    "ConstantScale",
    "ConstantState",
    "DynamicScale",
    "DynamicState",
    "LogMaxScale",
    "LogMaxState",
    "ScaleHistory",
    "ScalingRule",
    "get",
    "like",
    "simulate",
]
