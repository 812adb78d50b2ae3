from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import tfmixed
from tfmixed import records
from tfmixed._cli import main
from tfmixed._cli.main import app
from tfmixed.records import Progress, ScaleChange

HEAVY = {"tensorflow", "keras", "numpy", "matplotlib", "jax", "torch"}


def tfmixed_command(*arguments, cwd=None, **environment):
    """Runs `python -m tfmixed` in a process of its own."""
    command = [sys.executable, "-m", "tfmixed", *arguments]
    options = {"capture_output": True, "text": True, "timeout": 180, "check": False, "cwd": cwd}
    return subprocess.run(command, env={**os.environ, **environment}, **options)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a command in this process, in an empty folder."""

    def run(*arguments):
        with monkeypatch.context() as patched:
            patched.chdir(tmp_path)
            patched.setattr(sys, "argv", ["tfmixed", *arguments])
            patched.setattr(sys, "path", [*sys.path])
            patched.delitem(sys.modules, "net", raising=False)
            code = 0
            try:
                main.main()
            except SystemExit as end:
                code = int(end.code or 0)
        sys.modules.pop("net", None)
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run


@pytest.mark.slow
def test_help_loads_no_framework():
    """`tfmixed --help` must be fast."""
    code = (
        "import sys\n"
        "sys.argv = ['tfmixed', '--help']\n"
        "from tfmixed._cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "doctor" in run.stdout
    assert not HEAVY & set(run.stderr.split())


def test_version_is_that_of_the_package():
    """Nothing else is printed."""
    assert CliRunner().invoke(app, ["--version"]).output == f"{tfmixed.__version__}\n"


def test_doctor_prints_a_table():
    """It shows the policy and the settings."""
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    for words in ("policy", tfmixed.hardware.describe().policy, "oneDNN", "XLA", "TF32"):
        assert words in result.output


@pytest.mark.slow
def test_doctor_prints_json_alone(tmp_path):
    """Output of the model's module goes to standard error. Warnings are in the JSON."""
    (tmp_path / "net.py").write_text(
        "import keras\n"
        "print('printed by the module')\n"
        "def build(): return keras.Sequential([keras.Input((16,)), keras.layers.Dense(30)])\n"
    )
    run = tfmixed_command("doctor", "--json", "--model", "net:build", cwd=tmp_path, TF_ENABLE_ONEDNN_OPTS="0")
    assert run.returncode == 0, run.stderr
    read = json.loads(run.stdout)
    assert "printed by the module" in run.stderr
    assert read["switches"]["onednn"] is False
    assert read["switches"]["variables"]["TF_ENABLE_ONEDNN_OPTS"] == "0"
    assert [width["name"] for width in read["widths"]] == ["units"]
    if tfmixed.hardware.describe().main.kind == "cpu":
        assert any("TF_ENABLE_ONEDNN_OPTS" in warning for warning in read["warnings"])


def test_usage_errors_are_one_line(command):
    """On standard error, with exit code 2 and no traceback."""
    run = command("doctor", "--model", "nowhere:build")
    assert run.returncode == 2
    assert run.stdout == ""
    assert "no module 'nowhere'" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


@pytest.mark.slow
def test_missing_backend_is_one_line(tmp_path):
    """It names the error of the import."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    run = tfmixed_command("doctor", KERAS_BACKEND="torch", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert run.returncode == 2
    assert "no torch here" in run.stderr.splitlines()[-1]


@pytest.mark.slow
def test_output_of_an_import_that_aborts_is_shown(tmp_path):
    """It is not buffered."""
    (tmp_path / "torch.py").write_text("import os; os.write(2, b'last words'); os.abort()")
    run = tfmixed_command("doctor", KERAS_BACKEND="torch", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert run.returncode != 0
    assert "last words" in run.stderr


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's")
@pytest.mark.parametrize("arguments", [["--help"], ["simulate", "--rule", "dynamic", "--trace", "TTF", "--json"]])
def test_full_disk_is_one_line(arguments):
    """Also for output that is flushed at exit."""
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "tfmixed", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert "No space" in line


@pytest.mark.parametrize("arguments", [["nonsense"], ["doctor", "--nonsense"]])
def test_unknown_commands_and_options_are_refused(arguments):
    """With exit code 2."""
    assert CliRunner().invoke(app, arguments).exit_code == 2


TINY = """
import keras, numpy

def tiny():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model, numpy.ones((8, 8)), numpy.ones((8, 1))
"""


@pytest.mark.thorough
def test_bench_prints_json_and_draws(tmp_path):
    """Progress bars go to standard error."""
    (tmp_path / "net.py").write_text(TINY)
    options = ("--rounds", "1", "--seconds", "0.01", "--no-peak", "--json", "--plot", "times.png")
    run = tfmixed_command("bench", "--model", "net:tiny", *options, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)["rows"]
    assert [row["variant"] for row in rows] == ["float32", "unscaled", "keras", "tfmixed"]
    assert (tmp_path / "times.png").read_bytes()[1:4] == b"PNG"


def test_bench_prints_json(command, monkeypatch):
    """Of the report that it measures."""
    from tfmixed._cli import bench

    rows = tuple(bench.Row("mlp", variant, 8, (1.0,), 1.0, 1, 0.5) for variant in bench.VARIANTS)
    report = bench.Report("mixed_bfloat16", "CPU", {}, rows)
    monkeypatch.setattr(bench, "run", lambda *_, **__: report)
    assert json.loads(command("bench", "mlp", "--json").stdout)["rows"][0]["variant"] == "float32"
    assert "mlp" in command("bench", "mlp").stdout


@pytest.mark.parametrize("name", ["doctor", "audit", "ranges", "memory", "bench", "report", "simulate", "run"])
def test_commands_have_help(command, name):
    """All of them."""
    assert "Usage" in command(name, "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet"], "resnet"),
        (["mlp", "--plot", "times.docx"], "must end in"),
        (["mlp", "--policy", "int8"], "int8"),
    ],
)
def test_bench_refuses_before_it_measures(command, arguments, message):
    """With one line and exit code 2."""
    run = command("bench", *arguments)
    assert (run.returncode, run.stdout) == (2, "")
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("tfmixed: ")]
    assert re.search(message, line)


NETS = """
import keras, numpy
from keras import ops

print('printed by the module')

def build():
    x = keras.Input((64,))
    model = keras.Model(x, keras.layers.Dense(8, activation="softmax", name="out")(x))
    model.compile("sgd", "categorical_crossentropy")
    return model

def step():
    return build(), numpy.full((2, 64), 1e5, "float32"), numpy.ones((2, 8), "float32")
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--policy", "mixed_float16"], 1),
        (["--policy", "mixed_bfloat16", "--fail-on", "warning"], 1),
        pytest.param(["--policy", "mixed_float16", "--fail-on", "never"], 0, marks=pytest.mark.slow),
        pytest.param(["--policy", "mixed_bfloat16"], 0, marks=pytest.mark.slow),
        pytest.param([], 0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:policy .* is slow here")
def test_audit_tells_by_its_exit_code(command, tmp_path, arguments, code):
    """It is 1 if there are findings of the given severity."""
    (tmp_path / "net.py").write_text(NETS)
    run = command("audit", "net:build", *arguments)
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr
    assert "printed by the module" in run.stderr
    assert "printed by the module" not in run.stdout
    assert ("softmax" in run.stdout) if arguments else ("Nothing computes in half precision" in run.stdout)


@pytest.mark.slow
def test_audit_runs_inputs_and_prints_json(tmp_path):
    """The inputs that the function returns with the model."""
    (tmp_path / "net.py").write_text(NETS)
    run = tfmixed_command("audit", "net:step", "--policy", "mixed_float16", "--json", cwd=tmp_path)
    assert run.returncode == 1
    read = json.loads(run.stdout)
    assert read["ran"] is True
    assert "overflow" in {finding["op"] for finding in read["findings"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere:build"], "no module 'nowhere'"),
        (["net:build", "--policy", "half"], "half"),
        (["missing.keras"], "no such file"),
        (["small:lists"], "arrays"),
        (["small:array"], r"returned array\("),
    ],
)
def test_audit_refuses_in_one_line(command, tmp_path, arguments, message):
    """With exit code 2."""
    (tmp_path / "net.py").write_text(NETS)
    (tmp_path / "small.py").write_text(f"{NET}\n\ndef array(): return numpy.ones((4, 2))\n")
    run = command("audit", *arguments)
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    assert re.search(message, run.stderr.splitlines()[-1])


ON_MODELS = [["audit"], ["doctor", "--model"], ["ranges"], ["bench", "--model"]]


@pytest.mark.parametrize("arguments", ON_MODELS, ids=" ".join)
@pytest.mark.parametrize(
    ("code", "received"),
    [
        ("def f(): sys.exit()", "sys.exit(None)"),
        ("def f(): sys.exit(0)", "sys.exit(0)"),
        ("sys.exit(0)", "sys.exit(0)"),
        ("class Odd(BaseException): pass\ndef f(): raise Odd('why')", "Odd: why"),
        ("def f(): return 1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(): input()", "EOFError"),
        ("x = = 3", "SyntaxError: invalid syntax"),
    ],
)
def test_code_of_the_model_that_exits_or_fails_ends_with_2(command, tmp_path, monkeypatch, arguments, code, received):
    """Exit codes 0 and 1 are results of an audit."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    (tmp_path / "net.py").write_text(f"import sys\n{code}\n")
    run = command(*arguments, "net:f")
    assert (run.returncode, run.stdout) == (2, "")
    assert f"Received: {received}" in run.stderr.splitlines()[-1]


SUBCLASSED = """
import keras, numpy

class Net(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = keras.layers.Embedding(9, 6), keras.layers.Dense(1)

    def call(self, x):
        return self.head(self.embedding(x))

def f():
    model = Net()
    model.compile("sgd", "mse")
    return model, numpy.ones((4, 2), int), numpy.ones((4, 2))
"""


@pytest.mark.parametrize("arguments", ON_MODELS[:3], ids=" ".join)
def test_a_subclassed_model_is_built_for_its_inputs(command, tmp_path, arguments):
    """For all commands that take a function which returns `model, x, y`."""
    (tmp_path / "net.py").write_text(SUBCLASSED)
    run = command(*arguments, "net:f", "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)


NET = """
import keras
import numpy
import tensorflow


def compiled(scale=1.0):
    hidden, head = keras.layers.Dense(8, name="hidden"), keras.layers.Dense(2, name="head")
    model = keras.Sequential([keras.Input((4,)), hidden, head])
    model.compile("sgd", loss=lambda y, x: scale * keras.ops.mean(keras.ops.square(y - x)))
    x = numpy.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    return model, x, x[:, :2]


def small():
    return compiled(1e-6)


def alone():
    return compiled()[0]


def broken():
    model, x, y = compiled()
    return model, x[:, :3], y


def empty():
    model, x, y = compiled()
    return model, tensorflow.data.Dataset.from_tensor_slices((x, y)).batch(8).take(0)


def nothing_at_all():
    model, x, y = compiled()
    return model, x[:0], y[:0]


def inputs():
    return compiled()[:2]


def inputs_and_none():
    return *compiled()[:2], None


def lists():
    model, x, y = compiled()
    return model, x.tolist(), y.tolist()
"""


@pytest.mark.slow
def test_ranges_prints_saves_and_draws(tmp_path):
    """A table, the counts as a line of a log, a plot."""
    (tmp_path / "net.py").write_text(NET)
    files = "--save", "counts.jsonl", "--png", "ranges.png"
    run = tfmixed_command("ranges", "net:small", "--policy", "mixed_float16", *files, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "hidden (output)" in run.stdout
    assert re.search(r"2\^\d+ to 2\^\d+", run.stdout)
    assert len(tfmixed.ranges.GradientRanges.load(tmp_path / "counts.jsonl")) == 6
    assert (tmp_path / "ranges.png").read_bytes().startswith(b"\x89PNG")


def test_ranges_prints_json_alone(command, tmp_path):
    """Advice, and the counts behind it."""
    (tmp_path / "net.py").write_text(NET)
    run = command("ranges", "net:compiled", "--json", "--steps", "1", "--headroom", "4")
    found = json.loads(run.stdout)
    assert found["suggested_scale"] * 4 * max(gradients["largest"] for gradients in found["measured"]["ranges"]) < 65504
    assert found["measured"]["batches"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net:alone"], "must be compiled"),
        (["net:inputs"], "inputs and targets"),
        (["net:inputs_and_none"], "inputs and targets"),
        (["net:nothing"], "no attribute"),
        (["net:empty"], "_TakeDataset"),
        (["net:nothing_at_all"], "batch"),
        (["net:compiled", "--png", "ranges.docx"], "must end in"),
        (["net:compiled", "--policy", "float17"], "float17"),
        (["net:compiled", "--save", "."], "--save must"),
        (["net:compiled", "--save", "/proc/nowhere/x.json"], "--save must"),
    ],
)
def test_ranges_refuses_in_one_line(command, tmp_path, arguments, message):
    """With exit code 2 and without a traceback."""
    (tmp_path / "net.py").write_text(NET)
    run = command("ranges", *arguments)
    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("name", ["audit", "ranges"])
def test_errors_of_the_model_are_shown(command, tmp_path, name):
    """With a traceback, and one line at the end."""
    (tmp_path / "net.py").write_text(NET)
    run = command(name, "net:broken")
    assert run.returncode == 2
    assert "Traceback" in run.stderr
    assert run.stderr.splitlines()[-1].startswith("tfmixed: ")


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["1", "1, 2"])
def test_closed_output_ends_with_2(tmp_path, closed):
    """The model's code closes the descriptors."""
    closing = "".join(f"os.close({number}); " for number in closed.split(", "))
    (tmp_path / "net.py").write_text(f"import os\n{TINY}\ndef closing(): {closing}return tiny()\n")
    run = tfmixed_command("audit", "net:closing", cwd=tmp_path)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert ("tfmixed: Standard output cannot be written" in run.stderr) == (closed == "1")


@pytest.mark.parametrize("arguments", ON_MODELS[:3], ids=" ".join)
def test_a_subclassed_model_is_built_for_a_dataset(command, tmp_path, arguments):
    """For its first batch."""
    dataset = "tensorflow.data.Dataset.from_tensor_slices(data).batch(2)"
    text = f"{SUBCLASSED}\n\ndef g():\n    import tensorflow\n    model, *data = f()\n    return model, {dataset}\n"
    (tmp_path / "net.py").write_text(text.replace("(data)", "(tuple(data))"))
    run = command(*arguments, "net:g", "--json")
    assert run.returncode == 0, run.stderr


NOT_LOGS = {
    "text": b"notes\nof mine\n",
    "line": b"notes",
    "empty": b"",
    "binary": b"\x7fELF\0\xff\n",
    "utf16": "x\n".encode("utf-16"),
    "newer": b'{"event": "run", "format": 2}\n',
}
READERS = [["report"], ["simulate", "--rule", "dynamic", "--trace"]]
LINES = "".join(
    f"{records.to_line(record)}\n" for record in (ScaleChange(2, 8.0, 4.0, "overflow"), Progress(9, 0, 4.0, 1))
)


@pytest.mark.parametrize("way", READERS, ids=lambda way: way[0])
@pytest.mark.parametrize("content", NOT_LOGS.values(), ids=NOT_LOGS)
def test_other_files_are_refused_in_one_line(command, tmp_path, way, content):
    """Text, an empty file, bytes, another encoding, a log of a later version."""
    (tmp_path / "notes.txt").write_bytes(content)
    run = command(*way, "notes.txt")
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert run.stderr.startswith("tfmixed: ")


@pytest.mark.parametrize("way", READERS, ids=lambda way: way[0])
def test_unusual_names_and_line_ends_are_read(command, tmp_path, way):
    """Names that are not UTF-8, a byte order mark, CRLF."""
    lines = LINES
    names = [os.fsdecode(name) for name in (b"caf\xe9", b"caf\xe9/log\xff.jsonl", b"bom.jsonl", b"crlf.jsonl")]
    (tmp_path / names[0]).mkdir()
    for name, text in zip(names[1:], (lines, "\ufeff" + lines, lines.replace("\n", "\r\n")), strict=True):
        (tmp_path / name).write_bytes(text.encode())
    outputs = []
    for name in names:
        run = command(*way, name)
        assert (run.returncode, run.stderr) == (0, "")
        outputs.append(run.stdout.encode())
    assert way == ["report"] or len({*outputs}) == 1


def test_page_with_an_unusual_name_is_written(command, tmp_path):
    """Bytes of names that are not UTF-8 are escaped in the page."""
    name, page = (os.fsdecode(b"caf\xe9" + suffix) for suffix in (b".jsonl", b".html"))
    (tmp_path / name).write_text(LINES)
    assert command("report", name, "--html", page).returncode == 0
    assert "caf\\xe9.jsonl" in (tmp_path / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("way", READERS, ids=lambda way: way[0])
@pytest.mark.parametrize("name", ["nothing", "x" * 300, "."])
def test_paths_without_a_log_are_refused_in_one_line(command, way, name):
    """Also impossible ones."""
    run = command(*way, name)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("picture", ["/proc/nowhere/a.png", "net.py/a.png", "."])
def test_bench_checks_the_plot_before_it_measures(command, tmp_path, picture):
    """So that minutes of measurements are not lost."""
    (tmp_path / "net.py").write_text(NET)
    run = command("bench", "mlp", "--plot", picture)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
