"""Checkpoints of float32 runs, mixed precision runs and TensorFlow's own wrapper, restored in one another."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import tensorflow as tf
import tf1
from tf1 import V1, X, Y
from thorough import covering

from tfmixed.compat.v1 import LossScaleOptimizer, checkpoints
from tfmixed.scaling import DynamicScale

RULE = DynamicScale(initial_scale=64.0, growth_interval=3)


def theirs(opt):
    return V1.mixed_precision.MixedPrecisionLossScaleOptimizer(opt, V1.mixed_precision.DynamicLossScale(64.0, 3))


RUNS = {"float32": lambda opt: opt, "mixed": lambda opt: LossScaleOptimizer(opt, RULE), "theirs": theirs}


def build(kind):
    x, y, loss = tf1.network()
    opt = RUNS[kind](V1.train.AdamOptimizer(0.05))
    train = opt.minimize(loss, V1.train.get_or_create_global_step())
    return opt, train, loss, {x: X, y: Y}


def saved(kind, folder, steps=4):
    """Trains and saves. Returns the path, and the losses of the next steps."""
    with tf.Graph().as_default():
        _, train, loss, feed = build(kind)
        with tf1.session() as session:
            for _ in range(steps):
                session.run(train, feed)
            path = V1.train.Saver().save(session, str(folder / kind / "model.ckpt"), global_step=steps)
            return path, [session.run([loss, train], feed)[0] for _ in range(3)]


def continued(kind, restore, *fetches):
    """Returns the losses of a run that resumes from a checkpoint, and the values fetched at its start."""
    with tf.Graph().as_default():
        opt, train, loss, feed = build(kind)
        restore = restore()
        with tf1.session() as session:
            restore(session)
            values = session.run([getattr(opt, name) for name in fetches])
            return [session.run([loss, train], feed)[0] for _ in range(3)], values


def by_saver(path):
    return lambda: lambda session: V1.train.Saver().restore(session, path)


def by_restorer(path):
    return lambda: checkpoints.restorer(path)


@pytest.mark.slow
def test_a_mixed_checkpoint_restores_into_a_float32_run(tmp_path):
    """With a plain `Saver`, because the names are the same."""
    path, losses = saved("mixed", tmp_path)
    np.testing.assert_allclose(continued("float32", by_saver(path))[0], losses, rtol=1e-4)


@pytest.mark.parametrize("kind", tf1.some(["float32"], {kind: kind for kind in RUNS}))
def test_each_checkpoint_restores_into_a_mixed_run(tmp_path, kind):
    """Missing variables get initial values. The scale and good steps of TensorFlow are restored."""
    path, losses = saved(kind, tmp_path)
    again, (scale, attempted) = continued("mixed", by_restorer(path), "loss_scale", "attempted_steps")
    np.testing.assert_allclose(again, losses, rtol=1e-4)
    assert scale == (64.0 if kind == "float32" else 128.0)
    assert attempted == (4 if kind == "mixed" else 0)


@pytest.mark.parametrize("kind", tf1.some(["theirs"], {kind: kind for kind in ("float32", "theirs")}))
def test_converted_checkpoint_restores_with_a_plain_saver(tmp_path, kind):
    """All variables of the mixed run are there."""
    path, losses = saved(kind, tmp_path)
    target = str(tmp_path / "written" / "model.ckpt-4")
    added = checkpoints.to_mixed(path, target, RULE)
    assert "tfmixed/attempted_steps" in added
    again, (scale,) = continued("mixed", by_saver(target), "loss_scale")
    np.testing.assert_allclose(again, losses, rtol=1e-4)
    assert scale == (64.0 if kind == "float32" else 128.0)


@pytest.mark.slow
def test_converted_checkpoint_restores_into_a_monitored_session(tmp_path):
    """The session is unchanged, and finds the latest checkpoint of its folder."""
    path, losses = saved("float32", tmp_path)
    checkpoints.to_mixed(path, str(tmp_path / "written" / "model.ckpt-4"), RULE)
    with tf.Graph().as_default():
        _, train, loss, feed = build("mixed")
        with V1.train.MonitoredTrainingSession(
            checkpoint_dir=str(tmp_path / "written"), save_checkpoint_secs=None, log_step_count_steps=None
        ) as session:
            assert session.run(V1.train.get_global_step()) == 4
            np.testing.assert_allclose(session.run([loss, train], feed)[0], losses[0], rtol=1e-4)


@pytest.mark.parametrize("kind", tf1.some(["mixed"], {kind: kind for kind in ("mixed", "theirs")}))
def test_conversion_to_float32(tmp_path, kind):
    """Removes all variables of the scaling."""
    path, losses = saved(kind, tmp_path)
    target = str(tmp_path / "plain" / "model.ckpt")
    assert checkpoints.to_float32(path, target)
    names = {name for name, _ in tf.train.list_variables(target)}
    assert not any("tfmixed" in name or "loss_scale" in name for name in names)
    np.testing.assert_allclose(continued("float32", by_saver(target))[0], losses, rtol=1e-4)


@pytest.mark.slow
def test_a_monitored_session_restores_through_its_scaffold(tmp_path):
    """The graph is finalized before the session is created."""
    path, losses = saved("float32", tmp_path)
    with tf.Graph().as_default():
        _, train, loss, feed = build("mixed")
        restore = checkpoints.restorer(path)
        scaffold = V1.train.Scaffold(init_fn=lambda _, session: restore(session))
        with V1.train.MonitoredTrainingSession(scaffold=scaffold) as session:
            np.testing.assert_allclose(session.run([loss, train], feed)[0], losses[0], rtol=1e-4)


def test_missing_variables_are_named(tmp_path):
    """The checkpoint is of another model."""
    path, _ = saved("float32", tmp_path)
    with tf.Graph().as_default():
        V1.get_variable("other", initializer=1.0)
        with pytest.raises(ValueError, match="other"):
            checkpoints.restorer(path)


# Other models.


def other(wrap, cond=False, partitioner=None):
    """Returns the optimizer and the step of a model, optionally with a layer `cond` or partitioned variables."""
    with V1.variable_scope("net", partitioner=partitioner):
        kernel = V1.get_variable("kernel", [8, 2], initializer=V1.ones_initializer())
        loss = tf.reduce_sum(tf.convert_to_tensor(kernel))
        if cond:
            with V1.variable_scope("cond"):
                loss += tf.reduce_sum(V1.get_variable("kernel", [3], initializer=V1.zeros_initializer()))
    opt = wrap(V1.train.AdamOptimizer(0.5))
    return opt, opt.minimize(loss, V1.train.get_or_create_global_step())


def other_saved(path, wrap, sharded=False, **arguments):
    """Takes two steps and saves. Returns the path, and the weights of all layers."""
    with tf.Graph().as_default():
        _, train = other(wrap, **arguments)
        with tf1.session() as session:
            for _ in range(2):
                session.run(train)
            path = V1.train.Saver(sharded=sharded).save(session, str(path))
            return path, session.run(V1.trainable_variables())


def other_restored(restore, wrap, **arguments):
    """Returns the weights of all layers, and the scale."""
    with tf.Graph().as_default():
        opt, _ = other(wrap, **arguments)
        restore = restore()
        with tf1.session() as session:
            restore(session)
            return session.run(V1.trainable_variables()), session.run(getattr(opt, "loss_scale", tf.constant(0.0)))


def ours(opt):
    return LossScaleOptimizer(opt, RULE)


def with_theirs(opt):
    """Our optimizer with a loss scale object of TensorFlow, which has its own variables."""
    return LossScaleOptimizer(opt, V1.mixed_precision.DynamicLossScale(64.0, 1))


MODELS = {"cond": {"cond": True}, "partitioned": {"partitioner": V1.fixed_size_partitioner(2)}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "wrap", "how"), covering(2, MODELS, {"ours": ours, "theirs": theirs}, ["restorer", "command", "back"])
)
def test_a_layer_called_cond_and_partitioned_variables_keep_their_names(tmp_path, model, wrap, how):
    """A scope of the model is not a conditional of TensorFlow's wrapper."""
    path, weights = other_saved(
        tmp_path / "model.ckpt", wrap if how == "back" or wrap is theirs else RUNS["float32"], **model
    )
    target = str(tmp_path / "target.ckpt")
    if how == "back":
        checkpoints.to_float32(path, target)
        got, _ = other_restored(by_saver(target), RUNS["float32"], **model)
    elif how == "command":
        checkpoints.to_mixed(path, target, RULE)
        got, _ = other_restored(by_saver(target), ours, **model)
    else:
        got, _ = other_restored(by_restorer(path), ours, **model)
    for one, another in zip(got, weights, strict=True):
        np.testing.assert_array_equal(one, another)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "how"),
    covering(
        1,
        {
            "float32": (RUNS["float32"], 64.0),
            "theirs": (theirs, 64.0),
            "ours": (ours, 64.0),
            "with_theirs": (with_theirs, 256.0),
        },
        ["restorer", "command"],
    ),
)
def test_a_run_with_a_loss_scale_of_tensorflow_restores_each(tmp_path, run, how):
    """Its variables are in the graph, too."""
    source, scale = run
    path, weights = other_saved(tmp_path / "model.ckpt", source)
    if how == "command":
        checkpoints.to_mixed(path, tmp_path / "target.ckpt", RULE)
        restore = by_saver(str(tmp_path / "target.ckpt"))
    else:
        restore = by_restorer(path)
    got, restored = other_restored(restore, with_theirs)
    np.testing.assert_array_equal(got[0], weights[0])
    assert restored == scale


def two(wrap):
    """Returns the steps of two optimizers in one graph, as in a GAN, and their `beta1_power` variables."""
    steps = [
        wrap(V1.train.AdamOptimizer(0.5, beta1=beta1)).minimize(V1.get_variable(name, initializer=1.0) ** 2)
        for name, beta1 in (("critic", 0.5), ("generator", 0.25))
    ]
    return steps, [variable for variable in V1.global_variables() if "beta1_power" in variable.name]


TWO = """
import sys
import numpy as np
import tensorflow as tf
getattr(tf.compat.v1, sys.argv[1])()
import test_v1_checkpoints as tests
from tfmixed.compat.v1 import checkpoints
from test_v1_checkpoints import RUNS, V1

for kind in ("float32", "theirs", "mixed"):
    path = f"{sys.argv[2]}/{kind}/model.ckpt"
    with tf.Graph().as_default():
        steps, decays = tests.two(RUNS[kind])
        with tests.tf1.session() as session:
            for number in (0, 0, 1):
                session.run(steps[number])
            expected = session.run([*decays, *V1.trainable_variables()])
            V1.train.Saver().save(session, path)
    assert len({*expected}) == 4, expected
    if kind != "mixed":
        checkpoints.to_mixed(path, path + "-mixed", optimizers=2)
    with tf.Graph().as_default():
        steps, decays = tests.two(RUNS["mixed"])
        for restore in (checkpoints.restorer(path), tests.by_saver(path + ("" if kind == "mixed" else "-mixed"))()):
            with tests.tf1.session() as session:
                restore(session)
                np.testing.assert_array_equal(session.run([*decays, *V1.trainable_variables()]), expected)
                session.run(steps)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("switch", ["disable_v2_behavior", "disable_eager_execution"])
def test_two_optimizers_in_one_graph(tmp_path, switch):
    """Each optimizer restores its own variables, even from TensorFlow's wrapper."""
    tf1.script(TWO, switch, tmp_path)


def test_single_variable_named_good_steps_is_kept(tmp_path):
    """A loss scale of TensorFlow has two variables."""
    with tf.Graph().as_default():
        V1.get_variable("net/good_steps", initializer=7.0)
        with tf1.session() as session:
            path = V1.train.Saver().save(session, str(tmp_path / "model.ckpt"))
    assert checkpoints.to_float32(path, tmp_path / "plain.ckpt") == []
    assert tf.train.list_variables(str(tmp_path / "plain.ckpt")) == [("net/good_steps", [])]


@pytest.mark.slow
def test_a_sharded_checkpoint_is_read(tmp_path):
    """All of its shards."""
    path, weights = other_saved(tmp_path / "model.ckpt", RUNS["float32"], sharded=True)
    checkpoints.to_mixed(path, tmp_path / "target.ckpt", RULE)
    got, _ = other_restored(by_saver(str(tmp_path / "target.ckpt")), ours)
    np.testing.assert_array_equal(got[0], weights[0])


def test_converted_checkpoint_is_the_latest_of_its_folder(tmp_path, monkeypatch, capsys):
    """Earlier ones remain listed. Conversion by the command, and back."""
    path, _ = other_saved(tmp_path / "model.ckpt", RUNS["float32"])
    mixed, plain = str(tmp_path / "mixed.ckpt"), str(tmp_path / "plain.ckpt")
    for arguments in (["to-mixed", path, mixed, "--loss-scale", "8"], ["to-float32", mixed, plain]):
        monkeypatch.setattr(sys, "argv", ["checkpoints", *arguments])
        checkpoints.main()
        assert "tfmixed/dynamic_scale" in capsys.readouterr().out
    state = V1.train.get_checkpoint_state(str(tmp_path))
    names = [name.split("/")[-1] for name in state.all_model_checkpoint_paths]
    assert names == ["model.ckpt", "mixed.ckpt", "plain.ckpt"]
    assert state.model_checkpoint_path.endswith("plain.ckpt")


def command(monkeypatch, capsys, *arguments):
    """Returns the error message of the command."""
    monkeypatch.setattr(sys, "argv", ["checkpoints", *map(str, arguments)])
    with pytest.raises(SystemExit, match="2"):
        checkpoints.main()
    return capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "object"])
def test_invalid_source(tmp_path, monkeypatch, capsys, damage):
    """Missing, empty, truncated, or of `tf.train.Checkpoint`. Nothing is written."""
    source = tmp_path / "source.ckpt"
    if damage == "empty":
        for ending in (".index", ".data-00000-of-00001"):
            source.with_name(source.name + ending).write_bytes(b"")
    elif damage == "cut":
        other_saved(source, RUNS["float32"])
        data = source.with_name(source.name + ".data-00000-of-00001")
        data.write_bytes(data.read_bytes()[:20])
    elif damage == "object":
        tf.train.Checkpoint(variable=tf.Variable(1.0)).write(str(source))
    message = command(monkeypatch, capsys, "to-mixed", source, tmp_path / "new" / "target.ckpt")
    assert "`source`" in message
    assert f"{str(source)!r}" in message
    assert not (tmp_path / "new").exists()


def test_existing_target_is_not_overwritten(tmp_path, monkeypatch, capsys):
    """Including the source itself."""
    path, _ = other_saved(tmp_path / "model.ckpt", RUNS["float32"])
    for direction in ("to-mixed", "to-float32"):
        message = command(monkeypatch, capsys, direction, path, path)
        assert "`target`" in message
    assert not any("tfmixed" in name for name, _ in tf.train.list_variables(path))


@pytest.mark.parametrize(("scale", "error"), [("fast", "invalid"), ("-1", "`loss_scale`")])
def test_invalid_loss_scale(tmp_path, monkeypatch, capsys, scale, error):
    """Nothing is written."""
    path, _ = other_saved(tmp_path / "model.ckpt", RUNS["float32"])
    assert error in command(monkeypatch, capsys, "to-mixed", path, tmp_path / "new.ckpt", "--loss-scale", scale)
    assert not list(tmp_path.glob("new*"))


UNDER_V1 = """
import sys
from pathlib import Path
import numpy as np
import tensorflow as tf
tf.compat.v1.disable_v2_behavior()
import test_v1_checkpoints as tests
from tfmixed.compat.v1 import checkpoints

folder = Path(sys.argv[1])
path, losses = tests.saved("theirs", folder)
names = {name for name, _ in tf.train.list_variables(path)}
assert any(name.endswith("/beta1_power") for name in names), names
np.testing.assert_allclose(tests.continued("mixed", tests.by_restorer(path))[0], losses, rtol=1e-4)
checkpoints.to_mixed(path, folder / "written", 64.0)
checkpoints.to_float32(path, folder / "plain")
np.testing.assert_allclose(tests.continued("float32", tests.by_saver(str(folder / "plain")))[0], losses, rtol=1e-4)
path, losses = tests.saved("float32", folder)
np.testing.assert_allclose(tests.continued("mixed", tests.by_restorer(path))[0], losses, rtol=1e-4)
path, losses = tests.saved("mixed", folder)
np.testing.assert_allclose(tests.continued("float32", tests.by_saver(path))[0], losses, rtol=1e-4)
"""


@pytest.mark.slow
def test_the_same_under_the_behavior_of_tensorflow_1(tmp_path):
    """TensorFlow's wrapper puts the variables of Adam in the scope of its conditional."""
    tf1.script(UNDER_V1, tmp_path)


@pytest.mark.slow
def test_command(tmp_path):
    """In both directions, as a process."""
    path, losses = saved("float32", tmp_path)
    code = (
        "import runpy, sys; sys.argv[0] = 'x'; runpy.run_module('tfmixed.compat.v1.checkpoints', run_name='__main__')"
    )
    mixed, plain = tmp_path / "mixed.ckpt", tmp_path / "plain.ckpt"
    assert "tfmixed/dynamic_scale" in tf1.script(code, "to-mixed", path, mixed, "--loss-scale", "dynamic")
    assert "tfmixed/dynamic_scale" in tf1.script(code, "to-float32", mixed, plain)
    np.testing.assert_allclose(continued("mixed", by_saver(str(mixed)))[0], losses, rtol=1e-4)
    np.testing.assert_allclose(continued("float32", by_saver(str(plain)))[0], losses, rtol=1e-4)


def test_invalid_number_of_optimizers(tmp_path):
    """Nothing is read or written."""
    with pytest.raises(ValueError, match="optimizers"):
        checkpoints.to_mixed(tmp_path / "none", tmp_path / "mixed", optimizers=0)
    assert list(tmp_path.iterdir()) == []
