"""The accuracy table of `benchmarks/parity.py` and the README."""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import bias_parity  # noqa: E402
import parity  # noqa: E402

RESULTS, _, SUMS = parity.RESULTS.read_text(encoding="utf-8").partition(parity.SUMS)
SEEDS = np.array([95.0, 93.0, 94.0, 96.0, 92.0])


def tables(text):
    """Returns the Markdown tables of a text."""
    return re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)


def results(**changed):
    """Returns results of the digits in which all precisions are equal except those given."""
    numbers = dict.fromkeys(parity.PRECISIONS, SEEDS) | changed
    return {"digits": {precision: parity.Outcome(list(seeds), 0) for precision, seeds in numbers.items()}}


def test_the_readme_shows_the_results():
    """The same means and spreads, in the same order."""
    pattern = r"[\d.]+ ± [\d.]+"
    shown = re.findall(pattern, (ROOT / "README.md").read_text(encoding="utf-8"))
    results = re.findall(pattern, tables(RESULTS)[0])
    assert len(results) == 2 * len(parity.PRECISIONS)
    assert shown == results


@pytest.mark.parametrize(
    ("module", "text", "task"),
    [(module, text, task) for module, text in ((parity, RESULTS), (bias_parity, SUMS)) for task in module.TASKS],
)
def test_means_and_spreads_are_those_of_the_seeds(module, text, task):
    """In the first table and the table of the task."""
    summary, *rest = tables(text)
    place, form = list(module.TASKS).index(task), module.TASKS[task].form
    rest = rest[-2 * len(module.TASKS) :][2 * place :]
    parts = [[row.strip("| ").split(" | ") for row in table.splitlines()[2:]] for table in (summary, *rest)]
    for short, long, seeds in zip(*parts[:3], strict=True):
        numbers = [float(number) for number in seeds[1:]]
        assert len(numbers) == 5
        mean, deviation = (float(number) for number in short[1 + place].split(" ± "))
        assert mean == pytest.approx(statistics.mean(numbers), abs=1.1 * 10 ** -int(form[1]))
        assert deviation == pytest.approx(statistics.stdev(numbers), abs=1.1 * 10 ** -int(form[1]))
        assert long[:3] == [seeds[0], short[1 + place], f"{min(numbers):{form}} to {max(numbers):{form}}"]


def test_all_tasks_are_learned_in_half_precision():
    """Every seed beats the trivial models."""
    pairs = float(re.search(r"counting pairs\s+(\d\.\d+)", RESULTS.replace("\n", " "))[1])
    *_, digits, _, transformer = tables(RESULTS)
    assert min(float(number) for number in re.findall(r" (\d\d\.\d\d) ", digits)) > 90
    assert max(float(number) for number in re.findall(r" (\d\.\d{3}) ", transformer)) < pairs - 0.2


def test_float32_sums_make_bias_gradients_right():
    """In the trainings that the last section compares."""
    rows = [row.strip("| ").split(" | ") for row in tables(SUMS)[2].splitlines()[2:]]
    right, wrong = ([float(row[column]) for row in rows if row[0].endswith("bias")] for column in (1, 2))
    assert max(right) < 0.05
    assert max(wrong) > 0.5


def test_a_difference_in_all_seeds_exceeds_the_noise():
    """Runs of the same seed are compared, so that differences between seeds do not hide it."""
    beyond = parity.conclusion(results(mixed_bfloat16=SEEDS - [0.3, 0.4, 0.5, 0.4, 0.4]), parity.TASKS)
    assert "mixed_bfloat16, digits: -0.40 ± 0.09" in beyond
    within = parity.conclusion(results(mixed_bfloat16=SEEDS - [-0.5, 0.5, -0.4, 0.4, -0.3]), parity.TASKS)
    assert within.startswith("None of the 3 differences")


@pytest.mark.filterwarnings("ignore:policy .* is slow here")
@pytest.mark.slow
def test_a_short_run_writes_its_page(tmp_path, monkeypatch, capsys):
    """With numbers, versions and skipped steps, after one epoch of the digits with two seeds and precisions."""
    precisions = {"float32": "float32", "mixed_float16, dynamic": "float16_dynamic"}
    monkeypatch.setattr(parity, "PRECISIONS", precisions)
    monkeypatch.setattr(parity, "EPOCHS", 1)
    page = tmp_path / "results" / "parity.md"
    monkeypatch.setattr(sys, "argv", ["parity.py", "--seeds", "2", "--only", "digits", "--output", str(page)])
    page.parent.mkdir()
    page.write_text(f"old\n\n{parity.SUMS}kept\n", encoding="utf-8")
    parity.main()
    text, kept, section = page.read_text(encoding="utf-8").partition(parity.SUMS)
    assert kept
    assert section == "kept\n"
    summary, differences, seeds = tables(text)
    assert "with 2 seeds, 1 epochs" in text
    assert re.search(r"tensorflow \d+\.\d+.*, keras \d.*, tfmixed \d.*, Python 3", text)
    assert all(name in table for name in precisions for table in (summary, differences, seeds))
    assert int(differences.splitlines()[-1].split(" | ")[-1].strip("| ")) > 4
    assert min(float(number) for number in re.findall(r" (\d\d\.\d\d) ", seeds)) > 50
    assert "Accuracy in half precision" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:policy .* is slow here")
@pytest.mark.thorough
def test_a_short_run_writes_the_last_section(tmp_path, monkeypatch):
    """After the page of `parity.py`, with the errors of gradients."""
    monkeypatch.setattr(bias_parity, "STEPS", 1)
    monkeypatch.setattr(bias_parity, "TASKS", {"classifier": bias_parity.TASKS["classifier"]})
    page = tmp_path / "parity.md"
    page.write_text(f"page\n\n{parity.SUMS}old\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["bias_parity.py", "--seeds", "2", "--output", str(page)])
    bias_parity.main()
    before, _, section = page.read_text(encoding="utf-8").partition(parity.SUMS)
    assert before == "page\n\n"
    assert "old" not in section
    assert [len(table.splitlines()) for table in tables(section)] == [5, 5, 18, 5, 5]
