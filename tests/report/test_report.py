from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import report_logs
from report_logs import CALM, DATA, EVIL, begin, gradient, overflow, printed, snapshot
from typer.testing import CliRunner

from tfmixed import records
from tfmixed._cli import main
from tfmixed.errors import UsageError
from tfmixed.plotting.style import NARROW
from tfmixed.records import Progress
from tfmixed.report import Report, Run, figures, read
from tfmixed.report import html as page

HEAVY = {"tensorflow", "keras", "torch", "jax"}


def write(path, log, tail=""):
    path.write_text("".join(records.to_line(record) + "\n" for record in log) + tail, encoding="utf-8")
    return path


def test_text_is_the_stored_one():
    """`python tests/helpers/report_logs.py` writes the file."""
    assert report_logs.text() == (DATA / "report.txt").read_text(encoding="utf-8")


def test_page_is_the_stored_one():
    """Without the content of figures. `python tests/helpers/report_logs.py` writes the file."""
    assert report_logs.page() == (DATA / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in report_logs.LOGS if name.startswith("fine")])
def test_a_run_without_problems_needs_no_change(name):
    """The stored text says so too."""
    report = Report([Run(name, report_logs.LOGS[name])])
    assert report.sections()[1].parts[0].sentences == ["Nothing that this log shows."]


def test_ranges_in_float32_take_precedence():
    """They come before later ones in half precision, and count at the scale of their step."""
    run = Run("", report_logs.LOGS["scale at the snapshot"])
    assert (run.ranges.record.step, run.measured_at, run.final_scale) == (400, 2.0**15, 2.0**14)


def test_overflows_are_counted_by_variable():
    """Also under the name of version 0.1."""
    run = Run("", CALM)
    assert run.overflow_counts == run.guilty == {"conv1/kernel": 2, "dense/bias": 1}


# Logs that cannot be read as a whole.


@pytest.mark.parametrize(
    ("content", "problems"),
    [
        ("", ["no records"]),
        ('{"event": "run", "step": 0}\n', ["Line 1", "no records"]),
        ("\x00\xff\n" * 9, ["Line 1", "Line 2", "Line 3", "6 more lines.*line 9", "no records"]),
    ],
)
def test_a_log_without_records_is_reported(tmp_path, content, problems):
    """Of zero bytes, of another version, or of noise: the report names the problem."""
    path = tmp_path / "log.jsonl"
    path.write_text(content, encoding="utf-8")
    run = read(path)
    assert len(run.problems) == len(problems)
    assert all(map(re.search, problems, run.problems))
    assert "What is missing" in printed(Report([run]))


def test_invalid_lines_are_left_out(tmp_path):
    """An invalid line is named by its number, an incomplete last line too, and all others count."""
    path = write(tmp_path / "log.jsonl", CALM, records.to_line(CALM[-1])[:40])
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], lines[1], "{broken", *lines[2:]]))
    run = read(path)
    assert run.log == CALM
    assert all(map(re.search, ["Line 3", "incomplete"], run.problems))


@pytest.mark.parametrize(
    "damage",
    [
        ('"largest": 9.5367431640625e-07', '"largest": Infinity'),
        ("411", "1" * 30),
        ('"new_scale": 4096.0', '"new_scale": 1e300'),
    ],
)
def test_a_damaged_number_costs_only_its_line(tmp_path, damage):
    """The line is named, and all others are reported."""
    path = write(tmp_path / "log.jsonl", CALM)
    path.write_text(path.read_text().replace(*damage, 1))
    run = read(path)
    assert re.match(r"Line [456]", run.problems[0])
    assert len(run.log) == 5


def test_a_cut_log_is_reported(tmp_path):
    """At any length at which a run was killed."""
    whole = write(tmp_path / "log.jsonl", CALM).read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "cut.jsonl").write_bytes(whole[:length])
        assert "What happened" in printed(Report([read(tmp_path / "cut.jsonl")]))


def test_a_log_without_its_first_line_is_reported(tmp_path):
    """The report says what is missing, and the rest is there."""
    run = read(write(tmp_path / "log.jsonl", CALM[1:]))
    assert "first line" in run.problems[0]
    assert "412 steps, 3 skipped" in printed(Report([run]))


def test_a_lone_surrogate_can_be_written(tmp_path):
    """JSON can escape half of a surrogate pair, which UTF-8 cannot encode."""
    path = write(tmp_path / "log.jsonl", (begin(), overflow(3, name="\ud800")))
    assert "`?` in 1 of 1" in printed(Report([read(path)]))


def test_a_folder_stands_for_its_log(tmp_path):
    """The log is its only one, or the only one in its subfolders."""
    (tmp_path / "logs").mkdir()
    write(tmp_path / "logs" / "inner.jsonl", CALM[1:])
    assert read(tmp_path).log == CALM[1:]
    write(tmp_path / "a.jsonl", CALM)
    assert read(tmp_path).log == CALM
    write(tmp_path / "b.jsonl", CALM)
    with pytest.raises(UsageError, match=r"a.jsonl, .*b.jsonl"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["nothing", ""])
def test_a_missing_log_is_refused(tmp_path, name):
    """A path that does not exist, and an empty folder."""
    with pytest.raises(UsageError, match="RUN"):
        read(tmp_path / name)


# The page and the picture.


def many(layers=150):
    """A log of a large model, with names that look like markup."""
    kinds = ("activation", "weight")
    ranges = [gradient(f"encoder/block_{i}/{EVIL}", -40 + i % 30, kind=kind) for i in range(layers) for kind in kinds]
    changes = [overflow(i * 7, 2.0**14, EVIL if i % 2 else f"layer_{i}/kernel") for i in range(40)]
    snapshots = snapshot(*ranges, step=0), snapshot(*ranges)
    return Run("many", (begin(model=EVIL), *changes, *snapshots, Progress(999, 0, 1.0, 40)))


def test_page_is_self_contained():
    """One SVG per figure in the reader's colors, no script, no resource but data, and text of a log is escaped."""
    source = page.render([many(3)])
    assert html.escape(EVIL, quote=False) in source
    assert not re.search("<script|<img|url\\((?!#)", source)
    assert all(link.startswith(("data:", "#")) for link in re.findall('(?:src|href)="([^"]{0,40})', source))
    drawn = re.findall("<svg.*?</svg>", source, flags=re.DOTALL)
    assert len(drawn) == source.count('role="img" aria-label="') == 4
    for svg in drawn:
        ElementTree.fromstring(svg)
        assert "currentColor" in svg
        used = set(re.findall(r"var\(--([\w-]+)\)", svg))
        assert used <= set(re.findall(r"--([\w-]+):", source))
        assert not re.search("#(1a1a1a|ffffff|000000)", svg)


def test_histograms_side_by_side_have_the_same_axis():
    """The axis includes the gradients of all runs."""
    small, large = (Run("r", (begin(), snapshot(gradient("a", at)), Progress(9, 0, 8.0, 0))) for at in (-70, 20))
    draw = figures.FIGURES["ranges"].draw
    limits = [draw(run, "light", NARROW, [small, large]).axes[0].get_xlim() for run in (small, large)]
    assert limits[0] == limits[1] == (-71, 37)
    assert draw(small, "light", NARROW, [small]).axes[0].get_xlim()[1] == 20


def test_figures_are_one_png(tmp_path):
    """Of two runs, one of which is empty."""
    Report([Run("calm", CALM), Run("none", ())]).save_picture(tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes()[1:4] == b"PNG"


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<!doctype html><meta charset="utf-8"><iframe id="page" style="width: 390px; height: 800px"></iframe>
<p id="result"></p><script>
const frame = document.getElementById("page")
frame.onload = () => {
  const inside = frame.contentDocument
  const drawn = [...inside.querySelectorAll("svg")].every((svg) => svg.getBoundingClientRect().height > 100)
  document.getElementById("result").textContent = `result ${inside.documentElement.scrollWidth} ${drawn}`
}
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")
@pytest.mark.parametrize("runs", [[many()], [many(), Run("calm", CALM)], [Run("none", ())]], ids=["one", "two", "none"])
def test_a_browser_opens_the_page(tmp_path, runs):
    """No message on the console, all figures are drawn, and at phone width nothing reaches beyond the edge."""
    path = tmp_path / "page.html"
    Report(runs).save_page(path)
    assert browse(path, tmp_path / "plain")[1] == []
    framed = tmp_path / "framed.html"
    source = html.escape(path.read_text(encoding="utf-8"), quote=True)
    framed.write_text(MEASURE.replace("<iframe", f'<iframe srcdoc="{source}"'))
    dump, messages = browse(framed, tmp_path / "framed")
    width, drawn = re.search(r"result (\d+) (\w+)", dump).groups()
    assert int(width) <= 390
    assert drawn == "true"
    assert messages == []


def browse(path, profile):
    """Returns the document that Chromium makes of a page, and its messages on the console."""
    options = ["--headless", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=20000"]
    root = ["--no-sandbox"] if hasattr(os, "getuid") and os.getuid() == 0 else []
    command = [CHROMIUM, *options, *root, f"--user-data-dir={profile}", "--dump-dom", path.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")
def test_a_browser_message_is_noticed(tmp_path):
    """A page that requests an image against its policy causes one."""
    path = tmp_path / "bad.html"
    path.write_text('<meta http-equiv="Content-Security-Policy" content="default-src \'none\'"><img src="data:,">')
    assert browse(path, tmp_path / "profile")[1]


# The commands `report` and `simulate`.


def command(*arguments):
    """Runs a command in this process. Raises its exception."""
    result = CliRunner().invoke(main.app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


@pytest.mark.slow
def test_commands_import_no_framework(tmp_path):
    """matplotlib only for figures."""
    write(tmp_path / "log.jsonl", CALM)
    code = "import sys; from tfmixed._cli.main import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    for options, allowed in (([], set()), (["--html", "new/a.html", "--png", "a.png"], {"matplotlib"})):
        line = [sys.executable, "-c", code, "report", "log.jsonl", *options]
        run = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path)
        assert "412 steps, 3 skipped (0.7 %)." in run.stdout
        assert set(run.stderr.split()) & {*HEAVY, "matplotlib"} == allowed
    assert (tmp_path / "new" / "a.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "log.jsonl", "--html", "a.html"], "--html needs matplotlib"),
        (["report", "log.jsonl", "--png", "a.png"], "--png needs matplotlib"),
        (["simulate", "--rule", "torch", "--trace", "log.jsonl", "--png", "a.png"], "--png needs matplotlib"),
        (["report", "log.jsonl", "--html", "a.txt"], "--html.*a.txt"),
        (["report", "nothing"], "RUN"),
        (["simulate", "--rule", "nonsense", "--trace", "TF"], "rule"),
        (["simulate", "--rule", "torch", "--trace", "nothing"], "trace"),
        (["simulate", "--rule", "torch", "--trace", "words.txt"], "trace"),
        (["simulate", "--rule", "torch", "--trace", "T" * 3000 + "X"], r"T{40}\.\.\. .*'X'"),
    ],
)
def test_usage_errors(tmp_path, monkeypatch, arguments, message):
    """Nothing is written, and without matplotlib the text still works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write(tmp_path / "log.jsonl", CALM)
    (tmp_path / "words.txt").write_text("hello")
    with pytest.raises(UsageError, match=message):
        command(*arguments)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["log.jsonl", "words.txt"]
    assert "412 steps" in command("report", "log.jsonl")


def test_report_writes_all_files_or_none(tmp_path):
    """If one of its files cannot be written, the other one is not written either."""
    log = write(tmp_path / "log.jsonl", CALM)
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UsageError, match="--png"):
        command("report", log, "--html", tmp_path / "a.html", "--png", tmp_path / "a.png")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.png", "log.jsonl"]


def test_simulate_compares_rules(tmp_path):
    """On letters, on a file of letters and on a log; as a table and as a picture."""
    (tmp_path / "trace.txt").write_text("TTF\nTTT\n")
    rules = ("--rule", "dynamic:initial_scale=8", "--rule", "1024")
    letters, file = (command("simulate", *rules, "--trace", trace) for trace in ("TTFTTT", tmp_path / "trace.txt"))
    assert letters == file
    assert "6 steps" in letters
    assert "beyond" not in letters
    log = write(tmp_path / "log.jsonl", CALM)
    assert "beyond" in command("simulate", *rules, "--trace", log, "--png", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"


def test_simulate_prints_json(tmp_path):
    """One entry per rule, in the order of the options."""
    log = write(tmp_path / "log.jsonl", CALM)
    result = json.loads(command("simulate", "--rule", "dynamic", "--rule", "2^20", "--trace", log, "--json"))
    assert (result["steps"], result["unlisted_skips"]) == (412, 0)
    dynamic, high = result["rules"]
    assert (dynamic["name"], dynamic["final_scale"], dynamic["skipped_steps"]) == ("dynamic", 2.0**12, 3)
    assert dynamic["steps_above_recorded"] == 0
    assert (high["skipped_steps"], high["steps_above_recorded"]) == (3, 409)
