"""Kills a training process with SIGKILL at random moments, starts it again, and compares with an uninterrupted run.

python tests/helpers/kill_and_resume.py [--kills 20] [--how [low_precision_]checkpoint|backup] [--seed 0]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tfmixed import records

SCRIPT = Path(__file__).parent / "resumable.py"


@dataclass
class Report:
    """Numbers of kills, of epochs that ran twice, and of torn backups of Keras."""

    kills: int
    epochs: int
    lines: int
    torn: int


def start(how: str, folder: Path, epochs: int) -> subprocess.Popen[bytes]:
    (folder / "training").unlink(missing_ok=True)
    with (folder / "output.txt").open("ab") as log:
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, str(SCRIPT), how, str(folder), str(epochs)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    try:
        code = process.wait(timeout=300)
    finally:
        process.kill()
    assert code == 0, (folder / "output.txt").read_text(errors="replace")[-3000:]


def kill(process: subprocess.Popen[bytes], folder: Path, after: float) -> bool:
    """Kills the process `after` seconds of training; returns whether it still lived."""
    end = time.monotonic() + 120
    while not (folder / "training").exists() and process.poll() is None:
        assert time.monotonic() < end, "training never began"
        time.sleep(0.002)
    time.sleep(after)
    alive = process.poll() is None
    process.kill()
    process.wait()
    return alive


def compare(how: str, kills: int, seed: int, folder: Path) -> Report:
    """Runs both and asserts that state after each epoch, and the log, are the same."""
    # About a dozen epochs a kill, and a few for the last stretch.
    epochs, choose = 12 * kills + 12 + seed % 2, random.Random(seed)
    whole, torn = folder / "whole", folder / "killed"
    whole.mkdir(parents=True)
    torn.mkdir()
    finish(start(how, whole, epochs), whole)
    done = 0
    while done < kills:
        done += kill(start(how, torn, epochs), torn, choose.uniform(0, 0.6))
    finish(start(how, torn, epochs), torn)
    for epoch in range(epochs):
        ours, wanted = (pickle.loads((run / "epochs" / f"{epoch}.pickle").read_bytes()) for run in (torn, whole))
        assert ours.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_array_equal(ours[name], wanted[name], err_msg=f"epoch {epoch}, {name}")
    logs = [records.read_changes(run / "scale.jsonl") for run in (torn, whole)]
    # A change that the next process found in the ring first has no epoch, since the time of the change is unknown.
    for change, same in zip(*logs, strict=True):
        assert change in (same, dataclasses.replace(same, epoch=None))
    count = len((torn / "torn").read_text()) if (torn / "torn").exists() else 0
    return Report(kills, epochs, len(logs[0]), count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--how",
        choices=[f"{low}{how}" for low in ("", "low_precision_") for how in ("checkpoint", "backup")],
        default="checkpoint",
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = compare(arguments.how, arguments.kills, arguments.seed, Path(folder))
    print(f"{arguments.how}: {report}: the same states after each epoch and the same log as without a kill")


if __name__ == "__main__":
    main()
