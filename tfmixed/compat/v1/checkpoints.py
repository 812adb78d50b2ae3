"""Checkpoints of float32 runs in mixed ones, and back; those of TensorFlow's own wrapper too.

    python -m tfmixed.compat.v1.checkpoints to-mixed run/model.ckpt-1000 mixed/model.ckpt-1000
    python -m tfmixed.compat.v1.checkpoints to-float32 mixed/model.ckpt-1000 run/model.ckpt-1000

The first file then lacks nothing that a mixed run asks for, so that a plain `Saver` or a `MonitoredTrainingSession`
restores it. The way back needs no command where a plain `Saver` reads: it takes what it knows and leaves the rest.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import tensorflow as tf

from tfmixed.compat.v1.graphs import SCOPE
from tfmixed.compat.v1.scales import scalings_of

V1 = tf.compat.v1
# Ours, and what TensorFlow's DynamicLossScale has in its place.
_THEIRS = {"dynamic_scale": "current_loss_scale", "step_counter": "good_steps"}
_OURS = re.compile(rf"(?:^|/){SCOPE}((?:_\d+)?)/(\w+)$")
_SCALING = re.compile(rf"(^|/)({'|'.join(_THEIRS.values())})(_\d+)?$")


def restorer(path: str | Path) -> Callable[[Any], None]:
    """Returns a function that restores a session from a checkpoint; to be called when the graph is complete.

    Args:
        path: Of the checkpoint, as a `Saver` returned it: one of a float32 run, of a mixed one, or of TensorFlow's own
            `MixedPrecisionLossScaleOptimizer`. Variables of the scaling that it lacks start afresh.

    Raises:
        ValueError: It lacks another variable of the graph.

    Example:
    >>> import tempfile
    >>> with tf.Graph().as_default(), V1.Session() as session, tempfile.TemporaryDirectory() as folder:
    ...     weight = V1.get_variable("weight", initializer=1.0)
    ...     session.run(V1.global_variables_initializer())
    ...     path = V1.train.Saver().save(session, folder + "/model.ckpt")
    ...     _ = session.run(weight.assign(2.0))
    ...     restorer(path)(session)
    ...     print(session.run(weight))
    1.0
    """
    variables = {variable.op.name: variable for variable in V1.global_variables()}
    found = _matched(variables, tf.train.load_checkpoint(str(path)).get_variable_to_shape_map(), path)
    saver = V1.train.Saver({name: variables[own] for own, name in found.items()})
    fresh = V1.variables_initializer([variables[name] for name in variables.keys() - found.keys()])

    def restore(session: Any) -> None:
        session.run(fresh)
        saver.restore(session, str(path))

    return restore


def to_mixed(source: str | Path, target: str | Path, loss_scale: Any = "dynamic") -> list[str]:
    """Writes the checkpoint of a float32 run, or of TensorFlow's own wrapper, as one of a mixed run.

    Args:
        source: The checkpoint.
        target: Where to write.
        loss_scale: That of the mixed run, as for its optimizer.

    Returns:
        The names of the variables that were added.
    """
    values = {_unbranched(name): value for name, value in _read(source).items()}
    with tf.Graph().as_default(), V1.Session() as session:
        state = scalings_of(loss_scale).here()
        session.run(V1.global_variables_initializer())
        added = {each.value.op.name: session.run(each.value) for each in state.variables.values()}
    for ours, theirs in _THEIRS.items():
        if theirs in values and f"{SCOPE}/{ours}" in added:
            added[f"{SCOPE}/{ours}"] = values.pop(theirs)
    added = {name: value for name, value in added.items() if name not in values}
    _write(target, {**values, **added})
    return sorted(added)


def to_float32(source: str | Path, target: str | Path) -> list[str]:
    """Writes the checkpoint of a mixed run as one of a float32 run; returns the names of what was left out.

    Args:
        source: The checkpoint, of this package or of TensorFlow's own wrapper.
        target: Where to write.
    """
    values = _read(source)
    left_out = sorted(name for name in values if _OURS.search(name) or _SCALING.search(name))
    _write(target, {_unbranched(name): values[name] for name in values.keys() - set(left_out)})
    return left_out


def _matched(variables: Mapping[str, Any], saved: Mapping[str, Any], path: str | Path) -> dict[str, str]:
    """Returns the name in the checkpoint of each variable that it has."""
    plain = {_unbranched(name): name for name in saved}
    found = {}
    for own in variables:
        ours = _OURS.search(own)
        theirs = f"{_THEIRS.get(ours[2])}{ours[1]}" if ours else None
        name = own if own in saved else plain.get(own, theirs)
        if name is not None and name in saved:
            found[own] = name
    missing = sorted(name for name in variables.keys() - found.keys() if not _OURS.search(name))
    if missing:
        raise ValueError(f"path must be a checkpoint that has {', '.join(missing)}, received {str(path)!r}")
    return found


def _unbranched(name: str) -> str:
    # TensorFlow's wrapper makes the optimizer's own variables within its conditional, under whose name they stand then.
    return re.sub(r"(^|/)cond(_\d+)?/(?=\w+$)", r"\1", name)


def _read(path: str | Path) -> dict[str, Any]:
    reader = tf.train.load_checkpoint(str(path))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def _write(path: str | Path, values: Mapping[str, Any]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tf.Graph().as_default(), V1.Session() as session:
        tensors = [tf.constant(numpy.asarray(value)) for value in values.values()]
        session.run(
            tf.raw_ops.SaveV2(
                prefix=str(path), tensor_names=list(values), shape_and_slices=[""] * len(values), tensors=tensors
            )
        )


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tfmixed.compat.v1.checkpoints", description=__doc__.splitlines()[0]
    )
    parser.add_argument("direction", choices=("to-mixed", "to-float32"))
    parser.add_argument("source", help="a checkpoint, without the ending of its files")
    parser.add_argument("target")
    parser.add_argument("--loss-scale", default="dynamic", help='"dynamic" or a number (default: %(default)s)')
    given = parser.parse_args()
    if given.direction == "to-float32":
        print("left out:", *to_float32(given.source, given.target))
    else:
        scale = given.loss_scale if given.loss_scale == "dynamic" else float(given.loss_scale)
        print("added:", *to_mixed(given.source, given.target, scale))


if __name__ == "__main__":
    main()
