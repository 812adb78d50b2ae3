"""A TensorFlow 1 script that trains on digits, before and after a two-line change for mixed precision.

python examples/tf1_graph_rewrite.py
python examples/tf1_graph_rewrite.py --width 256 --steps 50    # little to gain
"""

from __future__ import annotations

import argparse
import statistics
import time

from sklearn.datasets import load_digits

import tfmixed.compat.v1 as tf

BATCH = 512


def digits():
    images, labels = load_digits(return_X_y=True)
    return (images / 16.0).astype("float32"), labels.astype("int32")


def network(images, width):
    """Returns the logits of a network with three hidden layers of `width` units."""
    hidden = images
    for number in range(3):
        with tf.variable_scope(f"layer_{number}"):
            kernel = tf.get_variable("kernel", [hidden.shape[-1], width])
            bias = tf.get_variable("bias", [width], initializer=tf.zeros_initializer())
            hidden = tf.nn.relu(tf.matmul(hidden, kernel) + bias)
    return tf.matmul(hidden, tf.get_variable("logits", [width, 10]))


def training(width, mixed):
    """Returns a session and the fetches of a training step: loss and update."""
    with tf.Graph().as_default():
        tf.set_random_seed(1)
        batches = tf.data.Dataset.from_tensor_slices(digits()).shuffle(2000, seed=1).repeat().batch(BATCH)
        images, labels = tf.data.make_one_shot_iterator(batches).get_next()
        loss = tf.losses.sparse_softmax_cross_entropy(labels, network(images, width))
        opt = tf.train.AdamOptimizer(1e-3)
        if mixed:
            opt = tf.train.experimental.enable_mixed_precision_graph_rewrite(opt)
        step = tf.train.get_or_create_global_step()
        update = opt.minimize(loss, global_step=step)
        session = tf.Session(config=tf.ConfigProto())
        session.run(tf.global_variables_initializer())
        return session, [loss, update]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024, help="width of each layer (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="steps of each run (default: %(default)s)")
    arguments = parser.parse_args()
    after = training(arguments.width, mixed=True)
    tf.train.experimental.disable_mixed_precision_graph_rewrite()  # new sessions use float32
    runs = {"before": training(arguments.width, mixed=False), "after": after}
    losses, times = {}, {"before": [], "after": []}
    for _ in range(arguments.steps):
        for name, (session, fetches) in runs.items():  # interleaved, so that other load slows down both
            start = time.perf_counter()
            losses[name], _ = session.run(fetches)
            times[name].append(1e3 * (time.perf_counter() - start))
    session, (_, update) = after
    print(tf.conversion_report(session, update))
    before_ms, after_ms = (statistics.median(times[name][1:]) for name in runs)
    print(f"before: loss {losses['before']:.4f}, {before_ms:.1f} ms a step")
    print(f"after:  loss {losses['after']:.4f}, {after_ms:.1f} ms a step: {before_ms / after_ms:.2f} times as fast")


if __name__ == "__main__":
    main()
