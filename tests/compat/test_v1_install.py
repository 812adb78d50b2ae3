"""`install`, environment variables, and the table of legacy names in docs/tf1.md with a test for each row."""

from __future__ import annotations

import importlib
import operator
import re
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf1
from tf1 import V1, X, Y
from thorough import thorough

import tfmixed
import tfmixed.compat.v1 as shim
from tfmixed import hardware
from tfmixed.compat.v1 import conversion_report, graph_rewrite, patches
from tfmixed.scaling import ConstantScale

PAGE = Path(__file__).parents[2] / "docs" / "tf1.md"
converts = hardware.describe().policy == "mixed_bfloat16"
CLASSIC = (
    "opt = tf.train.AdamOptimizer(0.05)\nopt = tf.train.experimental.enable_mixed_precision_graph_rewrite(opt)",
    "opt = tf.train.AdamOptimizer(0.05)\nopt = tf.compat.v1.mixed_precision.enable_mixed_precision_graph_rewrite(opt)",
)
# Warnings on machines without fast half precision are tested in test_v1_rewrite.py.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The graph rewrite",
    "ignore:policy 'mixed_bfloat16' is slow here",
)


@pytest.fixture
def installed():
    shim.install()
    yield
    shim.uninstall()
    if graph_rewrite.is_enabled():
        shim.disable_mixed_precision_graph_rewrite()


def train(opt, config=None):
    """Trains in a session. Returns the first and last loss, and the number of products in half precision."""
    x, y, loss = tf1.network()
    step = V1.train.get_or_create_global_step()
    train = opt.minimize(loss, global_step=step)
    with tf1.session(config) as session:
        feed = {x: X, y: Y}
        losses = [session.run([loss, train], feed)[0] for _ in range(20)]
        assert session.run(step) == 20
        return losses[0], losses[-1], conversion_report(session, train, feed).converted.get("MatMul", 0)


def check_trained(opt, config=None):
    with tf.Graph().as_default():
        first, last, products = train(opt, config)
    assert last < 0.8 * first
    assert (products > 0) == converts


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("package", "kind"),
    tf1.some(
        ["tf-monitored", "import-function"],
        {
            f"{name}-{kind}": (package, kind)
            for name, package in {"tf": tf, "v1": V1, "import": shim}.items()
            for kind in ("session", "monitored", "function")
        },
    ),
)
def test_the_classic_two_lines_train(package, kind):
    """Under each import, in a session, a monitored session and a function."""
    names = {"tf": package}
    exec(CLASSIC[0], names)
    opt = names["opt"]
    assert isinstance(opt, shim.LossScaleOptimizer)
    if kind == "session":
        check_trained(opt, V1.ConfigProto())
    elif kind == "monitored":
        with tf.Graph().as_default():
            x, y, loss = tf1.network()
            step = opt.minimize(loss, global_step=V1.train.get_or_create_global_step())
            with V1.train.MonitoredTrainingSession() as session:
                losses = [session.run([loss, step], {x: X, y: Y})[0] for _ in range(20)]
                assert ("MatMul" in conversion_report(session, step, {x: X, y: Y}).converted) == converts
        assert losses[-1] < 0.8 * losses[0]
    else:
        kernels = [tf.Variable(keras.initializers.GlorotUniform(1)(shape)) for shape in ((8, 16), (16, 3))]

        def loss():
            logits = tf.nn.relu(tf.constant(X) @ kernels[0]) @ kernels[1]
            return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(Y, logits))

        @tf.function
        def function():
            opt.minimize(loss, var_list=kernels)

        before = float(loss())
        for _ in range(20):
            function()
        assert float(loss()) < 0.8 * before
        assert ("MatMul" in conversion_report(function).converted) == converts


# A function for each row of the table.


def experimental_enable():
    names = {"tf": tf}
    exec(CLASSIC[0], names)
    check_trained(names["opt"])


def v1_enable(module):
    opt = module.enable_mixed_precision_graph_rewrite(V1.train.AdamOptimizer(0.05), 64)
    assert isinstance(opt, shim.LossScaleOptimizer)
    assert opt.rule == ConstantScale(64)
    check_trained(opt, V1.ConfigProto())


def disable(module):
    module.enable_mixed_precision_graph_rewrite(V1.train.AdamOptimizer())
    module.disable_mixed_precision_graph_rewrite()
    with tf.Graph().as_default():
        assert train(V1.train.AdamOptimizer(), V1.ConfigProto())[2] == 0
    assert not graph_rewrite.is_enabled()


def optimizers():
    for name in (name for name in dir(V1.train) if not name.startswith("_")):
        assert hasattr(tf.train, name)
    assert tf.train.AdamOptimizer is V1.train.AdamOptimizer


def follows(scale, second):
    with tf.Graph().as_default():
        scale = scale()
        opt = tf.train.experimental.MixedPrecisionLossScaleOptimizer(V1.train.GradientDescentOptimizer(1.0), scale)
        weight = V1.get_variable("w", initializer=1.0)
        train = opt.minimize(weight * np.inf)
        value = tf.identity(scale())
        with tf1.session() as session:
            session.run(train)
            assert session.run([weight, value, opt.skipped_steps]) == [1.0, second, 1]


def manager(make, trace, scales):
    given = make()
    opt = tf.contrib.mixed_precision.LossScaleOptimizer(V1.train.GradientDescentOptimizer(1.0), given)
    assert tfmixed.scaling.simulate(opt.rule, trace) == scales
    assert float(given.get_loss_scale()) == opt.rule.start().scale


def contrib_import():
    module = importlib.import_module("tensorflow.contrib.mixed_precision")
    assert module.FixedLossScaleManager is shim.FixedLossScaleManager


def contrib_optimizer():
    fixed = tf.contrib.mixed_precision.FixedLossScaleManager(64)
    opt = tf.contrib.mixed_precision.LossScaleOptimizer(opt=V1.train.AdamOptimizer(0.05), loss_scale_manager=fixed)
    assert opt.rule == ConstantScale(64)
    with tf.Graph().as_default():
        first, last, _ = train(opt)
    assert last < 0.8 * first


def policy():
    policy = tf.keras.mixed_precision.experimental.Policy("mixed_float16")
    assert (policy.compute_dtype, policy.loss_scale) == ("float16", "dynamic")


def set_policy():
    tf.keras.mixed_precision.experimental.set_policy("float64")
    assert keras.config.dtype_policy().name == "float64"
    keras.config.set_dtype_policy("float32")
    shim.enable_mixed_precision_graph_rewrite(V1.train.AdamOptimizer(), dtype="bfloat16")
    with pytest.raises(ValueError, match="first enable_mixed"):
        tf.keras.mixed_precision.experimental.set_policy("mixed_bfloat16")


def keras_optimizer():
    opt = tf.keras.mixed_precision.experimental.LossScaleOptimizer(tf.keras.optimizers.SGD(), "dynamic")
    assert isinstance(opt, tfmixed.LossScaleOptimizer)


def direct():
    config = V1.ConfigProto()
    config.graph_options.rewrite_options.auto_mixed_precision = 1
    check_trained(V1.train.AdamOptimizer(0.05), config)
    with tf.Graph().as_default():
        assert train(V1.train.AdamOptimizer(0.05), V1.ConfigProto())[2] == 0


def environment(variable, rewrites, scales):
    def check():
        shim.uninstall()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(variable, "1")
            shim.install()
            with tf.Graph().as_default():
                first, last, products = train(V1.train.AdamOptimizer(0.05), V1.ConfigProto())
                scaled = any(variable.name.startswith("tfmixed/") for variable in V1.global_variables())
        assert last < 0.8 * first
        assert (products > 0, scaled) == (rewrites and converts, scales)

    return check


ROWS = {
    "tf.train.AdamOptimizer()": optimizers,
    "tf.train.experimental.enable_mixed_precision_graph_rewrite(opt)": experimental_enable,
    "tf.train.experimental.disable_mixed_precision_graph_rewrite()": lambda: disable(tf.train.experimental),
    "tf.train.experimental.MixedPrecisionLossScaleOptimizer(opt, scale)": lambda: follows(
        lambda: shim.FixedLossScale(4.0), 4.0
    ),
    "tf.train.experimental.FixedLossScale(128)": lambda: follows(
        lambda: tf.train.experimental.FixedLossScale(128), 128.0
    ),
    "tf.train.experimental.DynamicLossScale()": lambda: follows(tf.train.experimental.DynamicLossScale, 2.0**14),
    "tf.mixed_precision.experimental.FixedLossScale(128)": lambda: follows(
        lambda: tf.mixed_precision.experimental.FixedLossScale(128), 128.0
    ),
    "tf.mixed_precision.experimental.DynamicLossScale()": lambda: follows(
        tf.mixed_precision.experimental.DynamicLossScale, 2.0**14
    ),
    "tf.compat.v1.train.experimental.enable_mixed_precision_graph_rewrite(opt)": lambda: v1_enable(
        V1.train.experimental
    ),
    "tf.compat.v1.mixed_precision.enable_mixed_precision_graph_rewrite(opt)": lambda: v1_enable(V1.mixed_precision),
    "tf.compat.v1.mixed_precision.disable_mixed_precision_graph_rewrite()": lambda: disable(V1.mixed_precision),
    "tf.compat.v1.mixed_precision.DynamicLossScale()": lambda: follows(V1.mixed_precision.DynamicLossScale, 2.0**14),
    "tf.contrib.mixed_precision.LossScaleOptimizer(opt, manager)": contrib_optimizer,
    "tf.contrib.mixed_precision.FixedLossScaleManager(5000)": lambda: manager(
        lambda: tf.contrib.mixed_precision.FixedLossScaleManager(5000), "TF", [5000.0, 5000.0]
    ),
    "tf.contrib.mixed_precision.ExponentialUpdateLossScaleManager(2**15, 1000)": lambda: manager(
        lambda: tf.contrib.mixed_precision.ExponentialUpdateLossScaleManager(2.0, 2, 2, 4, 0.25),
        "TTFTFFFF",
        [2.0, 8.0, 8.0, 8.0, 2.0, 2.0, 1.0, 1.0],
    ),
    "from tensorflow.contrib.mixed_precision import FixedLossScaleManager": contrib_import,
    'tf.keras.mixed_precision.experimental.Policy("mixed_float16")': policy,
    'tf.keras.mixed_precision.experimental.set_policy("mixed_float16")': set_policy,
    'tf.keras.mixed_precision.experimental.LossScaleOptimizer(opt, "dynamic")': keras_optimizer,
    "config.graph_options.rewrite_options.auto_mixed_precision = 1": direct,
    "TF_ENABLE_AUTO_MIXED_PRECISION=1": environment("TF_ENABLE_AUTO_MIXED_PRECISION", True, True),
    "TF_ENABLE_AUTO_MIXED_PRECISION_GRAPH_REWRITE=1": environment(
        "TF_ENABLE_AUTO_MIXED_PRECISION_GRAPH_REWRITE", True, False
    ),
    "TF_ENABLE_AUTO_MIXED_PRECISION_LOSS_SCALING=1": environment(
        "TF_ENABLE_AUTO_MIXED_PRECISION_LOSS_SCALING", False, True
    ),
}


DEFAULT_ROWS = [
    "tf.train.AdamOptimizer()",
    "tf.train.experimental.enable_mixed_precision_graph_rewrite(opt)",
    "tf.train.experimental.disable_mixed_precision_graph_rewrite()",
    "tf.train.experimental.DynamicLossScale()",
    "tf.compat.v1.mixed_precision.enable_mixed_precision_graph_rewrite(opt)",
    "tf.contrib.mixed_precision.ExponentialUpdateLossScaleManager(2**15, 1000)",
    "from tensorflow.contrib.mixed_precision import FixedLossScaleManager",
    'tf.keras.mixed_precision.experimental.Policy("mixed_float16")',
    'tf.keras.mixed_precision.experimental.set_policy("mixed_float16")',
    'tf.keras.mixed_precision.experimental.LossScaleOptimizer(opt, "dynamic")',
    "config.graph_options.rewrite_options.auto_mixed_precision = 1",
    "TF_ENABLE_AUTO_MIXED_PRECISION=1",
]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("check", tf1.some(DEFAULT_ROWS, ROWS))
def test_row_of_the_table(check):
    """In the order of the page."""
    check()


def test_table_has_these_rows():
    """A new name needs a test."""
    section = PAGE.read_text().split("## Every legacy spelling")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(.*?)`", section, flags=re.MULTILINE) == list(ROWS)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("spelling", [row for row in ROWS if row.startswith("tf.")])
def test_import_has_the_names_of_the_table(spelling):
    """Without `install`. There `tf.compat.v1` is the package itself."""
    path = spelling.split("(")[0].removeprefix("tf.")
    found = operator.attrgetter(path)(shim)
    assert found is operator.attrgetter(path.removeprefix("compat.v1."))(shim)
    if not path.startswith("compat."):
        assert found is operator.attrgetter(path)(tf)


METHODS = ("compute_gradients", "apply_gradients")


def everything():
    """Returns everything that `install` may change: names, modules, methods and the registry."""
    from tensorflow.python.client.session import BaseSession
    from tensorflow.python.eager import context
    from tensorflow.python.training.experimental import mixed_precision

    places = [tf, tf.train, tf.train.experimental, V1, V1.train, V1.train.experimental, V1.mixed_precision]
    places += [tf.keras.mixed_precision, V1.keras.mixed_precision]
    return (
        [{name: id(value) for name, value in vars(place).items()} for place in places],
        {name: id(module) for name, module in sys.modules.items() if name.startswith("tensorflow.contrib")},
        [vars(kind)[name] for kind in (V1.train.Optimizer, V1.train.SyncReplicasOptimizer) for name in METHODS],
        BaseSession.__init__,
        context._create_context,
        dict(mixed_precision._REGISTERED_WRAPPER_OPTIMIZER_CLS),
    )


def test_install_changes_no_names_and_uninstall_restores_everything(monkeypatch):
    """Each is called twice, with the environment variable that does most."""
    shim.install()
    shim.uninstall()
    before = everything()
    monkeypatch.setenv("TF_ENABLE_AUTO_MIXED_PRECISION", "1")
    shim.install()
    shim.install()
    for old, new in zip(before[0], everything()[0], strict=True):
        assert old.items() <= new.items()
    shim.uninstall()
    shim.uninstall()
    assert everything() == before
    assert not graph_rewrite.is_enabled()


def test_wrappers_of_two_owners_are_undone_in_any_order():
    """The original method is restored with the last one."""

    class Target:
        def method(self):
            return "original"

    plain = vars(Target)["method"]
    for first, second in (("a", "b"), ("b", "a")):
        for owner in ("a", "b"):
            patches.wrap(owner, Target, "method", lambda plain, self, owner=owner: f"{owner} {plain(self)}")
        assert Target().method() == "b a original"
        patches.undo(first)
        assert Target().method() == f"{second} original"
        patches.undo(second)
        assert vars(Target)["method"] is plain


@pytest.mark.usefixtures("installed")
def test_warning_points_at_the_line_of_the_script(monkeypatch):
    """Even through TensorFlow's own function."""
    monkeypatch.setattr(hardware, "describe", lambda: hardware.Hardware([hardware.cpu(frozenset(), "old")]))
    for call in (
        tf.train.experimental.enable_mixed_precision_graph_rewrite,
        V1.train.experimental.enable_mixed_precision_graph_rewrite,
    ):
        with pytest.warns(UserWarning, match="converts nothing") as caught:
            call(V1.train.AdamOptimizer())
        assert caught[0].filename == __file__


@pytest.mark.usefixtures("installed")
def test_existing_contrib_is_kept(monkeypatch):
    """Before and after `uninstall`."""
    shim.uninstall()
    monkeypatch.setattr(tf, "contrib", "theirs", raising=False)
    shim.install()
    assert tf.contrib == "theirs"
    shim.uninstall()
    assert tf.contrib == "theirs"


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_variable_that_a_script_sets_in_its_main(monkeypatch):
    """Set after the imports and before the graph. The script can still disable the rewrite."""
    monkeypatch.setenv("TF_ENABLE_AUTO_MIXED_PRECISION", "1")
    assert not graph_rewrite.is_enabled()
    with tf.Graph().as_default():
        first, last, products = train(V1.train.AdamOptimizer(0.05), V1.ConfigProto())
        assert any(variable.name.startswith("tfmixed/") for variable in V1.global_variables())
    assert last < 0.8 * first
    assert (products > 0) == converts
    shim.disable_mixed_precision_graph_rewrite()
    with V1.Session(graph=tf.Graph()):
        assert not graph_rewrite.is_enabled()


@pytest.mark.usefixtures("installed")
def test_sessions_read_the_rewrite_variable(monkeypatch):
    """Without any training."""
    monkeypatch.setenv("TF_ENABLE_AUTO_MIXED_PRECISION_GRAPH_REWRITE", "true")
    with V1.Session(graph=tf.Graph()):
        assert graph_rewrite.is_enabled()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("value", ["yes", pytest.param("2", marks=pytest.mark.slow)])
def test_variable_with_an_invalid_value_warns(monkeypatch, value):
    """Nothing is enabled."""
    monkeypatch.setenv("TF_ENABLE_AUTO_MIXED_PRECISION_LOSS_SCALING", value)
    with pytest.warns(UserWarning, match=f"LOSS_SCALING .*'{value}'"):
        check_unscaled()


def check_unscaled():
    with tf.Graph().as_default():
        V1.train.AdamOptimizer().minimize(V1.get_variable("w", initializer=1.0) * 1.0)
        assert not any(variable.name.startswith("tfmixed/") for variable in V1.global_variables())


@pytest.mark.parametrize("module", ["train.experimental", "mixed_precision", "compat.v1.mixed_precision"])
def test_uninstall_disables_a_rewrite_enabled_since(module):
    """By any name. A rewrite that was enabled before remains enabled."""
    enable = operator.attrgetter(module + ".enable_mixed_precision_graph_rewrite")
    shim.install()
    enable(V1 if module == "mixed_precision" else tf)(V1.train.AdamOptimizer())
    shim.uninstall()
    assert not graph_rewrite.is_enabled()
    shim.enable_mixed_precision_graph_rewrite(V1.train.AdamOptimizer())
    shim.install()
    shim.uninstall()
    assert graph_rewrite.is_enabled()
    shim.disable_mixed_precision_graph_rewrite()


class OwnApply(V1.train.GradientDescentOptimizer):
    def apply_gradients(self, grads_and_vars, global_step=None, name=None):
        return super().apply_gradients(grads_and_vars, global_step, name)


@pytest.mark.usefixtures("installed")
def test_optimizers_that_the_scaling_variable_does_not_affect(monkeypatch):
    """A wrapped optimizer scales once. One that overrides `apply_gradients` trains with a warning."""
    shim.uninstall()
    monkeypatch.setenv("TF_ENABLE_AUTO_MIXED_PRECISION_LOSS_SCALING", "1")
    shim.install()
    with tf.Graph().as_default():
        weight = V1.get_variable("w", initializer=1.0)
        opt = shim.LossScaleOptimizer(V1.train.GradientDescentOptimizer(0.5), 64)
        once = opt.minimize(weight * 1.0)
        with pytest.warns(UserWarning, match="OwnApply"):
            own = OwnApply(0.25).minimize(weight * 1.0)
        assert {variable.name.split("/")[0] for variable in V1.global_variables()} == {"w:0", "tfmixed"}
        with tf1.session() as session:
            session.run(once)
            session.run(own)
            assert session.run(weight) == 0.25


WAITING = """
import os, sys, warnings
import tensorflow as tf
V1 = tf.compat.v1
import tfmixed.compat.v1
tfmixed.compat.v1.install()
with tf.Graph().as_default(), warnings.catch_warnings(record=True) as caught:
    weight, step = V1.get_variable("w", initializer=1.0), V1.train.get_or_create_global_step()
    opt = V1.train.SyncReplicasOptimizer(V1.train.GradientDescentOptimizer(0.25), 1, total_num_replicas=1)
    train = opt.minimize(weight * 1.0, global_step=step)
    assert not [variable for variable in V1.global_variables() if "tfmixed" in variable.name]
    hook = opt.make_session_run_hook(is_chief=True, num_tokens=0)
    with V1.train.MonitoredTrainingSession(hooks=[hook]) as session:
        for _ in range(2):
            session.run(train)
        print(*map(float, session.run([weight, step])), "not scaled" in str(caught[-1].message))
        sys.stdout.flush()
        os._exit(0)  # its queue runner stops late
"""


@pytest.mark.slow
def test_scaling_variable_does_not_affect_sync_replicas():
    """Training is unchanged, with a warning."""
    environment = {"TF_ENABLE_AUTO_MIXED_PRECISION_LOSS_SCALING": "1"}
    assert tf1.script(WAITING, environment=environment).split() == ["0.5", "2.0", "True"]


def test_import_falls_back_to_tensorflow_1():
    """Names of the package take precedence. An unknown name is an error."""
    assert shim.placeholder is V1.placeholder
    assert shim.train.AdamOptimizer is V1.train.AdamOptimizer
    assert shim.mixed_precision.DynamicLossScale is shim.DynamicLossScale
    assert {"install", "placeholder", "train"} <= set(dir(shim))
    assert {"experimental", "AdamOptimizer"} <= set(dir(shim.train))
    assert (shim.__version__, shim.keras.__version__) == (tf.__version__, keras.__version__)
    assert shim.keras.layers.Dense is keras.layers.Dense
    assert shim.compat.as_text(b"text") == "text"
    with pytest.raises(AttributeError, match="nonsense"):
        _ = shim.nonsense


LATE = """
import sys
import numpy as np
import tensorflow as tf
import tfmixed.compat.v1 as shim
from tf1 import V1, X, Y, network, session

if sys.argv[1] == "devices":
    tf.config.list_physical_devices()
shim.install()
V1.disable_eager_execution()
x, y, loss = network()
opt = V1.train.AdamOptimizer(0.05)
pairs = opt.compute_gradients(loss)
if sys.argv[1] == "devices":
    train = opt.apply_gradients(pairs)
else:
    sums = [tf.Variable(tf.zeros_like(variable), trainable=False) for _, variable in pairs]
    count = tf.Variable(0, trainable=False)

    def add():
        return tf.group(count.assign_add(1), *[total.assign_add(grad) for total, (grad, _) in zip(sums, pairs)])

    def apply():
        step = opt.apply_gradients([(total + grad, variable) for total, (grad, variable) in zip(sums, pairs)])
        with tf.control_dependencies([step]):
            return tf.group(count.assign(0), *[total.assign(tf.zeros_like(total)) for total in sums])

    train = tf.cond(tf.equal(count, 1), apply, add)
with session() as opened:
    losses = [opened.run([loss, train], {x: X, y: Y})[0] for _ in range(40)]
assert losses[-1] < 0.6 * losses[0], losses
assert any(variable.name.startswith("tfmixed/") for variable in V1.global_variables())
print(shim.graph_rewrite.is_enabled())
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["devices", pytest.param("nothing", marks=thorough)])
def test_eager_execution_may_be_disabled_after_install(first):
    """The variable takes effect after that, and slots are created in the graph."""
    assert tf1.script(LATE, first, environment={"TF_ENABLE_AUTO_MIXED_PRECISION": "1"}).split() == ["True"]


EAGER = """
import tensorflow as tf
import tfmixed.compat.v1 as shim

shim.install()
assert not shim.graph_rewrite.is_enabled()
tf.function(lambda x: x + x)(tf.ones(2))
print(shim.graph_rewrite.is_enabled())
"""


@pytest.mark.slow
def test_eager_functions_read_the_variable():
    """Without a session or an optimizer of TensorFlow 1."""
    assert tf1.script(EAGER, environment={"TF_ENABLE_AUTO_MIXED_PRECISION": "1"}).split() == ["True"]


LEGACY = """
import tensorflow as tf
import tf1
from tf1 import V1, X, Y
import tfmixed.compat.v1 as shim

shim.install()
for keras in (tf.keras, V1.keras, shim.keras):
    assert not hasattr(keras.mixed_precision, "experimental"), keras
with tf.Graph().as_default():
    x, y = V1.placeholder(tf.float32, [None, 8]), V1.placeholder(tf.int32, [None])
    logits = shim.layers.dense(shim.layers.batch_normalization(shim.layers.dense(x, 16)), 3)
    loss = V1.losses.sparse_softmax_cross_entropy(y, logits)
    train = shim.LossScaleOptimizer(V1.train.AdamOptimizer(0.05)).minimize(loss)
    with tf1.session() as session:
        losses = [session.run([loss, train], {x: X, y: Y})[0] for _ in range(20)]
assert losses[-1] < 0.6 * losses[0], losses
shim.uninstall()
print("trained")
"""


@pytest.mark.slow
def test_under_tf_keras_layers_are_back_and_no_policy_of_keras_3_is_offered():
    """Models of tf_keras would ignore it."""
    pytest.importorskip("tf_keras")
    assert tf1.script(LEGACY, environment={"TF_USE_LEGACY_KERAS": "1"}).split() == ["trained"]


@pytest.mark.slow
def test_lazy_import():
    """Neither the package nor `compat.keras2` imports `compat.v1`."""
    code = "import sys, tfmixed; tfmixed.compat.keras2; print('tfmixed.compat.v1' in sys.modules);"
    assert tf1.script(code + "tfmixed.compat.v1.install(); print('tfmixed.compat.v1' in sys.modules)").split() == [
        "False",
        "True",
    ]
