"""Starts worker processes on this machine, and restarts all of them if one dies.

    python examples/multi_worker.py [--workers 2] [--kill] [--loop] [--epochs 6] [--run-dir runs/multi_worker]

`--kill` kills the last worker in the third epoch. The other options are passed to `worker.py`: `--loop` trains with
`strategy.run` instead of `Model.fit`. At the end, each worker prints a digest of its weights: all are equal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).with_name("worker.py")


def free_addresses(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [f"127.0.0.1:{socket_.getsockname()[1]}" for socket_ in sockets]


def run_workers(options: list[list[str]]) -> list[int]:
    """Starts one process per worker and waits for all. If one dies, TensorFlow stops the others."""
    addresses, processes = free_addresses(len(options)), []
    for rank, worker_options in enumerate(options):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
        environment = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, "TF_CONFIG": json.dumps(task)}
        processes.append(subprocess.Popen([sys.executable, str(SCRIPT), *worker_options], env=environment))
    try:
        return [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kill", action="store_true")
    arguments, rest = parser.parse_known_args()
    for attempt in range(3):
        start, options = time.monotonic(), [rest] * arguments.workers
        if arguments.kill and attempt == 0:
            options[-1] = [*rest, "--die"]
        codes = run_workers(options)
        print(f"attempt {attempt + 1}: exit codes {codes} after {time.monotonic() - start:.0f} s", flush=True)
        if not any(codes):
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
