from __future__ import annotations

import io
import json
import math
import random
import sys
import tomllib
from pathlib import Path

import broken
import pytest
import tomli_w
from rich.console import Console
from thorough import few
from typer.testing import CliRunner

import tfmixed
from tfmixed import records, scaling
from tfmixed._cli import main
from tfmixed.config import load_config
from tfmixed.errors import ConfigError, UsageError
from tfmixed.ranges import GradientRanges
from tfmixed.records import EventsLost, GradientRange, Progress, RangesRecord, RunRecord, ScaleChange
from tfmixed.report import Report, read
from tfmixed.scaling import replay

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
RULE = scaling.DynamicScale().get_config()
LOG = [
    RunRecord(0, 2.0**15, "2026-01-01T00:00:00+00:00", "net", "mixed_float16", RULE, "Adam", ["CPU"], {"Keras": "3"}),
    ScaleChange(3, 2.0**15, 2.0**14, "overflow", "conv/kernel", 0),
    EventsLost(2, 7, 0),
    ScaleChange(9, 2.0**14, 2.0**15, "growth"),
    RangesRecord(
        10, 0, "float32", 1.0, 2, "net",
        [GradientRange("conv/kernel", "weight", "conv", "float16", 5, 0, 2.0**-20, 2.0**-20, {-20: (9, 0, 0, 0)})],
    ),
    Progress(40, 0, 2.0**15, 3, 1.0, 0.5),
]  # fmt: skip
LINES = [records.to_line(record) for record in LOG]


def broken_log(chance):
    """Returns a log with one broken line, or with broken bytes."""
    if chance.random() < 0.5:
        return broken.bytes_of(chance, "\n".join([*LINES, ""]).encode())
    lines, place = [*LINES], chance.randrange(len(LINES))
    lines[place] = json.dumps(broken.value_of(chance, json.loads(LINES[place])))
    return "\n".join([*lines, ""]).encode()


def broken_config(chance):
    """Returns a configuration with a broken value, or with broken bytes."""
    content = chance.choice(CONFIGS).read_bytes()
    if chance.random() < 0.3:
        return broken.bytes_of(chance, content)
    try:
        return tomli_w.dumps(broken.value_of(chance, tomllib.loads(content.decode()))).encode("utf-8", "replace")
    except TypeError:  # TOML has no null
        return b"policy = null"


@pytest.mark.parametrize("first", few(["0"], {str(first): first for first in range(0, 400, 100)}))
def test_broken_configurations_are_refused(tmp_path, first):
    """The error names the file. A configuration that is still valid can be saved."""
    path, refused, accepted = tmp_path / "run.toml", 0, 0
    for seed in range(first, first + 100):
        path.write_bytes(broken_config(random.Random(seed)))
        try:
            config = load_config(path)
        except ConfigError as error:
            refused += str(error).startswith(f"{path}: ")
        else:
            accepted += 1
            config.save(tmp_path / "again.toml")
            assert load_config(tmp_path / "again.toml") == config, f"seed {seed}"
    assert refused + accepted == 100
    assert min(refused, accepted) > 5
    assert {entry.name for entry in tmp_path.iterdir()} == {"run.toml", "again.toml"}


@pytest.mark.parametrize("first", few(["0"], {str(first): first for first in range(0, 400, 100)}))
def test_broken_logs_give_partial_reports(tmp_path, first):
    """Problems are reported, and no control character of a log reaches the terminal."""
    path, partial = tmp_path / "loss_scale.jsonl", 0
    for seed in range(first, first + 100):
        path.write_bytes(broken_log(random.Random(seed)))
        run, out = read(path), io.StringIO()
        Console(file=out, width=120).print(Report([run]))
        assert "What happened" in out.getvalue()
        assert not {"\x1b", "\x00"} & set(out.getvalue()), f"seed {seed}"
        partial += bool(run.problems)
    assert partial > 50


def end_of(command):
    """Runs a command in this process. An unexpected exception fails the test."""
    result = CliRunner().invoke(main.app, command)
    if result.exception and not isinstance(result.exception, (SystemExit, UsageError, ConfigError)):
        raise result.exception
    return result


@pytest.mark.slow
def test_pages_and_pictures_of_broken_logs_are_complete(tmp_path):
    """Text of a log is not markup in them."""
    path, page, picture = tmp_path / "loss_scale.jsonl", tmp_path / "page.html", tmp_path / "picture.png"
    for seed in range(3):
        path.write_bytes(broken_log(random.Random(seed)))
        end_of(["report", str(path), "--html", str(page), "--png", str(picture)])
        text = page.read_text(encoding="utf-8")
        assert text.rstrip().endswith("</html>")
        assert "<script" not in text
        assert picture.read_bytes()[-8:-4] == b"IEND"
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, page.name, picture.name}


def test_simulations_of_broken_logs(tmp_path):
    """The result is valid JSON, or one error."""
    path, done = tmp_path / "loss_scale.jsonl", 0
    for seed in range(40):
        path.write_bytes(broken_log(random.Random(seed)))
        result = end_of(["simulate", "--rule", "dynamic", "--trace", str(path), "--json"])
        if result.exit_code == 0:
            found = json.loads(result.stdout)["rules"][0]
            assert math.isfinite(found["final_scale"]), f"seed {seed}"
            done += 1
        else:
            assert isinstance(result.exception, UsageError), f"seed {seed}"
    assert 20 < done < 40


def test_broken_ranges_are_refused(tmp_path):
    """Ranges that are still valid have numeric results."""
    path, refused, accepted = tmp_path / "ranges.json", 0, 0
    for seed in range(100):
        chance = random.Random(seed)
        content = broken.value_of(chance, json.loads(LINES[4])) if seed % 2 else None
        path.write_bytes(
            json.dumps(content).encode() + b"\n" if content else broken.bytes_of(chance, LINES[4].encode() + b"\n")
        )
        try:
            ranges = GradientRanges.load(path)
        except ValueError as error:
            refused += str(error).startswith(("line must be a record", "path must be a file"))
        else:
            accepted += 1
            assert json.loads(json.dumps(ranges.as_dict(), allow_nan=False)), f"seed {seed}"
    assert refused + accepted == 100
    assert min(refused, accepted) > 5


def test_broken_states_are_refused():
    """A `GradScaler` keeps its state."""
    given, refused = tfmixed.GradScaler(rule=scaling.DynamicScale(hysteresis=2)).state_dict(), 0
    scaler = tfmixed.GradScaler(init_scale=4.0)
    for seed in range(150):
        before = scaler.state_dict()
        try:
            scaler.load_state_dict(broken.value_of(random.Random(seed), given))
        except ValueError:
            assert scaler.state_dict() == before, f"seed {seed}"
            refused += 1
        else:
            assert 0 < scaler.get_scale() < math.inf, f"seed {seed}"
    assert 50 < refused < 150


def test_broken_rules_of_a_command_line():
    """Text is parsed and never executed."""
    refused, accepted = 0, 0
    for seed in range(100):
        chance = random.Random(seed)
        whole = chance.choice(
            ("dynamic:growth_interval=500,hysteresis=2", "apex:init_scale=8", "1024", "torch", "logmax")
        )
        text = broken.bytes_of(chance, whole.encode()).decode("utf-8", "replace")
        try:
            rule = replay.parse(text)
        except ValueError as error:
            refused += "received" in str(error).lower()
        else:
            accepted += 1
            assert 0 < rule.start().scale < math.inf, f"seed {seed}"
    assert refused + accepted == 100
    assert min(refused, accepted) > 5


def test_only_the_named_module_is_imported(tmp_path, monkeypatch):
    """`module:function` cannot hold calls, paths or commands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')\n")
    for spec in ("evil()", "evil.py", "os:system('true')", "__import__('evil'):x", "../evil:x", ":x", "evil;x:y"):
        result = end_of(["audit", spec])
        assert isinstance(result.exception, UsageError) or result.exit_code == 2, spec
        assert "evil" not in sys.modules
