"""Checkpoints of float32 runs in mixed ones, and back; those of TensorFlow's own wrapper too.

    python -m tfmixed.compat.v1.checkpoints to-mixed run/model.ckpt-1000 mixed/model.ckpt-1000
    python -m tfmixed.compat.v1.checkpoints to-float32 mixed/model.ckpt-1000 float32/model.ckpt-1000

The first file then lacks nothing that a mixed run asks for, so that a plain `Saver` or a `MonitoredTrainingSession`
restores it. The way back needs no command where a plain `Saver` reads: it takes what it knows and leaves the rest.
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
from tfmixed.compat.v1.graphs import SCOPE
from tfmixed.compat.v1.scales import scalings_of
from tfmixed.scaling import validation

V1 = tf.compat.v1
# Ours, and what TensorFlow's DynamicLossScale has in its place.
_THEIRS = {"dynamic_scale": "current_loss_scale", "step_counter": "good_steps"}
_OURS = re.compile(rf"(?:^|/){SCOPE}((?:_\d+)?)/(\w+)$")
_SCALING = re.compile(r"(?P<before>^|.*/)(?:current_loss_scale|good_steps)(?P<after>_\d+)?$")


def restorer(path: str | Path) -> Callable[[Any], None]:
    """Returns a function that restores a session from a checkpoint; to be called when the graph is complete.

    Args:
        path: Of the checkpoint, as a `Saver` returned it: one of a float32 run, of a mixed one, or of TensorFlow's own
            `MixedPrecisionLossScaleOptimizer`. Variables of the scaling that it lacks start afresh.

    Raises:
        ValueError: It lacks another variable of the graph, or `path` is no checkpoint.

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
        raise ValueError(f"path must be a checkpoint that has {', '.join(missing)}, received {str(path)!r}")
    # As a list, for of a partitioned variable several share a name; and two may be read from one of TensorFlow's.
    direct = [variable for variable in V1.global_variables() if _saved_as(variable) in saved]
    savers = [V1.train.Saver(each) for each in (direct, {others[name]: own[name] for name in others}) if each]
    fresh = V1.variables_initializer([own[name] for name in own.keys() - saved - others.keys()])

    def restore(session: Any) -> None:
        session.run(fresh)
        for saver in savers:
            saver.restore(session, str(path))

    return restore


def to_mixed(source: str | Path, target: str | Path, loss_scale: Any = "dynamic", optimizers: int = 1) -> list[str]:
    """Writes the checkpoint of a float32 run, or of TensorFlow's own wrapper, as one of a mixed run.

    It becomes the latest of its folder, as one that a `Saver` writes. Where the loss scale is dynamic it has the
    variables of TensorFlow's `DynamicLossScale` too, for scripts that make one.

    Args:
        source: The checkpoint.
        target: Where to write.
        loss_scale: That of the mixed run, as for its optimizer.
        optimizers: How many scale their losses in one graph, each with a scale of its own, as those of a GAN.

    Returns:
        The names of the variables that were added.

    Raises:
        ValueError: `source` is no checkpoint of a `Saver`, `target` is one already, `loss_scale` is none, or
            `optimizers` is below 1.
    """
    validation.count("optimizers", optimizers, 1)
    values, wanted = _read(source), dict[str, Any]()
    with tf.Graph().as_default(), V1.Session() as session:
        state = scalings_of(loss_scale).here()
        session.run(V1.global_variables_initializer())
        fresh = {each.value.op.name.split("/")[-1]: session.run(each.value) for each in state.variables.values()}
    for suffix in ["", *(f"_{number}" for number in range(1, optimizers))]:
        wanted |= {f"{SCOPE}{suffix}/{name}": value for name, value in fresh.items()}
        for ours, theirs in _THEIRS.items() if "step_counter" in state.variables else ():
            own, their = f"{SCOPE}{suffix}/{ours}", theirs + suffix
            wanted[own] = wanted[their] = values.get(their, values.get(own, wanted[own]))
    added = {name: value for name, value in wanted.items() if name not in values}
    _write(target, {**values, **added})
    return sorted(added)


def to_float32(source: str | Path, target: str | Path) -> list[str]:
    """Writes the checkpoint of a mixed run as one of a float32 run; returns the names of what was left out.

    Args:
        source: The checkpoint, of this package or of TensorFlow's own wrapper.
        target: Where to write. It becomes the latest of its folder.

    Raises:
        ValueError: `source` is no checkpoint of a `Saver`, or `target` is one already.
    """
    values = _read(source)
    left_out = sorted(name for name in values if _of_scaling(name, values))
    _write(target, {name: values[name] for name in values.keys() - set(left_out)})
    return left_out


def _renamed(wanted: Collection[str], saved: Collection[str]) -> dict[str, str]:
    """Returns under which name the checkpoint has variables that it lacks under their own."""
    plain, found = _unbranched(saved), {}
    for name in wanted:
        ours = _OURS.search(name)
        other = _THEIRS.get(ours[2], "") + ours[1] if ours else plain.get(name, "")
        if other in saved:
            found[name] = other
    return found


def _unbranched(saved: Collection[str]) -> dict[str, str]:
    """Returns the names that variables would have outside of the branches of TensorFlow's wrapper, and their own.

    It makes the optimizer's own variables within its conditional, under whose name they stand then. Those of a second
    optimizer have a number outside: `cond_1/beta1_power` and `cond_3/beta1_power` are `beta1_power` and
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
    """Returns whether a variable is one of ours, or of a `DynamicLossScale` of TensorFlow: that has two."""
    theirs = _SCALING.match(name)
    pair = [f"{theirs['before']}{each}{theirs['after'] or ''}" for each in _THEIRS.values()] if theirs else [""]
    return bool(_OURS.search(name)) or all(each in names for each in pair)


def _saved_as(variable: Any) -> str:
    part = variable._get_save_slice_info()
    return str(part.full_name if part else variable.op.name)


def _names(path: str | Path, argument: str) -> set[str]:
    try:
        return set(tf.train.load_checkpoint(str(path)).get_variable_to_shape_map())
    except (tf.errors.OpError, ValueError) as error:
        raise _no_checkpoint(argument, path, error) from None


def _read(path: str | Path) -> dict[str, Any]:
    names = _names(path, "source")
    if "_CHECKPOINTABLE_OBJECT_GRAPH" in names:
        raise ValueError(f"source must be a checkpoint of a Saver, received one of tf.train.Checkpoint: {str(path)!r}")
    reader = tf.train.load_checkpoint(str(path))
    try:
        values = {name: reader.get_tensor(name) for name in names}
    except (tf.errors.OpError, IndexError, RuntimeError) as error:
        raise _no_checkpoint("source", path, error) from None
    if not any(_SCALING.match(name) and _of_scaling(name, names) for name in names):
        return values
    # Under both names: a layer may be called `cond` too.
    return {plain: values[name] for plain, name in _unbranched(names).items()} | values


def _no_checkpoint(argument: str, path: str | Path, error: Exception) -> ValueError:
    return ValueError(
        f"{argument} must be a checkpoint that is whole, by its name without the endings of its files, received "
        f"{str(path)!r}: {error}"
    )


def _write(path: str | Path, values: Mapping[str, Any]) -> None:
    """Writes a checkpoint, which nobody finds before it is whole: its index comes last."""
    if Path(f"{path}.index").exists():
        raise ValueError(f"target must be a new checkpoint, received {str(path)!r}, which exists")
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    with tf.Graph().as_default(), V1.Session() as session:
        # Fed, because a graph that holds them may have 2 GB and no more.
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
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tfmixed.compat.v1.checkpoints", description=__doc__.splitlines()[0]
    )
    parser.add_argument("direction", choices=("to-mixed", "to-float32"))
    parser.add_argument("source", help="a checkpoint, without the ending of its files")
    parser.add_argument("target", help="a new one")
    parser.add_argument(
        "--loss-scale", default="dynamic", type=_loss_scale, help='"dynamic" or a number (default: %(default)s)'
    )
    parser.add_argument(
        "--optimizers", default=1, type=int, help="how many scale in one graph, as in a GAN (default: %(default)s)"
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
