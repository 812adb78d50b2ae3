"""Conversion of checkpoints between float32 and mixed precision runs, and from TensorFlow's own wrapper.

    python -m tfmixed.compat.v1.checkpoints to-mixed run/model.ckpt-1000 mixed/model.ckpt-1000
    python -m tfmixed.compat.v1.checkpoints to-float32 mixed/model.ckpt-1000 float32/model.ckpt-1000

A plain `Saver` or a `MonitoredTrainingSession` of a mixed run restores the first file. A plain `Saver` of a float32 run
reads a mixed checkpoint without conversion, because it ignores the variables that it does not know.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy
import tensorflow as tf

from tfmixed._utils import atomic_write
from tfmixed.compat.v1.graph_state import SCOPE
from tfmixed.compat.v1.loss_scale import states_of
from tfmixed.scaling import validation

V1 = tf.compat.v1
# The state of the scale, and the variables of TensorFlow's DynamicLossScale for the same.
_THEIRS = {"dynamic_scale": "current_loss_scale", "step_counter": "good_steps"}
_OURS = re.compile(rf"(?:^|/){SCOPE}((?:_\d+)?)/(\w+)$")
_SCALING = re.compile(r"(?P<before>^|.*/)(?:current_loss_scale|good_steps)(?P<after>_\d+)?$")


def restorer(path: str | Path) -> Callable[[Any], None]:
    """Returns a function that restores a session from a checkpoint. Call this when the graph is complete.

    Args:
        path: The checkpoint, as a `Saver` returned it. It may be of a float32 run, a mixed run, or TensorFlow's own
            `MixedPrecisionLossScaleOptimizer`. Missing variables of the loss scaling get their initial values.

    Raises:
        ValueError: If any other variable of the graph is missing, or `path` is not a checkpoint.

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
    saved = _names(path, "path")
    own = {_saved_as(variable): variable for variable in V1.global_variables()}
    others = _renamed(own.keys() - saved, saved)
    missing = sorted(name for name in own.keys() - saved - others.keys() if not _of_scaling(name, own))
    if missing:
        raise ValueError(
            f"`path` must be a checkpoint of this model, with {', '.join(missing)}. Received: path={str(path)!r}."
        )
    # Lists, because the parts of a partitioned variable share a name, and two variables may be read from one of
    # TensorFlow's.
    direct = [variable for variable in V1.global_variables() if _saved_as(variable) in saved]
    savers = [
        V1.train.Saver(variables) for variables in (direct, {others[name]: own[name] for name in others}) if variables
    ]
    fresh = V1.variables_initializer([own[name] for name in own.keys() - saved - others.keys()])

    def restore(session: Any) -> None:
        session.run(fresh)
        for saver in savers:
            saver.restore(session, str(path))

    return restore


def to_mixed(source: str | Path, target: str | Path, loss_scale: Any = "dynamic", optimizers: int = 1) -> list[str]:
    """Converts a checkpoint of a float32 run, or of TensorFlow's own wrapper, to one of a mixed precision run.

    The result becomes the latest checkpoint of its folder. For a dynamic loss scale it also has the variables of
    TensorFlow's `DynamicLossScale`, for scripts that create one.

    Args:
        source: The checkpoint to read.
        target: The checkpoint to write.
        loss_scale: The loss scale of the mixed run, as for its optimizer. Defaults to `"dynamic"`.
        optimizers: The number of optimizers in the graph that have a scale of their own, as in a GAN. Defaults to 1.

    Returns:
        The names of the added variables.

    Raises:
        ValueError: If `source` is not a checkpoint of a `Saver`, `target` exists, `loss_scale` is invalid, or
            `optimizers` is less than 1.
    """
    validation.count("optimizers", optimizers, 1)
    values, wanted = _read(source), dict[str, Any]()
    with tf.Graph().as_default(), V1.Session() as session:
        state = states_of(loss_scale).here()
        session.run(V1.global_variables_initializer())
        fresh = {
            variable.value.op.name.split("/")[-1]: session.run(variable.value) for variable in state.variables.values()
        }
    for suffix in ["", *(f"_{number}" for number in range(1, optimizers))]:
        wanted |= {f"{SCOPE}{suffix}/{name}": value for name, value in fresh.items()}
        for ours, theirs in _THEIRS.items() if "step_counter" in state.variables else ():
            own, their = f"{SCOPE}{suffix}/{ours}", theirs + suffix
            wanted[own] = wanted[their] = values.get(their, values.get(own, wanted[own]))
    added = {name: value for name, value in wanted.items() if name not in values}
    _write(target, {**values, **added})
    return sorted(added)


def to_float32(source: str | Path, target: str | Path) -> list[str]:
    """Converts a checkpoint of a mixed precision run to one of a float32 run.

    Args:
        source: The checkpoint to read, of this package or of TensorFlow's own wrapper.
        target: The checkpoint to write. It becomes the latest of its folder.

    Returns:
        The names of the variables that are left out.

    Raises:
        ValueError: If `source` is not a checkpoint of a `Saver`, or `target` exists.
    """
    values = _read(source)
    left_out = sorted(name for name in values if _of_scaling(name, values))
    _write(target, {name: values[name] for name in values.keys() - set(left_out)})
    return left_out


def _renamed(wanted: Collection[str], saved: Collection[str]) -> dict[str, str]:
    """Returns the names under which a checkpoint has variables that it lacks under their own names."""
    plain, found = _unbranched(saved), {}
    for name in wanted:
        ours = _OURS.search(name)
        saved_name = _THEIRS.get(ours[2], "") + ours[1] if ours else plain.get(name, "")
        if saved_name in saved:
            found[name] = saved_name
    return found


def _unbranched(saved: Collection[str]) -> dict[str, str]:
    """Maps the names that variables have without the conditionals of TensorFlow's wrapper to their saved names.

    The wrapper creates the variables of its optimizer inside a conditional, in the scope of that. Without it, those of
    a second optimizer are numbered: `cond_1/beta1_power` and `cond_3/beta1_power` are `beta1_power` and
    `beta1_power_1`.
    """
    alike: dict[str, list[str]] = {}
    for name in sorted(saved, key=lambda name: [int(number) for number in re.findall(r"cond_(\d+)/", name)]):
        plain = re.sub(r"(^|/)(?:cond(?:_\d+)?/)+(?=\w+$)", r"\1", name)
        if plain not in saved:
            alike.setdefault(plain, []).append(name)
    return {
        f"{plain}_{number}" if number else plain: name
        for plain, names in alike.items()
        for number, name in enumerate(names)
    }


def _of_scaling(name: str, names: Collection[str]) -> bool:
    """Returns whether a variable belongs to the loss scaling of this package or of TensorFlow.

    A `DynamicLossScale` of TensorFlow always has two variables.
    """
    theirs = _SCALING.match(name)
    pair = [f"{theirs['before']}{part}{theirs['after'] or ''}" for part in _THEIRS.values()] if theirs else [""]
    return bool(_OURS.search(name)) or all(part in names for part in pair)


def _saved_as(variable: Any) -> str:
    part = variable._get_save_slice_info()
    return str(part.full_name if part else variable.op.name)


def _names(path: str | Path, argument: str) -> set[str]:
    try:
        return set(tf.train.load_checkpoint(str(path)).get_variable_to_shape_map())
    except (tf.errors.OpError, ValueError) as error:
        raise _not_a_checkpoint(argument, path, error) from None


def _read(path: str | Path) -> dict[str, Any]:
    names = _names(path, "source")
    if "_CHECKPOINTABLE_OBJECT_GRAPH" in names:
        raise ValueError(
            f"`source` must be a checkpoint of a Saver, not of tf.train.Checkpoint. Received: source={str(path)!r}."
        )
    reader = tf.train.load_checkpoint(str(path))
    try:
        values = {name: reader.get_tensor(name) for name in names}
    except (tf.errors.OpError, IndexError, RuntimeError) as error:
        raise _not_a_checkpoint("source", path, error) from None
    if not any(_SCALING.match(name) and _of_scaling(name, names) for name in names):
        return values
    # Under both names, because a layer may be called `cond`.
    return {plain: values[name] for plain, name in _unbranched(names).items()} | values


def _not_a_checkpoint(argument: str, path: str | Path, error: Exception) -> ValueError:
    return ValueError(
        f"`{argument}` must be a complete checkpoint, named without the suffixes of its files. "
        f"Received: {argument}={str(path)!r} ({error})."
    )


def _write(path: str | Path, values: Mapping[str, Any]) -> None:
    """Writes a checkpoint. TensorFlow writes its index last, so an incomplete checkpoint is not found."""
    if Path(f"{path}.index").exists():
        raise ValueError(f"`target` must be a new checkpoint, and this one exists. Received: target={str(path)!r}.")
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    with tf.Graph().as_default(), V1.Session() as session:
        # Fed, because a graph is limited to 2 GB.
        fed = {V1.placeholder(numpy.asarray(value).dtype): value for value in values.values()}
        save = tf.raw_ops.SaveV2(
            prefix=str(path), tensor_names=list(values), shape_and_slices=[""] * len(values), tensors=list(fed)
        )
        session.run(save, fed)
    known = V1.train.get_checkpoint_state(str(folder))
    older = list(known.all_model_checkpoint_paths) if known else []
    state = V1.train.generate_checkpoint_state_proto(str(folder), str(path), [*older, str(path)])
    atomic_write.write_text(folder / "checkpoint", str(state))


def _loss_scale(text: str) -> str | float:
    return text if text == "dynamic" else float(text)


def main() -> None:
    """Runs the command-line interface."""
    parser = argparse.ArgumentParser(
        prog="python -m tfmixed.compat.v1.checkpoints", description=__doc__.splitlines()[0]
    )
    parser.add_argument("direction", choices=("to-mixed", "to-float32"))
    parser.add_argument("source", help="the checkpoint to read, named without the suffixes of its files")
    parser.add_argument("target", help="the checkpoint to write")
    parser.add_argument(
        "--loss-scale", default="dynamic", type=_loss_scale, help='"dynamic" or a number (default: %(default)s)'
    )
    parser.add_argument(
        "--optimizers",
        default=1,
        type=int,
        help="number of optimizers that scale in the graph (default: %(default)s)",
    )
    given = parser.parse_args()
    try:
        if given.direction == "to-float32":
            print("left out:", *to_float32(given.source, given.target))
        else:
            print("added:", *to_mixed(given.source, given.target, given.loss_scale, given.optimizers))
    except (OSError, ValueError, tf.errors.OpError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
