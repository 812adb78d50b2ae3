"""`tfmixed.compat.v1.LossScaleOptimizer` with variables on parameter servers."""

from __future__ import annotations

import pytest
import tf1
from thorough import thorough

CLUSTER = """
import os, socket, sys, threading
import numpy as np
import tensorflow as tf
V1 = tf.compat.v1
getattr(V1, sys.argv[1])()
import tf1
from tf1 import X, Y
from tfmixed.compat.v1 import LossScaleOptimizer

def address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"

cluster = tf.train.ClusterSpec({"ps": [address()], "worker": [address(), address()]})
names = [("ps", 0), ("worker", 0), ("worker", 1)]
servers = {name: V1.train.Server(cluster, job_name=name[0], task_index=name[1]) for name in names}

def work(task):
    target, place = servers["worker", task].target, f"/job:worker/task:{task}"
    with tf.Graph().as_default():
        with V1.device(V1.train.replica_device_setter(worker_device=place, cluster=cluster)):
            x, y, loss = tf1.network()
            step = V1.train.get_or_create_global_step()
            opt = LossScaleOptimizer(V1.train.AdamOptimizer(0.05))
            train = opt.minimize(loss, step)
        assert opt._state().variables["dynamic_scale"].value.device.startswith("/job:ps")
        creator = V1.train.ChiefSessionCreator if task == 0 else V1.train.WorkerSessionCreator
        with V1.train.MonitoredSession(creator(master=target)) as session:
            first = session.run(loss, {x: X, y: Y})
            for number in range(20):
                session.run(train, {x: X * np.inf if number == 5 else X, y: Y})
            done.append((first, session.run(loss, {x: X, y: Y})))
            if len(done) == 2:
                print(*map(float, session.run([step, opt.skipped_steps, opt.attempted_steps, opt.loss_scale])))

done = []
workers = [threading.Thread(target=work, args=(task,)) for task in range(2)]
for worker in workers:
    worker.start()
    worker.join(120)
first, last = done[0][0], done[1][1]
assert last < 0.3 * first, done
sys.stdout.flush()
os._exit(0)  # servers do not stop
"""


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["disable_v2_behavior", pytest.param("disable_eager_execution", marks=thorough)])
def test_workers_share_the_scale_on_a_parameter_server(switch):
    """Workers train one after the other. Each skips its overflow, and continues the counters."""
    assert "38.0 2.0 40.0 8192.0" in tf1.script(CLUSTER, switch)
