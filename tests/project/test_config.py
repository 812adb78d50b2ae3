from __future__ import annotations

from pathlib import Path

import keras
import pytest

from tfmixed import Config, ConfigError, LossScaleOptimizer, load_config, scaling
from tfmixed.callbacks import LossScaleLogger
from tfmixed.config import LogConfig
from tfmixed.scaling import ConstantScale, DynamicScale, LogMaxScale

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_round_trip(path, tmp_path):
    """Each file in configs/ is valid, and comes back from its own copy."""
    config = load_config(path)
    config.save(tmp_path / "copy.toml")
    assert load_config(tmp_path / "copy.toml") == config
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy.toml"]


def test_shipped_configs_are_what_their_names_say():
    """The four policies and three peers."""
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
    ],
    ids=str,
)
def test_any_config_round_trips(config, tmp_path):
    """What save writes, load_config reads; null included."""
    config.save(tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('polcy = "float32"', "polcy is no known key; did you mean policy?"),
        ("[scaling]\ngroth_interval = 3", r"scaling\.groth_interval is no known key; did you mean growth_interval?"),
        (
            '[scaling]\nlike = "torch"\nhysteresis = 2',
            r"scaling\.hysteresis is no known key.*known: like, initial_scale",
        ),
        ('[scaling]\nlike = "torch"\nrule = "dynamic"', r"scaling\.rule and scaling\.like exclude each other"),
        (
            '[scaling]\nlike = "pytorch"',
            r"scaling\.like must be one of torch, .* received 'pytorch'; did you mean torch",
        ),
        ('[scaling]\nrule = "dynamc"', r"scaling\.rule must be one of .* received 'dynamc'; did you mean dynamic"),
        ("[log]\nevry = 3", r"log\.evry is no known key; did you mean every?"),
        ('policy = "mixed_fp16"', "policy must be .* received 'mixed_fp16'"),
        ("policy = 16", "policy must be .* received 16"),
        ("scaling = 8", r"scaling must be a table \[scaling\], received 8"),
        ("[scaling]\nhysteresis = 1.5", r"scaling\.hysteresis must be a whole number.* received 1\.5"),
        ('[scaling]\ninitial_scale = "8"', r"scaling\.initial_scale must be .* received '8'"),
        ("[scaling]\ninitial_scale = true", r"scaling\.initial_scale must be .* received True"),
        ('[scaling]\ninitial_scale = "none"', r"scaling\.initial_scale must be .* received None"),
        ('[scaling]\nrule = "constant"', r"scaling\.value is missing"),
        ('[scaling]\nlike = "jmp"\nfactor = "2"', r"scaling\.factor must be .* received '2'"),
        ('[scaling]\nlike = "apex"\nmax_scale = "2"', r"scaling\.max_scale must be .* received '2'"),
        ('[scaling]\nlike = "fairseq"\nthreshold = false', r"scaling\.threshold must be .* received False"),
        ('[scaling]\nlike = "flax"\ngrowth_interval = "2"', r"scaling\.growth_interval must be .* received '2'"),
        ("[log]\nevery = 0", r"log\.every must be a whole number, at least 1 .* received 0"),
        ("[log]\nverbose = -1", r"log\.verbose must be .* received -1"),
        ("[log]\ntensorboard = 1", r"log\.tensorboard must be true or false, received 1"),
        ("policy = ", "is no TOML file"),
        (b"\xff\xfe\x00", "is no TOML file"),
        pytest.param("deep = " + "[" * 10**5, "is no TOML file", id="deep"),
    ],
    ids=repr,
)
def test_a_broken_file_is_named_with_key_and_remedy(tmp_path, text, message):
    """One ConfigError: file, key, what was received, the nearest valid key."""
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=rf"run\.toml: {message}"):
        load_config(path)


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    """An error of the configuration, not of the system."""
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_apply_sets_the_policy():
    """As set_policy does."""
    assert Config("float64").apply().name == keras.config.dtype_policy().name == "float64"


def test_optimizer_wraps_where_there_is_something_to_scale():
    """A rule wraps; none leaves the optimizer as it is."""
    wrapped = Config("mixed_float16", ConstantScale(8)).optimizer("sgd")
    assert isinstance(wrapped, LossScaleOptimizer)
    assert wrapped.rule == ConstantScale(8)
    inner = keras.optimizers.SGD()
    assert Config("float32").optimizer(inner) is inner


def test_callbacks_log_into_the_run_folder(tmp_path):
    """A logger where the scale can change, nothing where there is none."""
    (logger,) = Config("mixed_float16", DynamicScale(), LogConfig(7, 0, True)).callbacks(tmp_path)
    assert isinstance(logger, LossScaleLogger)
    assert (logger.path, logger.every, logger.verbose) == (tmp_path / "loss_scale.jsonl", 7, 0)
    assert logger.tensorboard == tmp_path / "tensorboard"
    assert Config("float32").callbacks(tmp_path) == []


def test_float16_without_scaling_is_not_scaled_by_keras_either():
    """Keras wraps a bare optimizer under mixed_float16: a scale of 1 keeps it from that."""
    config = Config("mixed_float16")
    optimizer = config.optimizer("sgd")
    assert optimizer.rule == ConstantScale(1.0)
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
    ],
)
def test_what_no_file_can_say_is_refused(values, name):
    """A Config made by hand is checked like a file."""
    with pytest.raises(ConfigError, match=f"{name} must be .* received"):
        Config(*values)


def test_a_misspelt_policy_is_told_the_nearest():
    """As keys are."""
    with pytest.raises(ConfigError, match=r"received 'mixed_flaot16'; did you mean mixed_float16\?"):
        Config("mixed_flaot16")


def test_a_byte_order_mark_is_no_error(tmp_path):
    """Some editors on Windows write one."""
    (tmp_path / "bom.toml").write_text('policy = "float32"', encoding="utf-8-sig")
    assert load_config(tmp_path / "bom.toml") == Config("float32")
