"""`tfmixed run` behaves as `python`: arguments, exit codes, signals, tracebacks. No framework is imported here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tfmixed._cli import main
from tfmixed._cli.run.options import VARIABLE

SCRIPT = """
import atexit, multiprocessing, os, signal, sys, threading, time

print(sys.argv, __name__, __file__, sys.path[0], __spec__, __package__, sys.stdin.read())
print(sys.modules["__main__"].__dict__ is globals(), [name for name in ("keras", "numpy") if name in sys.modules])
print(os.environ.get("PYTHONPATH"), [name for name in os.environ if name.startswith("TFMIXED")])
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

def spawn():
    process = multiprocessing.get_context("spawn").Process(target=fail)
    process.start()
    process.join()
    print(process.exitcode)

if __name__ == "__main__":
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
        "spawn": spawn,
    }[sys.argv[1]]()
"""
FAILED = {"raise": "ValueError", "hooked": "ValueError", "SIGINT": "KeyboardInterrupt"}
ENDS = ["raise", "code", "message", "SIGINT", "SIGTERM", "handled", "_exit", "hooked", "thread", "thread fails"]


def start(*command, cwd, **options):
    options = {"capture_output": True, "text": True, "timeout": 60, "check": False, "input": "typed", **options}
    return subprocess.run([sys.executable, *command], cwd=cwd, **options)


def messages(text):
    return [line for line in text.splitlines() if line.startswith("tfmixed: ")]


def other_lines(text):
    return [line for line in text.splitlines() if not line.startswith("tfmixed: ")]


@pytest.fixture
def script(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


@pytest.mark.parametrize(
    "end", ["nothing", *(pytest.param(end, marks=pytest.mark.slow) for end in [*ENDS, "fork", "spawn"])]
)
def test_scripts_run_and_end_as_under_python(script, end):
    """The same output, errors, tracebacks and exit code, and one line more at a regular exit."""
    arguments = ("train.py", end, "--policy", "x", "--help", "--", "-m")
    plain, run = start(*arguments, cwd=script), start("-m", "tfmixed", "run", *arguments, cwd=script)
    assert (run.returncode, run.stdout) == (plain.returncode, plain.stdout)
    assert other_lines(run.stderr) == plain.stderr.splitlines()
    lines = messages(run.stderr)
    assert len(lines) == (end not in ("SIGTERM", "_exit"))
    assert run.stderr.endswith("".join(f"{line}\n" for line in lines))
    assert all(FAILED.get(end, "did not import Keras") in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["module", "package", "folder", "archive"])
def test_modules_folders_and_archives(tmp_path, form):
    """All that Python runs."""
    code = "import sys; print(sys.argv, __name__, __package__, __spec__.name, sys.path[0], __file__)"
    (tmp_path / "app").mkdir()
    for name in ("__init__", "__main__", "part"):
        (tmp_path / "app" / f"{name}.py").write_text("" if name == "__init__" else code)
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        archive.writestr("__main__.py", code)
    forms = {"module": ("-m", "app.part"), "package": ("-m", "app"), "folder": ("app",), "archive": ("app.zip",)}
    arguments = (*forms[form], "--scale", "3")
    plain, run = start(*arguments, cwd=tmp_path), start("-m", "tfmixed", "run", *arguments, cwd=tmp_path)
    assert plain.returncode == run.returncode == 0, run.stderr
    assert run.stdout == plain.stdout


@pytest.mark.slow
def test_sitecustomize_of_the_environment_runs_too(script):
    """The start-up hook hides it, and runs it. Flags of Python are passed on."""
    (script / "hooks").mkdir()
    (script / "hooks" / "sitecustomize.py").write_text("print('customized')")
    path = os.pathsep.join([str(script / "hooks"), *filter(None, [os.environ.get("PYTHONPATH")])])
    (script / "train.py").write_text("import os, sys; print(sys.flags.optimize, os.environ['PYTHONPATH'])")
    run = start("-O", "-m", "tfmixed", "run", "train.py", cwd=script, env={**os.environ, "PYTHONPATH": path})
    assert run.stdout.splitlines() == ["customized", "customized", f"1 {path}"], run.stderr


@pytest.mark.slow
def test_failed_import_of_keras_is_not_called_missing(tmp_path):
    """The last line names the exception."""
    (tmp_path / "train.py").write_text("import os\nos.environ['KERAS_BACKEND'] = 'nonsense'\nimport keras\n")
    run = start("-m", "tfmixed", "run", "train.py", cwd=tmp_path)
    assert (run.returncode, messages(run.stderr)) == (1, ["tfmixed: the script ended with ValueError"])


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Calls the command in this process, and returns what it would execute."""
    executed = []

    def command(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["tfmixed", "run", *arguments])
        monkeypatch.setattr(os, "execve", lambda *call: executed.append(call))
        with pytest.raises(SystemExit) as end:
            main.main()
        out, err = capsys.readouterr()
        assert out == ""
        return end.value.code, err, executed

    return command


def test_python_is_executed_with_the_options_in_its_environment(run, tmp_path):
    """Arguments after the script belong to the script."""
    (tmp_path / "train.py").touch()
    code, _, [(_, command, environment)] = run("--policy", "float16", "train.py", "--policy", "x")
    assert code == 0
    assert command[-3:] == ["train.py", "--policy", "x"]
    options = json.loads(environment[VARIABLE])
    assert (options["policy"], options["folder"]) == ("float16", os.path.join("runs", "train"))
    assert Path(environment["PYTHONPATH"].split(os.pathsep)[0], "sitecustomize.py").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "nowhere.py"),
        (["--policy", "half", "ok.py"], "--policy must"),
        (["--scale", "big", "ok.py"], "--scale"),
        (["--scale", "-1", "ok.py"], "--scale"),
        (["--config", "c.toml", "--scale", "8", "ok.py"], "--config excludes"),
        (["--config", "c.toml", "ok.py"], "polcy"),
        (["--config", "none.toml", "ok.py"], "none.toml"),
        (["--tf1", "--config", "c.toml", "ok.py"], "--tf1 excludes --config"),
        (["--tf1", "--no-islands", "ok.py"], "--tf1 excludes --no-islands"),
        (["--tf1", "--log-dir", "x", "ok.py"], "--tf1 excludes --log-dir"),
        (["--tf1", "--scale", "8", "ok.py"], "--scale must"),
        (["--tf1", "--policy", "float64", "ok.py"], "--policy must not"),
        (["--log-dir", "ok.py", "ok.py"], "--log-dir must"),
    ],
    ids=" ".join,
)
def test_wrong_options_are_refused_in_one_line(run, tmp_path, arguments, message):
    """Before anything runs, with exit code 2 and without a traceback."""
    (tmp_path / "ok.py").touch()
    (tmp_path / "c.toml").write_text('polcy = "float32"\n')
    code, err, executed = run(*arguments)
    assert (code, executed, err.count("\n")) == (2, [], 1)
    assert err.startswith("tfmixed: ")
    assert message in err


@pytest.mark.parametrize("arguments", [[], ["--nonsense", "train.py"]])
def test_usage_errors_end_with_2(run, arguments):
    """No script, or an unknown option."""
    code, err, _ = run(*arguments)
    assert code == 2
    assert "Usage" in err
