from __future__ import annotations

from pathlib import Path

import keras
import pytest

from tfmixed import Config, ConfigError, LossScaleOptimizer, LowPrecisionOptimizer, load_config, scaling
from tfmixed.callbacks import LossScaleLogger
from tfmixed.config import LogConfig
from tfmixed.scaling import ConstantScale, DynamicScale, LogMaxScale

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.toml"


@pytest.mark.parametrize("shipped", CONFIGS, ids=lambda shipped: shipped.stem)
def test_shipped_configs_round_trip(shipped, path):
    """Each file in configs/ loads, and `save` writes an equal one, without a partial file beside it."""
    config = load_config(shipped)
    config.save(path)
    assert load_config(path) == config
    assert [entry.name for entry in path.parent.iterdir()] == ["run.toml"]


def test_shipped_configs():
    """The files hold the settings in their names."""
    configs = {path.stem: load_config(path) for path in CONFIGS}
    assert configs["float32"] == Config("float32")
    assert configs["bfloat16"] == Config("mixed_bfloat16")
    assert isinstance(configs["float16_dynamic"].scaling, DynamicScale)
    assert configs["float16_constant"].scaling == ConstantScale(1024.0)
    assert configs["like_torch"].scaling == scaling.like("torch")
    assert configs["like_megatron"].scaling == scaling.like("megatron")
    assert configs["like_deepspeed"].scaling == scaling.like("deepspeed", initial_scale=65536.0, hysteresis=2)


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config("float64", None, LogConfig(10, 0, True)),
        Config("mixed_float16", DynamicScale(min_scale=None, max_scale=None, hysteresis=3)),
        Config("mixed_float16", ConstantScale(8, skip_nonfinite=False)),
        Config("mixed_float16", LogMaxScale()),
        Config("bfloat16", weights="split", states="int8"),
    ],
    ids=str,
)
def test_any_config_round_trips(config, path):
    """`load_config` returns what `save` wrote, including None."""
    config.save(path)
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('polcy = "float32"', r"Unknown key 'polcy'\. Did you mean 'policy'\?"),
        ("[scaling]\ngroth_interval = 3", r"'scaling\.groth_interval'\. Did you mean 'scaling\.growth_interval'\?"),
        ('[scaling]\nlike = "torch"\nhysteresis = 2', r"'scaling\.hysteresis'.*Known keys: scaling\.like"),
        ('[scaling]\nlike = "torch"\nrule = "dynamic"', "Only one"),
        ('[scaling]\nlike = "pytorch"', r"'scaling\.like'.* Received: 'pytorch'\. Did you mean 'torch'"),
        ('[scaling]\nrule = "dynamc"', r"'scaling\.rule'.* Received: 'dynamc'\. Did you mean 'dynamic'"),
        ("[scaling]\nrule = []", r"'scaling\.rule'.* Received: \[\]"),
        ("[log]\nevry = 3", r"'log\.evry'\. Did you mean 'log\.every'\?"),
        ('policy = "mixed_fp16"', "policy='mixed_fp16'"),
        ("policy = 16", "'policy'.* 16"),
        ('weights = "stochstic"', "weights must be.*'stochstic'"),
        ('weights = "split"\nstates = "int4"', "states must be.*'int4'"),
        ('states = "int8"', "'states' needs 'weights'"),
        ('policy = "float16"\nweights = "split"', "weights must be nearest"),
        ("scaling = 8", "'scaling'.* 8"),
        ("[scaling]\nhysteresis = 1.5", r"\[scaling\] `hysteresis`.*1\.5"),
        ('[scaling]\ninitial_scale = "8"', r"\[scaling\] `initial_scale`.*'8'"),
        ("[scaling]\ninitial_scale = true", r"\[scaling\] `initial_scale`.*True"),
        ('[scaling]\ninitial_scale = "none"', r"\[scaling\] `initial_scale`.*None"),
        ('[scaling]\nrule = "constant"', r"'scaling\.value' is missing"),
        ('[scaling]\nlike = "jmp"\nfactor = "2"', r"\[scaling\] `factor`.*'2'"),
        ('[scaling]\nlike = "apex"\nmax_scale = "2"', r"\[scaling\] `max_scale`.*'2'"),
        ('[scaling]\nlike = "fairseq"\nthreshold = false', r"\[scaling\] `threshold`.*False"),
        ('[scaling]\nlike = "flax"\ngrowth_interval = "2"', r"\[scaling\] `growth_interval`.*'2'"),
        ("log = 8", "'log'.* 8"),
        ("[log]\nevery = 0", r"'log\.every'.* >= 1.* 0"),
        ("[log]\nevery = true", r"'log\.every'.* True"),
        ("[log]\nverbose = -1", r"'log\.verbose'.* -1"),
        ("[log]\ntensorboard = 1", r"'log\.tensorboard'.* 1"),
        ("policy = ", "TOML"),
        (b"\xff\xfe\x00", "TOML"),
        pytest.param("deep = " + "[" * 10**5, "TOML", id="deep"),
    ],
    ids=repr,
)
def test_invalid_files(path, text, message):
    """A `ConfigError` names the file, the key, the value received and the nearest known key."""
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=rf"run\.toml: .*{message}"):
        load_config(path)


def test_a_missing_file_or_a_folder(tmp_path):
    """Both raise a `ConfigError`, not an `OSError`."""
    with pytest.raises(ConfigError, match="none"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="directory"):
        load_config(tmp_path)


def test_apply_sets_the_policy():
    """As `set_policy` does."""
    assert Config("float64").apply().name == keras.config.dtype_policy().name == "float64"


def test_optimizer_is_wrapped_if_the_loss_is_scaled():
    """Without a rule the optimizer stays as it is."""
    wrapped = Config("mixed_float16", ConstantScale(8)).optimizer("sgd")
    assert isinstance(wrapped, LossScaleOptimizer)
    assert wrapped.rule == ConstantScale(8)
    inner = keras.optimizers.SGD()
    assert Config("float32").optimizer(inner) is inner


def test_optimizer_keeps_weights_and_states_in_few_bits():
    """Inside the loss scaling, if there is both."""
    optimizer = Config("bfloat16", weights="split", states="int8").optimizer("adam")
    assert isinstance(optimizer, LowPrecisionOptimizer)
    assert (optimizer.weights, optimizer.states) == ("split", "int8")
    scaled = Config("bfloat16", ConstantScale(8), weights="nearest").optimizer("adam")
    assert isinstance(scaled, LossScaleOptimizer)
    assert scaled.inner_optimizer.weights == "nearest"


def test_callbacks_log_to_the_run_folder(tmp_path):
    """The logger has the settings of the file. Without loss scaling there is none."""
    (logger,) = Config("mixed_float16", DynamicScale(), LogConfig(7, 0, True)).callbacks(tmp_path)
    assert isinstance(logger, LossScaleLogger)
    assert (logger.path, logger.every, logger.verbose) == (tmp_path / "loss_scale.jsonl", 7, 0)
    assert logger.tensorboard == tmp_path / "tensorboard"
    assert Config("float32").callbacks(tmp_path) == []


def test_float16_without_scaling_is_not_scaled_by_keras():
    """Keras would scale an unwrapped optimizer under mixed_float16. A constant scale of 1 prevents that."""
    config = Config("mixed_float16")
    assert config.optimizer("sgd").rule == ConstantScale(1.0)
    assert len(config.callbacks("run")) == 1
    assert not isinstance(Config("mixed_bfloat16").optimizer("sgd"), keras.optimizers.LossScaleOptimizer)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ((5,), "policy"),
        (("int32",), "policy"),
        (("float17",), "policy"),
        (("auto", "dynamic"), "scaling"),
        (("auto", None, {"every": 3}), "log"),
        (("auto", None, LogConfig(), "fast"), "weights"),
        (("auto", None, LogConfig(), "split", None), "states"),
    ],
)
def test_arguments_are_checked(values, name):
    """A `Config` made in Python is checked like a file."""
    with pytest.raises(ConfigError, match=f"{name} must be"):
        Config(*values)


def test_the_nearest_policy_is_suggested():
    """As the nearest key is."""
    with pytest.raises(ConfigError, match="'mixed_float16'"):
        Config("mixed_flaot16")


def test_a_byte_order_mark_is_ignored(path):
    """Some editors on Windows write one."""
    path.write_text('policy = "float32"', encoding="utf-8-sig")
    assert load_config(path) == Config("float32")
