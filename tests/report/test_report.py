from __future__ import annotations

import dataclasses
import html
import io
import os
import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from rich.console import Console

from tfmixed import records
from tfmixed._cli import log_commands
from tfmixed.errors import UsageError
from tfmixed.records import EventsLost, GradientRange, Progress, RangesRecord, RunRecord, ScaleChange
from tfmixed.report import Report, Run, advice, figures, read
from tfmixed.report import html as page

DYNAMIC = {"rule": "DynamicScale", "initial_scale": 2.0**15, "growth_interval": 2000, "min_scale": 1.0}
EVIL = "<script>alert(1)</script>&`[bold]x[/bold]"


def begin(rule=DYNAMIC, scale=2.0**15, model="net"):
    versions = {"Python": "3.11", "tfmixed": "0.1.0"}
    return RunRecord(0, scale, "2026-01-01T00:00:00+00:00", model, "mixed_float16", rule, "Adam", ["GPU"], versions)


def gradient(name, exponent, count=100, kind="weight", dtype="float16"):
    size = 2.0**exponent
    return GradientRange(name, kind, name, dtype, 5, 0, size, size, {exponent: (count, 0, 0, 0)})


def snapshot(*gradients, step=400):
    return RangesRecord(step, 0, "float32", 1.0, 2, "net", list(gradients))


def overflow(step, scale=2.0**15, name="conv1/kernel"):
    return ScaleChange(step, scale, scale / 2, "overflow", name, 0)


TWO = gradient("fine", -10), gradient("lost", -60)
CALM = (
    begin(),
    overflow(0),
    overflow(1, 2.0**14, "conv1/kernel"),
    overflow(9, 2.0**13, "dense/bias"),
    snapshot(gradient("conv1/kernel", -20), gradient("dense/bias", -37, 3)),
    Progress(411, 0, 2.0**12, 3, 1.0, 0.5),
)


def write(path, log, tail=""):
    path.write_text("".join(records.to_line(each) + "\n" for each in log) + tail, encoding="utf-8")
    return path


def text(report, width=200):
    out = io.StringIO()
    Console(file=out, width=width).print(report)
    return out.getvalue()


def test_what_happened_is_told_in_words():
    """Steps, scale, who overflowed, and what float16 lost at the scale in use."""
    told = advice.happened(Run("mine", CALM))
    assert told[0] == "412 steps, 3 skipped (0.7 %)."
    assert told[1] == "The loss scale went from 2^15 to 2^12."
    assert told[2] == "The first gradient that overflowed: `conv1/kernel` in 2 of 3, `dense/bias` in 1 of 3."
    assert told[3].startswith(
        "In the last snapshot (step 400) float16 flushes 2.9 % of all gradient values other than 0"
    )
    assert told[3].endswith("at the scale used, 2^12.")
    assert told[4:] == ["Any scale from 2^13 to 2^35 works."]


@pytest.mark.parametrize(
    ("log", "wanted"),
    [
        ((begin(), *(overflow(i, 2.0**15) for i in range(6)), Progress(999, 0, 2.0**9, 6)), r"The first 6 steps were"),
        ((begin(), Progress(99, 0, 1.0, 0), Progress(199, 1, 1.0, 90)), r"90.0 % of the last steps were skipped"),
        ((begin(scale=2.0), overflow(5, 2.0, "a"), Progress(99, 0, 1.0, 1)), "fell to its floor, 2.0"),
        (
            (begin(), *(overflow(i, 8.0) for i in range(50, 100, 9)), Progress(99, 0, 4.0, 6)),
            "scale never settled: 6 of",
        ),
        ((begin({"rule": "ConstantScale", "value": 8.0}, 8.0), Progress(99, 0, 8.0, 4)), r"scale 2\^3 overflowed in 4"),
        ((begin(), EventsLost(7, 20), overflow(20), Progress(99, 0, 2.0**14, 8)), "7 scale changes were lost"),
        ((begin(), snapshot(gradient("a", 10)), Progress(99, 0, 2.0**15, 0)), r"too high .*: at most 2\^5 works"),
        ((begin(scale=2.0**6), snapshot(gradient("a", 10)), Progress(99, 0, 2.0**6, 0)), r"at most 2\^5 works"),
        ((begin(), snapshot(gradient("a", -60)), Progress(99, 0, 2.0**15, 0)), r"too low .* start from 2\^74"),
        ((begin(scale=2.0**35), snapshot(gradient("a", -60)), Progress(99, 0, 2.0**35, 0)), r"too low .* from 2\^74"),
        ((*CALM[:5], Progress(411, 0, 2.0**12, 3)), r"they need 2\^13, and `dense/bias` overflowed at 2\^13"),
        ((begin(), snapshot(gradient("a", 12), gradient("b", -60)), Progress(9, 0, 1.0, 0)), "no single scale works"),
    ],
)
def test_what_to_change_is_told_in_words(log, wanted):
    """One piece of advice for each thing that can go wrong."""
    wanted = wanted.replace("floor, 2.0", r"floor, 2\^0")
    assert any(re.search(wanted, sentence) for sentence in advice.advice(Run("mine", log))), advice.advice(
        Run("a", log)
    )


def test_a_verdict_is_told_once():
    """What to change is no part of what happened, and an overflow has a sentence of its own."""
    run = Run("mine", (begin(), snapshot(gradient("a", 12), gradient("b", -60)), Progress(9, 0, 2.0**15, 0)))
    assert any("no single scale works" in sentence for sentence in advice.advice(run))
    assert advice.happened(run)[-1] == "At that scale 50.0 % of them overflow."


@pytest.mark.parametrize(
    ("exponent", "wanted"),
    [(-20, "start there, `initial_scale=2^9`"), (10, "start lower, `initial_scale=2^5`"), (-60, None)],
)
def test_advice_on_the_start_agrees_with_the_ranges(exponent, wanted):
    """A scale that works for them too, or none."""
    skipped = [overflow(step, 2.0 ** (15 - step)) for step in range(6)]
    run = Run("mine", (begin(), *skipped, snapshot(gradient("a", exponent)), Progress(999, 0, 2.0**9, 6)))
    starts = [sentence for sentence in advice.advice(run) if "on the way down" in sentence]
    assert [wanted in sentence for sentence in starts] == ([] if wanted is None else [True])


@pytest.mark.parametrize(
    "log",
    [
        (begin(), snapshot(gradient("a", -20)), Progress(999, 0, 2.0**15, 0)),
        (begin(scale=2.0**5), snapshot(gradient("a", 10)), Progress(99, 0, 2.0**5, 0)),
        (begin(scale=2.0**36), snapshot(gradient("a", -60)), Progress(99, 0, 2.0**36, 0)),
        (begin(scale=1.0), Progress(99, 0, 1.0, 0)),
        (begin({"rule": "ConstantScale", "value": 8.0}, 8.0), Progress(99, 0, 8.0, 0)),
        (begin(), *(overflow(i, 8.0) for i in range(500, 1000, 99)), Progress(999, 0, 4.0, 6)),
        (begin(), *(overflow(i, 8.0) for i in range(9, 15)), Progress(99, 0, 4.0, 6)),
        (begin(), Progress(99, 0, 8.0, 0), overflow(100, 8.0), overflow(101, 4.0), Progress(101, 1, 2.0, 2)),
    ],
    ids=["amid", "highest", "lowest", "floor from the start", "constant", "few overflows", "early ones", "short epoch"],
)
def test_a_run_without_trouble_needs_no_change(log):
    """And says so."""
    calm = Run("mine", log)
    assert advice.advice(calm) == []
    assert "Nothing that this log shows." in text(Report([calm]))


def test_skipped_steps_that_left_the_scale_are_told():
    """Not those whose changes the log has lost."""
    log = (begin(), overflow(3), EventsLost(2, 20), overflow(20, 2.0**13), Progress(99, 0, 2.0**12, 9))
    wanted = "5 skipped steps left the scale as it was: constant, at its floor, or patient."
    assert wanted in advice.happened(Run("", log))


def test_more_than_three_guilty_variables_are_counted():
    """The rest has no names."""
    log = (begin(), *(overflow(index, 2.0 ** (15 - index), name) for index, name in enumerate("aabbccde")))
    (told,) = [each for each in advice.happened(Run("", log)) if "first gradient" in each]
    assert told.endswith("`a` in 2 of 8, `b` in 2 of 8, `c` in 2 of 8, and 2 other variables.")


def test_what_a_log_lacks_is_not_told():
    """Three guilty variables have no others beside them, no steps no numbers, no overflows no names."""
    three = (begin(), *(overflow(index, 2.0 ** (15 - index), name) for index, name in enumerate("abc")))
    assert not any("other variables" in each for each in advice.happened(Run("", three)))
    assert advice.happened(Run("", (begin(),)))[0] == "No step is in the log."
    calm = advice.happened(Run("", (begin(), Progress(99, 0, 2.0**15, 0))))
    assert not any("first gradient" in each for each in calm)


@pytest.mark.parametrize(("count", "told"), [(4, False), (5, True)])
def test_five_skipped_steps_are_a_descent(count, told):
    """Four are the search for the scale."""
    log = (begin(), *(overflow(step, 2.0 ** (15 - step)) for step in range(count)), Progress(999, 0, 2.0**9, count))
    assert any("on the way down" in each for each in advice.advice(Run("", log))) is told


def test_losses_are_told_from_first_to_last_finite_one():
    """And where the last one is not finite, that."""
    log = [begin(), *(Progress(99 * epoch, epoch, 8.0, 0, 1.0, loss) for epoch, loss in enumerate([2.5, 0.5, None]))]
    assert "The loss went from 2.5 to 0.5." in advice.happened(Run("", tuple(log)))
    assert advice.happened(Run("", tuple(log)))[-1] == "The loss of the last epoch is not finite, or unknown."
    assert advice.happened(Run("", tuple(log[:-1])))[-1] == "The loss went from 2.5 to 0.5."


def test_a_log_that_begins_later_says_where():
    """As one of a run that went on elsewhere."""
    log = (dataclasses.replace(begin(), step=1000), Progress(1099, 0, 2.0**15, 0))
    assert advice.happened(Run("", log))[1] == "The loss scale stayed at 2^15. The log begins at step 1,000."


def test_the_true_ranges_are_judged_at_the_scale_of_their_step():
    """Those of float32, before later ones of half precision; the scale has moved since."""
    half = dataclasses.replace(snapshot(gradient("a", 3), step=500), precision="float16")
    run = Run("", (begin(), overflow(450), snapshot(gradient("a", -37)), half, Progress(599, 0, 2.0**14, 1)))
    assert run.ranges.record.step == 400
    assert run.measured_at == 2.0**15


def test_the_worst_gradient_stands_first_and_float32_loses_nothing():
    """What the model holds in float32 has no shares, and the columns say who holds what."""
    island = gradient("head", -60, dtype="float32")
    rows = [line.split() for line in text(Report([Run("", (begin(), snapshot(*TWO, island)))])).splitlines()]
    named = [row for row in rows if row and row[0] in ("fine", "lost", "head") and len(row) > 4]
    assert [row[:2] for row in named] == [["lost", "float16"], ["fine", "float16"], ["head", "float32"]]
    assert named[0][-6:] == ["100", "%", "0", "%", "0", "%"]
    assert named[2][2:] == ["2^-60", "..", "2^-60", "4.8", "%"]


def test_working_scales_of_what_is_not_finite_are_unknown():
    """No advice on the scale but that none mends it."""
    broken = dataclasses.replace(gradient("a", 10), nonfinite=3)
    given = advice.advice(Run("", (begin(), snapshot(broken), Progress(99, 0, 2.0**15, 0))))
    assert given == ["float16: no scale mends gradients that are not finite in float32: `a`."]


def test_skipped_steps_after_the_last_progress_are_counted():
    """Then the number is the least."""
    told = advice.happened(Run("mine", (*CALM, overflow(450, 2.0**12))))
    assert told[0] == "451 steps, at least 4 skipped (0.9 %)."


def test_a_bfloat16_model_is_judged_as_such():
    """float16's limits are none of its concern."""
    run = Run("mine", (begin(), snapshot(gradient("a", -60, dtype="bfloat16")), Progress(99, 0, 1.0, 0)))
    assert "bfloat16 flushes 0 % of all" in advice.happened(run)[-2]


@pytest.mark.parametrize(
    ("content", "problems"),
    [
        ("", ["The log holds no records"]),
        (records.to_line(overflow(3, 0.0)) + "\n", ["Line 1 is no record", "The log holds no records"]),
        ('{"event": "run", "step": 0}\n', ["Line 1 is no record", "The log holds no records"]),
        (
            "\x00\xff\n" * 9,
            ["Line 1", "Line 2", "Line 3", "So were 6 more lines, the last of them line 9", "no records"],
        ),
    ],
)
def test_a_log_that_cannot_be_read_gives_a_report_that_says_so(tmp_path, content, problems):
    """Of zero bytes, of an older version, or of noise."""
    path = tmp_path / "log.jsonl"
    path.write_text(content, encoding="utf-8")
    run = read(path)
    assert len(run.problems) == len(problems)
    assert all(start in problem for start, problem in zip(problems, run.problems, strict=True))
    assert "No step is in the log." in text(Report([run]))
    assert page.render([run])


def test_a_log_reports_all_that_is_whole(tmp_path):
    """A broken line is named by its number, a torn last one is told, and the rest counts."""
    path = write(tmp_path / "log.jsonl", CALM, records.to_line(CALM[-1])[:40])
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], lines[1], "{broken", *lines[2:]]))
    run = read(path)
    assert run.log == CALM
    assert [problem[:27] for problem in run.problems] == ["Line 3 is no record that th", "The last line is not whole:"]
    assert "412 steps, 3 skipped" in text(Report([run]))


@pytest.mark.parametrize(
    "damage",
    [
        ('"largest": 9.5367431640625e-07', '"largest": Infinity'),
        ('"smallest": 9.5', '"smallest": -9.5'),
        ("411", "1" * 30),
        ('"new_scale": 4096.0', '"new_scale": 1e300'),
    ],
)
def test_a_damaged_number_costs_its_line_alone(tmp_path, damage):
    """Whatever it stands for, the line is named and the rest is reported."""
    path = write(tmp_path / "log.jsonl", CALM)
    path.write_text(path.read_text().replace(*damage, 1))
    run = read(path)
    assert re.match(r"Line [456] is no record", run.problems[0])
    assert len(run.log) == 5
    assert "What happened" in text(Report([run]))


def test_half_a_character_in_a_name_can_be_shown(tmp_path):
    """JSON can spell it, and UTF-8 cannot."""
    Report([read(write(tmp_path / "log.jsonl", (begin(), overflow(3, name="\ud800"))))]).save_page(tmp_path / "a.html")
    assert "<code>?</code>" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_each_length_of_a_cut_log_gives_a_report(tmp_path):
    """Wherever the run was killed."""
    whole = write(tmp_path / "log.jsonl", CALM).read_bytes()
    for length in range(0, len(whole), 37):
        (tmp_path / "cut.jsonl").write_bytes(whole[:length])
        assert "What happened" in text(Report([read(tmp_path / "cut.jsonl")]))


def test_a_log_without_its_first_line_says_what_is_missing(tmp_path):
    """The rest of the report is there."""
    run = read(write(tmp_path / "log.jsonl", CALM[1:]))
    assert "The line that begins a run is missing" in run.problems[0]
    assert "412 steps, 3 skipped" in text(Report([run]))
    assert "Unknown: the log does not say." in text(Report([run]))


def test_a_folder_means_the_log_in_it(tmp_path):
    """If it is the only one there; else the only one in the folders within."""
    (tmp_path / "logs").mkdir()
    write(tmp_path / "logs" / "inner.jsonl", CALM[1:])
    assert read(tmp_path).log == CALM[1:]
    write(tmp_path / "a.jsonl", CALM)
    assert read(tmp_path).log == CALM
    write(tmp_path / "b.jsonl", CALM)
    with pytest.raises(UsageError, match=r"RUN must name one log, and .* holds 2: .*a.jsonl, .*b.jsonl"):
        read(tmp_path)


@pytest.mark.parametrize(("name", "message"), [("nothing", "is not there"), ("", "holds none")])
def test_what_is_no_log_is_refused(tmp_path, name, message):
    """With the path."""
    with pytest.raises(UsageError, match=message):
        read(tmp_path / name)


def test_the_text_tells_names_as_they_are():
    """Markup of the terminal in a name is no markup."""
    assert EVIL in text(Report([Run("mine", (begin(), overflow(3, name=EVIL), Progress(9, 0, 4.0, 1)))]))


def test_two_runs_stand_side_by_side():
    """And what differs is marked."""
    other = Run("b", (begin({"rule": "ConstantScale", "value": 8.0}, 8.0), Progress(99, 0, 8.0, 4)))
    lines = text(Report([Run("a", CALM), other])).splitlines()
    assert any(re.match(r"\s*rule\s+DynamicScale\s+ConstantScale\s+differs\s*$", line) for line in lines)
    assert any(re.match(r"\s*policy\s+mixed_float16\s+mixed_float16\s*$", line) for line in lines)


def many(layers=150):
    """A log as of a large model, with 150 layers and names that want to be code."""
    kinds = ("activation", "weight")
    of = [gradient(f"encoder/block_{i}/{EVIL}", -40 + i % 30, kind=kind) for i in range(layers) for kind in kinds]
    changes = [overflow(i * 7, 2.0**14, EVIL if i % 2 else f"layer_{i}/kernel") for i in range(40)]
    return Run("many", (begin(model=EVIL), *changes, snapshot(*of, step=0), snapshot(*of), Progress(999, 0, 1.0, 40)))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder, runs = tmp_path_factory.mktemp("pages"), [many(), Run("calm", CALM)]
    made = {"one": runs[:1], "two": runs, "none": [Run("none", ())]}
    for name, of in made.items():
        Report(of).save_page(folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in made}


def test_the_page_needs_nothing_else(pages):
    """No script, no address but data, and what a log holds is escaped."""
    source = pages["two"].read_text(encoding="utf-8")
    assert "<script" not in source
    assert html.escape(EVIL, quote=False) in source
    links = re.findall(r'(?:src|srcset|href)="([^"]{0,40})', source)
    assert links
    assert all(link.startswith("data:") for link in links)
    assert "url(" not in source
    ElementTree.fromstring(re.sub(r"<(meta|link|source|img|!doctype)[^>]*>", "", source))


def test_the_page_holds_each_picture_for_each_reader(pages):
    """Light and dark, wide and narrow, with words for who does not see it."""
    source = pages["one"].read_text(encoding="utf-8")
    assert source.count("<picture>") == 4
    assert source.count("(max-width: 600px) and (prefers-color-scheme: dark)") == 4
    assert source.count('alt="') == 4


def test_histograms_side_by_side_have_the_same_axis():
    """That of small gradients makes room for those of the other run."""
    small, large = (Run("r", (begin(), snapshot(gradient("a", at)), Progress(9, 0, 8.0, 0))) for at in (-70, 20))
    draw = figures.PICTURES["ranges"].draw
    beside = [draw(run, "light", 6.2, [small, large]).axes[0].get_xlim() for run in (small, large)]
    assert beside[0] == beside[1] == (-71, 37)
    assert draw(small, "light", 6.2, [small]).axes[0].get_xlim()[1] == 20


def test_the_pictures_come_as_one_png(tmp_path):
    """Also of an empty log."""
    for runs in ([Run("calm", CALM)], [Run("calm", CALM), Run("none", ())], [Run("none", ())]):
        Report(runs).save_picture(tmp_path / "out.png")
        assert (tmp_path / "out.png").read_bytes()[1:4] == b"PNG"


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<!doctype html><meta charset="utf-8"><iframe id="page" style="width: 390px; height: 800px"></iframe>
<p id="told"></p><script>
const frame = document.getElementById("page")
frame.onload = () => {
  const inside = frame.contentDocument
  const images = [...inside.images].every((each) => each.complete && each.naturalWidth > 0)
  document.getElementById("told").textContent = `told ${inside.documentElement.scrollWidth} ${images}`
}
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")
@pytest.mark.parametrize("name", ["one", "two", "none"])
def test_a_browser_opens_the_page_without_complaint(pages, tmp_path, name):
    """Nothing on the console; all pictures are shown; at phone width nothing reaches beyond the edge."""
    assert browse(pages[name], tmp_path / "plain")[1] == []
    framed = tmp_path / "framed.html"
    source = html.escape(pages[name].read_text(encoding="utf-8"), quote=True)
    framed.write_text(MEASURE.replace("<iframe", f'<iframe srcdoc="{source}"'))
    dump, complaints = browse(framed, tmp_path / "framed")
    width, shown = re.search(r"told (\d+) (\w+)", dump).groups()
    assert int(width) <= 390
    assert shown == "true"
    assert complaints == []


def browse(path, profile):
    """Returns the document that Chromium made of a page, and what it wrote on its console."""
    options = ["--headless", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=20000"]
    root = ["--no-sandbox"] if hasattr(os, "getuid") and os.getuid() == 0 else []
    command = [CHROMIUM, *options, *root, f"--user-data-dir={profile}", "--dump-dom", path.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")
def test_a_complaint_would_be_seen(tmp_path):
    """A page that asks for an image that its policy forbids has one."""
    path = tmp_path / "bad.html"
    path.write_text('<meta http-equiv="Content-Security-Policy" content="default-src \'none\'"><img src="data:,">')
    assert browse(path, tmp_path / "profile")[1]


HEAVY = {"tensorflow", "keras", "torch", "jax"}


def command(*arguments, without=(), cwd=None):
    """Runs `tfmixed` in a process of its own, and returns it and the modules that it loaded."""
    code = (
        "import sys\n"
        f"for name in {list(without)!r}: sys.modules[name] = None\n"
        f"sys.argv = ['tfmixed', *{list(arguments)!r}]\n"
        "from tfmixed._cli.main import main\n"
        "try: main()\n"
        "finally: print('loaded:', *sys.modules, file=sys.stderr)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=cwd
    )
    return run, set(run.stderr.rpartition("loaded:")[2].split())


def test_report_loads_no_framework(tmp_path):
    """Matplotlib too only where there is something to draw."""
    write(tmp_path / "log.jsonl", CALM)
    run, loaded = command("report", "log.jsonl", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "412 steps, 3 skipped (0.7 %)." in run.stdout
    assert not loaded & {*HEAVY, "matplotlib"}
    run, loaded = command("report", ".", "--html", "new/a.html", "--png", "a.png", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert not loaded & HEAVY
    assert (tmp_path / "new" / "a.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "log.jsonl", "--html", "a.html"], "--html needs matplotlib .*pip install"),
        (["report", "log.jsonl", "--png", "a.png"], "--png needs matplotlib .*pip install"),
        (["simulate", "--rule", "torch", "--trace", "log.jsonl", "--png", "a.png"], "--png needs matplotlib"),
        (["report", "log.jsonl", "--html", "a.txt"], "--html must be a path that ends in .html, received 'a.txt'"),
        (["report", "nothing"], "RUN must be a log of LossScaleLogger"),
        (["simulate", "--rule", "nonsense", "--trace", "TF"], "rule must be a number or one of"),
        (
            ["simulate", "--rule", "torch", "--trace", "nothing"],
            "trace must be a log, a file of T and F, or such letters",
        ),
        (["simulate", "--rule", "torch", "--trace", "words.txt"], "trace must hold one T"),
    ],
)
def test_what_the_user_can_mend_is_one_line(tmp_path, arguments, message):
    """Exit code 2, nothing printed and nothing written; without matplotlib the text still works."""
    write(tmp_path / "log.jsonl", CALM)
    (tmp_path / "words.txt").write_text("hello")
    run, _ = command(*arguments, without=["matplotlib"], cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert re.search(f"^tfmixed: .*{message}", run.stderr, flags=re.MULTILINE)
    assert "Traceback" not in run.stderr
    assert sorted(each.name for each in tmp_path.iterdir()) == ["log.jsonl", "words.txt"]
    run, _ = command("report", "log.jsonl", without=["matplotlib"], cwd=tmp_path)
    assert run.returncode == 0


def test_a_report_is_printed_and_written_or_only_printed(tmp_path, capsys):
    """Where one of its files cannot be written, neither is."""
    log = write(tmp_path / "log.jsonl", CALM)
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UsageError, match=r"--png must be a file that can be written, received .*a.png"):
        log_commands.report(log, None, tmp_path / "a.html", tmp_path / "a.png")
    assert "412 steps, 3 skipped (0.7 %)." in capsys.readouterr().out
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.png", "log.jsonl"]


def test_a_typo_in_a_long_trace_is_named():
    """Not three thousand letters, and not what a file system says of them."""
    with pytest.raises(UsageError, match=r"received 'T{40}\.\.\. \(3,001 letters\)', which holds 'X'"):
        log_commands.simulate(["dynamic"], "T" * 3000 + "X")


def test_simulate_lays_rules_side_by_side(tmp_path):
    """On letters, on a file of them and on a log; as a table, as JSON and as a picture."""
    (tmp_path / "trace.txt").write_text("TTF\nTTT\n")
    rules = ("--rule", "dynamic:initial_scale=8", "--rule", "1024")
    outputs = [command("simulate", *rules, "--trace", trace, cwd=tmp_path) for trace in ("TTFTTT", "trace.txt")]
    assert outputs[0][0].stdout == outputs[1][0].stdout
    assert "6 steps" in outputs[0][0].stdout
    assert "beyond" not in outputs[0][0].stdout
    write(tmp_path / "log.jsonl", CALM)
    log, loaded = command("simulate", *rules, "--trace", "log.jsonl", "--png", "a.png", cwd=tmp_path)
    assert "beyond" in log.stdout
    assert not loaded & HEAVY
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"


def test_simulate_prints_json_alone(tmp_path):
    """One entry a rule, in the order they were given."""
    import json

    write(tmp_path / "log.jsonl", CALM)
    rules = ("--rule", "dynamic", "--rule", "2^20")
    run, _ = command("simulate", *rules, "--trace", "log.jsonl", "--json", cwd=tmp_path)
    told = json.loads(run.stdout)
    assert (told["steps"], told["unlisted_skips"]) == (412, 0)
    dynamic, high = told["rules"]
    assert (dynamic["name"], dynamic["final_scale"], dynamic["skipped_steps"]) == ("dynamic", 2.0**12, 3)
    assert dynamic["steps_above_recorded"] == 0
    assert (high["skipped_steps"], high["steps_above_recorded"]) == (3, 409)
