"""Starts real worker processes on this machine, with a deadline after which all of them are killed."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def cluster(count: int) -> list[dict[str, str]]:
    """Returns the environments of `count` workers."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for endpoint in sockets:
            endpoint.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{endpoint.getsockname()[1]}" for endpoint in sockets]
    tasks = ({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}} for rank in range(count))
    return [{**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TF_CONFIG": json.dumps(task)} for task in tasks]


@contextlib.contextmanager
def started(count: int, script: str, *arguments: str, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Starts `python script *arguments` for each worker, and ends all after the block. Writes `RANK.log`."""
    with contextlib.ExitStack() as stack:
        processes = []
        for rank, environment in enumerate(cluster(count)):
            log = stack.enter_context((folder / f"{rank}.log").open("wb"))
            command = [sys.executable, str(HERE / script), *arguments]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            stack.callback(_kill, process)
            processes.append(process)
        yield processes


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait(processes: list[subprocess.Popen[bytes]], deadline: float) -> list[int | None]:
    """Returns the exit codes once all have ended, or None for those that run until the deadline."""
    end = time.monotonic() + deadline
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        time.sleep(0.05)
    return [process.poll() for process in processes]


def run(count: int, script: str, *arguments: str, folder: Path, deadline: float = 400) -> list[Any]:
    """Returns the results that the workers pickle into `FOLDER/RANK.pickle`. Shows the log of one that failed."""
    with started(count, script, *arguments, str(folder), folder=folder) as processes:
        codes = wait(processes, deadline)
    for rank, code in enumerate(codes):
        log = (folder / f"{rank}.log").read_text(errors="replace")
        assert code == 0, f"worker {rank} {'hung' if code is None else f'exited with {code}'}: {log[-3000:]}"
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(count)]
