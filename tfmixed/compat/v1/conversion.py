"""What the rewrite made of a graph: read from the graph that ran."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from rich.table import Table
from tensorflow.python.eager import context

from tfmixed._utils import rich_text
from tfmixed.compat.v1 import lists, rewrite

V1 = tf.compat.v1
_FLOATS = ("float32", "float16", "bfloat16")
# They move values and compute nothing.
_BOOKKEEPING = {"Const", "HostConst", "Placeholder", "VarHandleOp", "VariableV2", "ReadVariableOp"}
_ADDED = re.compile(r"-CastTo(Bf16|Fp16|Fp32)-.*AutoMixedPrecision")
_KERNEL = re.compile(r"^_(Mkl)?(Native)?(PadWith)?(Fused(?!BatchNorm))?(?=[A-Z])|WithBias$")
# Graphs that grappler has worked on are shown once for each set of options: a number of its own makes a set new. Below
# 0 it means that small graphs are worked on too.
_fresh = itertools.count(-1_000, -1)


@dataclass(frozen=True)
class Count:
    """How many nodes of an operation ran in a type.

    Args:
        operation: Its type; `"MatMul"` whatever kernel stands for it.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`.
        nodes: How many.
        list: The list of the rewrite that it is on: `"allow"`, `"infer"`, `"deny"`, `"clear"` or `"none"`.
    """

    operation: str
    dtype: str
    nodes: int
    list: str


@dataclass(frozen=True)
class ConversionReport:
    """What ran in which type. Prints as a table.

    An operation of the list `allow` in float32 was fetched, stands where no pass comes (in a loop or a branch of a
    `tf.function`, or compiled by XLA), or the rewrite is off. One of `infer` is converted where converted ones surround
    it and nothing of `deny` comes before, one of `clear` where it takes from a converted one.

    Args:
        dtype: What the rewrite converts to; None where it is off.
        counts: One for each operation and type.
        casts: How many casts were added: to half precision, and back.
    """

    dtype: str | None
    counts: tuple[Count, ...]
    casts: tuple[int, int]

    @property
    def converted(self) -> dict[str, int]:
        """How many nodes of which operation ran in half precision."""
        return self._nodes(lambda count: count.dtype != "float32")

    @property
    def refused(self) -> dict[str, dict[str, int]]:
        """For each list, how many nodes of which operation of it ran in float32."""
        names = dict.fromkeys(count.list for count in self.counts)
        return {
            name: nodes
            for name in names
            if (nodes := self._nodes(lambda count, name=name: count.dtype == "float32" and count.list == name))
        }

    def _nodes(self, wanted: Any) -> dict[str, int]:
        nodes: Counter[str] = Counter()
        for count in filter(wanted, self.counts):
            nodes[count.operation] += count.nodes
        return dict(nodes)

    def __rich__(self) -> Table:
        low, up = self.casts
        total, half = sum(count.nodes for count in self.counts), sum(self.converted.values())
        title = f"{half} of {total} nodes in half precision; casts added: {low} to it, {up} back"
        table = Table("operation", "ran in", "nodes", "list", title=title)
        for count in self.counts:
            table.add_row(count.operation, count.dtype, str(count.nodes), count.list)
        return table

    def __str__(self) -> str:
        return rich_text.text(self)


def conversion_report(runner: Any, *arguments: Any, **named: Any) -> ConversionReport:
    """Runs a session or a function once, and returns what the graph that ran computes in which type.

    Args:
        runner: A session, also a `MonitoredSession`, or a `tf.function`, also one of its concrete functions. What it
            does, it does: a training step trains.
        *arguments: For a session `fetches` and `feed_dict`, as for its `run`; for a function its own.
        **named: The same.

    Raises:
        TypeError: `runner` is neither.
        ValueError: A function that XLA compiles, or that is called where a graph is built.

    Example:
    >>> square = tf.function(lambda x: tf.matmul(x, x))
    >>> conversion_report(square, tf.ones((8, 8))).refused
    {'allow': {'MatMul': 1}}
    """
    if isinstance(runner, tf.types.experimental.Callable):
        graphs = _of_function(runner, *arguments, **named)
    elif hasattr(runner, "run") and not isinstance(runner, type):
        graphs = _of_session(runner, *arguments, **named)
    else:
        raise TypeError(f"runner must be a session or a tf.function, received {runner!r}")
    return _report([node for graph in graphs for node in _nodes(graph)])


def _of_session(session: Any, fetches: Any, feed_dict: Any = None) -> Iterable[Any]:
    metadata, options = V1.RunMetadata(), V1.RunOptions(output_partition_graphs=True)
    session.run(fetches, feed_dict, options=options, run_metadata=metadata)
    return list(metadata.partition_graphs)


def _of_function(function: Any, *arguments: Any, **named: Any) -> Iterable[Any]:
    if not tf.executing_eagerly():
        raise ValueError(
            f"runner must be a session where a graph is built, received {function!r}: it would not run now"
        )
    before = tf.config.optimizer.get_experimental_options().get("min_graph_nodes", 0)
    tf.config.optimizer.set_experimental_options({"min_graph_nodes": next(_fresh)})
    context.enable_run_metadata()
    context.export_run_metadata()  # what ran before, of which TensorFlow may have graphs still
    try:
        function(*arguments, **named)
        metadata = context.export_run_metadata()
    finally:
        context.disable_run_metadata()
        tf.config.optimizer.set_experimental_options({"min_graph_nodes": before})
    graphs = [graph for function in metadata.function_graphs for graph in function.partition_graphs]
    if not graphs:
        raise ValueError(
            f"runner must be a function that runs as a graph, received {function!r}: XLA compiles all of it "
            "(jit_compile=True), where the rewrite does not come"
        )
    return graphs


def _nodes(graph: Any) -> Iterable[Any]:
    yield from graph.node
    for function in graph.library.function:
        yield from function.node_def


def _report(nodes: list[Any]) -> ConversionReport:
    added = Counter(match[1] for node in nodes if (match := _ADDED.search(node.name)))
    low = {"Fp16": "float16", "Bf16": "bfloat16"}
    # A session may convert by itself, whatever the switch.
    dtype = next((low[each] for each in added if each in low), rewrite.active())
    counted: Counter[tuple[str, str]] = Counter()
    for node in nodes:
        ran_in, operation = _dtype_of(node), _operation(node.op)
        if ran_in in _FLOATS and not _ADDED.search(node.name) and operation not in _BOOKKEEPING:
            counted[operation, ran_in] += 1
    counts = [Count(*key, nodes, lists.list_of(key[0], dtype or "bfloat16")) for key, nodes in counted.items()]
    counts.sort(key=lambda count: (count.dtype == "float32", -count.nodes, count.operation))
    return ConversionReport(dtype, tuple(counts), (added["Fp16"] + added["Bf16"], added["Fp32"]))


def _dtype_of(node: Any) -> str | None:
    for name in ("T", "dtype"):
        if node.attr[name].type and not node.op.startswith(("_Arg", "_Retval", "_Send", "_Recv", "_HostSend")):
            return str(tf.as_dtype(node.attr[name].type).name)
    return None


def _operation(kernel: str) -> str:
    # Later passes put oneDNN's and fused kernels in the place of operations.
    return re.sub(r"(?<=Norm|Grad)Ex$", "V3", _KERNEL.sub("", kernel))
