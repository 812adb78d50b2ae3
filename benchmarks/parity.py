"""Compares the accuracy of the examples between precisions, over seeds.

    python benchmarks/parity.py                          # writes benchmarks/results/parity.md
    python benchmarks/parity.py --seeds 2 --only digits --output -

Trains `examples/digits.py` and `examples/transformer.py` under the precisions of `configs/`. A seed fixes the initial
weights and the order of the data, so that runs of the same seed are compared with each other. The last section of the
results is that of `benchmarks/bias_parity.py`.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy
import tensorflow as tf
from rich.console import Console
from rich.markdown import Markdown
from scipy import stats

import tfmixed
from tfmixed import hardware
from tfmixed._utils import atomic_write

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "parity.md"
sys.path.insert(0, str(ROOT / "examples"))
import digits  # noqa: E402
import transformer  # noqa: E402

PRECISIONS = {
    "float32": "float32",
    "mixed_float16, dynamic": "float16_dynamic",
    "mixed_float16, constant": "float16_constant",
    "mixed_bfloat16": "bfloat16",
}
SUMS = "## Float32 sums of gradients\n"
EPOCHS, STEPS = 6, 400  # epochs of the digits, steps of the Transformer


class Task(NamedTuple):
    """A task: its title, the format of its numbers, and a function of a precision that trains a model.

    The function returns the model and its number.
    """

    title: str
    form: str
    train: Callable[[Any, int], tuple[keras.Model, float]]


def load(name: str) -> tfmixed.Config:
    return tfmixed.load_config(ROOT / "configs" / f"{name}.toml")


def train_digits(name: str, seed: int) -> tuple[keras.Model, float]:
    model, accuracy = digits.train(load(name), EPOCHS, seed, verbose=0)
    return model, 100 * accuracy


def train_transformer(name: str, seed: int) -> tuple[keras.Model, float]:
    config = load(name)
    return transformer.train(config.policy, config.scaling, STEPS, seed)


TASKS = {
    "digits": Task("digits, accuracy in %", ".2f", train_digits),
    "transformer": Task("Transformer, bits per character", ".3f", train_transformer),
}


class Outcome(NamedTuple):
    """Result of a task under one precision: the number of each seed, and the total of skipped steps."""

    numbers: list[float]
    skipped: int

    def spread(self, form: str) -> str:
        return f"{statistics.mean(self.numbers):{form}} ± {statistics.stdev(self.numbers):{form}}"


def measured(task: Task, seeds: int, precisions: dict[str, Any]) -> dict[str, Outcome]:
    """Returns the outcome of a task under each precision. Every seed trains all precisions."""
    numbers: dict[str, list[float]] = {precision: [] for precision in precisions}
    skipped = dict.fromkeys(precisions, 0)
    for seed, (precision, setting) in itertools.product(range(seeds), precisions.items()):
        keras.utils.clear_session()
        model, number = task.train(setting, seed)
        numbers[precision].append(float(number))
        skipped[precision] += int(getattr(model.optimizer, "skipped_steps", 0))
        print(f"{task.title}, seed {seed}, {precision}: {number:{task.form}}", file=sys.stderr, flush=True)
    return {precision: Outcome(numbers[precision], skipped[precision]) for precision in precisions}


def difference(outcome: Outcome, reference: Outcome) -> tuple[float, float]:
    """Returns the mean difference of runs of the same seed, and half the width of its 95% interval (Student's t)."""
    pairs = numpy.subtract(outcome.numbers, reference.numbers)
    return float(pairs.mean()), float(stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(pairs))


def lines(rows: list[list[str]]) -> list[str]:
    """Returns a Markdown table whose header is the first row."""
    head, *body = rows
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] + ["---:"] * (len(head) - 1), *body)] + [""]


def summary(results: dict[str, dict[str, Outcome]], tasks: dict[str, Task]) -> list[str]:
    """Returns the table of means and standard deviations."""
    rows = [["precision", *(tasks[name].title for name in results)]]
    for precision in next(iter(results.values())):
        spreads = (outcomes[precision].spread(tasks[name].form) for name, outcomes in results.items())
        rows.append([precision, *spreads])
    return lines(rows)


def details(task: Task, outcomes: dict[str, Outcome]) -> list[str]:
    """Returns the tables of one task: the differences from float32, and the number of each seed."""
    form, reference = task.form, outcomes["float32"]
    differences = [["precision", "mean ± standard deviation", "range", "difference from float32", "steps skipped"]]
    for precision, outcome in outcomes.items():
        bounds = f"{min(outcome.numbers):{form}} to {max(outcome.numbers):{form}}"
        mean, half = difference(outcome, reference)
        apart = "-" if outcome is reference else f"{mean:+{form}} ± {half:{form}}"
        differences.append([precision, outcome.spread(form), bounds, apart, str(outcome.skipped)])
    seeds = [["precision", *(f"seed {seed}" for seed in range(len(reference.numbers)))]]
    seeds += [[name, *(f"{number:{form}}" for number in outcome.numbers)] for name, outcome in outcomes.items()]
    return [f"## {task.title[0].upper()}{task.title[1:]}", "", *lines(differences), *lines(seeds)]


def conclusion(results: dict[str, dict[str, Outcome]], tasks: dict[str, Task]) -> str:
    """Returns a paragraph on the differences from float32 that exceed the noise of seeds."""
    beyond = []
    pairs = list(itertools.product(results, list(next(iter(results.values())))[1:]))
    for name, precision in pairs:
        form, reference = tasks[name].form, results[name]["float32"]
        mean, half = difference(results[name][precision], reference)
        if abs(mean) > half:
            share = abs(mean) / statistics.stdev(reference.numbers)
            beyond.append(f"- {precision}, {name}: {mean:+{form}} ± {half:{form}}, {share:.1f} deviations of float32\n")
    if not beyond:
        return f"None of the {len(pairs)} differences from float32 exceeds the noise of seeds.\n"
    chance = 1 - 0.95 ** len(pairs)
    head = (
        f"Of {len(pairs)} differences from float32, {len(beyond)} exceed the noise of seeds (one or more do by chance "
    )
    return f"{head}in {chance:.0%} of such tables):\n\n" + "".join(beyond)


def machine() -> str:
    """Returns the machine, the versions and today's date."""
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (tf, keras, tfmixed))
    today = datetime.datetime.now(datetime.UTC).date()
    cores = f"{hardware.describe().main.name}, {os.cpu_count()} cores"
    return f"on {cores};\n{versions}, Python {platform.python_version()}; {today}"


def page(results: dict[str, dict[str, Outcome]]) -> str:
    seeds = len(next(iter(results.values()))["float32"].numbers)
    about = f"""\
# Accuracy in half precision

`python benchmarks/parity.py` with {seeds} seeds, {EPOCHS} epochs, {STEPS} steps,
{machine()}.
"""
    notes = """\
Mean ± standard deviation over seeds. A difference is the mean over pairs of runs of one seed, with its 95% interval by
Student's t; it exceeds the noise where that does not hold 0. Of the digits, 1,437 are trained on and 360 validated, so
0.28% is one picture. The text is that of `help()` in this Python; of it, counting characters needs {:.3f} bits, and
counting pairs {:.3f}.
""".format(*transformer.counted())
    tables = (line for name, outcomes in results.items() for line in details(TASKS[name], outcomes))
    return "\n".join([about, *summary(results, TASKS), conclusion(results, TASKS), notes, *tables])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(TASKS), help="the task to train (default: both)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, at least 2 (default: %(default)s)")
    parser.add_argument("--output", default=str(RESULTS), help="file to write, or - (default: %(default)s)")
    arguments = parser.parse_args()
    tasks = [arguments.only] if arguments.only else list(TASKS)
    text = page({name: measured(TASKS[name], arguments.seeds, PRECISIONS) for name in tasks})
    Console().print(Markdown(text))
    if arguments.output != "-":
        path = Path(arguments.output)
        kept = path.read_text(encoding="utf-8").partition(SUMS)[1:] if path.exists() else ()
        atomic_write.write_text(path, "\n".join((text, "".join(kept))) if kept else text)


if __name__ == "__main__":
    main()
