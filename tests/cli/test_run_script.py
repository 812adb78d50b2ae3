"""`tfmixed run` is `python`: arguments, exit codes, signals, tracebacks. No framework is loaded here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import zipfile

import pytest

from tfmixed._cli import main

SCRIPT = """
import atexit, os, signal, sys, threading, time

print(sys.argv, __name__, __file__, sys.path[0], __spec__, __package__, sys.stdin.read())
print(sys.modules["__main__"].__dict__ is globals(), [name for name in ("keras", "numpy") if name in sys.modules])
atexit.register(lambda: print("at exit", sys.modules["__main__"].__dict__ is globals()))

def fail():
    try:
        {}["key"]
    except KeyError as error:
        raise ValueError("wrong") from error

def interrupt(signum):
    os.kill(os.getpid(), signum)
    time.sleep(5)

def in_thread(act):
    threading.Thread(target=lambda: (time.sleep(0.2), act())).start()

def handled():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
    interrupt(signal.SIGTERM)

def hooked():
    sys.excepthook = lambda kind, error, trace: print(kind, trace.tb_frame.f_code.co_name, file=sys.stderr)
    fail()

def fork():
    child = os.fork()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) if child else sys.exit(4)

{
    "nothing": lambda: None,
    "raise": fail,
    "code": lambda: sys.exit(3),
    "message": lambda: sys.exit("no data"),
    "SIGINT": lambda: interrupt(signal.SIGINT),
    "SIGTERM": lambda: interrupt(signal.SIGTERM),
    "handled": handled,
    "_exit": lambda: os._exit(7),
    "hooked": hooked,
    "thread": lambda: in_thread(lambda: print("thread", sys.modules["__main__"].__dict__ is globals())),
    "thread fails": lambda: in_thread(fail),
    "fork": fork,
}[sys.argv[1]]()
"""


def start(*command, cwd, **options):
    options = {"capture_output": True, "text": True, "timeout": 60, "check": False, "input": "typed", **options}
    return subprocess.run([sys.executable, *command], cwd=cwd, **options)


def ours(text):
    return [line for line in text.splitlines() if line.startswith("tfmixed: ")]


def others(text):
    return [line for line in text.splitlines() if not line.startswith("tfmixed: ")]


@pytest.fixture
def script(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


ENDS = ["nothing", "raise", "code", "message", "SIGINT", "SIGTERM", "handled", "_exit", "hooked", "thread", "fork"]


ENDED = {
    "raise": "the script ended with ValueError",
    "hooked": "the script ended with ValueError",
    "SIGINT": "the script ended with KeyboardInterrupt",
    "code": "the script ended with exit code 3",
    "message": "the script ended with exit code 1",
    "handled": "the script ended with exit code 9",
}


@pytest.mark.parametrize("end", [*ENDS, "thread fails"])
def test_a_script_runs_and_ends_as_under_python(script, end):
    """The same output, errors, tracebacks and exit code, and one line of ours where Python comes to its end."""
    arguments = ("train.py", end, "--policy", "x", "--help", "--", "-m")
    plain, run = start(*arguments, cwd=script), start("-m", "tfmixed", "run", *arguments, cwd=script)
    assert (run.returncode, run.stdout) == (plain.returncode, plain.stdout)
    assert others(run.stderr) == plain.stderr.splitlines()
    said = ENDED.get(end, "nothing was applied: the script never imported Keras (one of TensorFlow 1 takes --tf1)")
    assert ours(run.stderr) == ([] if end in ("SIGTERM", "_exit") else [f"tfmixed: {said}"])
    assert run.stderr.endswith("".join(f"{line}\n" for line in ours(run.stderr)))


@pytest.mark.parametrize("form", ["module", "package", "folder", "archive"])
def test_what_else_python_runs(tmp_path, form):
    """A module, a package, a folder and a zip file with a `__main__.py`."""
    code = "import sys; print(sys.argv[1:], __name__, __package__, __spec__.name, sys.path[0], __file__)"
    (tmp_path / "app").mkdir()
    for name in ("__init__", "__main__", "part"):
        (tmp_path / "app" / f"{name}.py").write_text("" if name == "__init__" else code)
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        archive.writestr("__main__.py", code)
    forms = {"module": ("-m", "app.part"), "package": ("-m", "app"), "folder": ("app",), "archive": ("app.zip",)}
    arguments = (*forms[form], "--scale", "3")
    plain, run = start(*arguments, cwd=tmp_path), start("-m", "tfmixed", "run", *arguments, cwd=tmp_path)
    assert plain.returncode == run.returncode == 0, run.stderr
    where = str(tmp_path) + os.sep  # Python itself leaves the path of an archive as it was given
    assert run.stdout.replace(where, "") == plain.stdout.replace(where, "")


def test_an_error_of_syntax_is_the_scripts_own(tmp_path):
    """As Python prints it, with its exit code; the file's name says that it is Python."""
    (tmp_path / "train.py").write_text("x = = 3\n")
    plain, run = start("train.py", cwd=tmp_path), start("-m", "tfmixed", "run", "train.py", cwd=tmp_path)
    assert run.returncode == plain.returncode == 1
    assert others(run.stderr) == plain.stderr.splitlines()


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs a command line that is refused before anything runs, in this process."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["tfmixed", "run", *arguments])
        with pytest.raises(SystemExit) as end:
            main.main()
        assert end.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], r"SCRIPT must be a Python file, received 'nowhere.py': there is no such file"),
        (["folder"], r"SCRIPT must be a Python file, received 'folder', a folder or archive without __main__.py"),
        (["notes.txt"], r"SCRIPT must be Python, received 'notes.txt': invalid syntax"),
        (["--policy", "half", "ok.py"], r"--policy must be one of auto, float32, .* received 'half'"),
        (["--scale", "big", "ok.py"], r"--scale: rule must be a number or one of dynamic, .* received 'big'"),
        (["--scale", "-1", "ok.py"], r"--scale: "),
        (["--config", "c.toml", "--scale", "8", "ok.py"], r"--config and --scale exclude each other"),
        (["--config", "c.toml", "ok.py"], r"c\.toml: polcy"),
        (["--config", "none.toml", "ok.py"], r"none\.toml: cannot be read"),
        (["--tf1", "--config", "c.toml", "ok.py"], r"--config is for Keras's models, and --tf1 for"),
        (["--tf1", "--no-islands", "ok.py"], r"--no-islands is for Keras's models"),
        (["--tf1", "--log-dir", "x", "ok.py"], r"--log-dir is for Keras's models"),
        (["--tf1", "--scale", "8", "ok.py"], r"--scale must be dynamic with --tf1, received '8'"),
        (["--tf1", "--policy", "float64", "ok.py"], r"--policy must not be float64 with --tf1"),
        (["--log-dir", "ok.py", "ok.py"], r"--log-dir must be a folder that can be written, received 'ok\.py': "),
    ],
    ids=" ".join,
)
def test_what_cannot_be_done_is_refused_in_one_line(refused, tmp_path, arguments, message):
    """Before anything runs, with exit code 2 and no traceback."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("to do: everything\n")
    (tmp_path / "ok.py").write_text("raise AssertionError\n")
    (tmp_path / "c.toml").write_text('polcy = "float32"\n')
    err = refused(*arguments)
    assert re.match(f"tfmixed: {message}", err)
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--nonsense", "train.py"]])
def test_usage_errors_end_with_2(refused, arguments):
    """No script, an option that is none."""
    assert "Usage" in refused(*arguments)


def test_a_module_that_is_not_there_is_refused(tmp_path):
    """Where it is looked for: in the folder that Python would look in."""
    run = start("-m", "tfmixed", "run", "-m", "nowhere.train", cwd=tmp_path)
    assert run.returncode == 2
    (line,) = ours(run.stderr)
    assert line.startswith("tfmixed: -m must be given the name of a module, received 'nowhere.train'")


def test_an_import_of_keras_that_fails_is_not_said_to_be_missing(tmp_path):
    """Only what ended the script is known."""
    (tmp_path / "train.py").write_text("import os\nos.environ['KERAS_BACKEND'] = 'nonsense'\nimport keras\n")
    run = start("-m", "tfmixed", "run", "train.py", cwd=tmp_path)
    assert (run.returncode, ours(run.stderr)) == (1, ["tfmixed: the script ended with ValueError"])


def test_a_broken_hook_is_shown_as_python_shows_it(tmp_path):
    """With the exception that it was given."""
    code = "import sys\nsys.excepthook = lambda *_: 1 / 0\nraise ValueError('mine')\n"
    (tmp_path / "train.py").write_text(textwrap.dedent(code))
    plain, run = start("train.py", cwd=tmp_path), start("-m", "tfmixed", "run", "train.py", cwd=tmp_path)
    assert run.returncode == plain.returncode == 1
    assert others(run.stderr) == plain.stderr.splitlines()
