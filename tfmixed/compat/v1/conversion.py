"""Report of the operations that the graph rewrite converted, read from the graph that ran."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf
from rich.table import Table
from tensorflow.python.eager import context

from tfmixed._utils import rich_text
from tfmixed.compat.v1 import graph_rewrite

V1 = tf.compat.v1
_FLOATS = ("float32", "float16", "bfloat16")
# They move values and compute nothing.
_BOOKKEEPING = {"Const", "HostConst", "Placeholder", "VarHandleOp", "VariableV2", "ReadVariableOp"}
_TRANSFERS = ("_Arg", "_Retval", "_Send", "_Recv", "_HostSend")
_ADDED_CAST = re.compile(r"-CastTo(Bf16|Fp16|Fp32)-.*AutoMixedPrecision")
_KERNEL = re.compile(r"^_(Mkl)?(Native)?(PadWith)?(Fused(?!BatchNorm))?(?=[A-Z])|WithBias$")
# TensorFlow exports an optimized graph once for each set of options, and a new number makes a new set. A negative one
# also includes small graphs.
_new_option = itertools.count(-1_000, -1)

_HEADER = "tensorflow/core/grappler/optimizers/auto_mixed_precision_lists.h"
_CLASSES = {"float16": "AutoMixedPrecisionListsFp16", "bfloat16": "AutoMixedPrecisionListsMkl"}
_LISTS = ("allow", "infer", "deny", "clear")
_OLD_NAMES = {"allow": "WHITELIST", "infer": "GRAYLIST", "deny": "BLACKLIST"}
_PREFIX = "TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_"


@dataclass(frozen=True)
class Count:
    """The number of nodes of one operation that ran in one dtype.

    Args:
        operation: The type of the operation, such as `"MatMul"`, whatever kernel implements it.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`.
        nodes: The number of nodes.
        list: The rewrite's list for the operation: `"allow"`, `"infer"`, `"deny"`, `"clear"` or `"none"`.
    """

    operation: str
    dtype: str
    nodes: int
    list: str


@dataclass(frozen=True)
class ConversionReport:
    """The dtype in which each operation ran. Prints as a table.

    An operation of the `allow` list runs in float32 if it is fetched, if it is in a loop or branch of a `tf.function`
    or compiled by XLA, where no pass applies, or if the rewrite is disabled. An operation of the `infer` list is
    converted between converted ones unless an operation of the `deny` list precedes it. An operation of the `clear`
    list is converted if its input is.

    Args:
        dtype: The dtype that the rewrite converts to, or None if it is disabled.
        counts: One count for each operation and dtype.
        casts: The number of casts added, to half precision and back.
    """

    dtype: str | None
    counts: tuple[Count, ...]
    casts: tuple[int, int]

    @property
    def converted(self) -> dict[str, int]:
        """The number of nodes that ran in half precision, by operation."""
        return _total(count for count in self.counts if count.dtype != "float32")

    @property
    def refused(self) -> dict[str, dict[str, int]]:
        """The number of nodes that ran in float32, by list and operation."""
        single = [count for count in self.counts if count.dtype == "float32"]
        lists = dict.fromkeys(count.list for count in single)
        return {name: _total(count for count in single if count.list == name) for name in lists}

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


def _total(counts: Iterable[Count]) -> dict[str, int]:
    nodes: Counter[str] = Counter()
    for count in counts:
        nodes[count.operation] += count.nodes
    return dict(nodes)


def conversion_report(runner: Any, *args: Any, **kwargs: Any) -> ConversionReport:
    """Runs a session or a function once, and reports the dtype of each operation in the graph that ran.

    Args:
        runner: A session, including a `MonitoredSession`, a `tf.function`, or a concrete function. Its side effects
            take place: a training step trains.
        *args: For a session, `fetches` and `feed_dict`, as in its `run`. For a function, its arguments.
        **kwargs: Keyword arguments of the same.

    Raises:
        TypeError: If `runner` is neither a session nor a function.
        ValueError: If `runner` is a function that XLA compiles, or one that is called while a graph is built.

    Example:
    >>> square = tf.function(lambda x: tf.matmul(x, x))
    >>> conversion_report(square, tf.ones((8, 8))).refused
    {'allow': {'MatMul': 1}}
    """
    if isinstance(runner, tf.types.experimental.Callable):
        graphs = _run_function(runner, *args, **kwargs)
    elif hasattr(runner, "run") and not isinstance(runner, type):
        graphs = _run_session(runner, *args, **kwargs)
    else:
        raise TypeError(f"`runner` must be a session or a tf.function. Received: runner={runner!r}.")
    functions = [function for graph in graphs for function in graph.library.function]
    return _report([*(node for graph in graphs for node in graph.node), *(n for f in functions for n in f.node_def)])


def _run_session(session: Any, fetches: Any, feed_dict: Any = None) -> list[Any]:
    metadata, options = V1.RunMetadata(), V1.RunOptions(output_partition_graphs=True)
    session.run(fetches, feed_dict, options=options, run_metadata=metadata)
    return list(metadata.partition_graphs)


def _run_function(function: Any, *args: Any, **kwargs: Any) -> list[Any]:
    if not tf.executing_eagerly():
        raise ValueError(f"`runner` must be a session while a graph is built. Received: runner={function!r}.")
    before = tf.config.optimizer.get_experimental_options().get("min_graph_nodes", 0)
    tf.config.optimizer.set_experimental_options({"min_graph_nodes": next(_new_option)})
    context.enable_run_metadata()
    context.export_run_metadata()  # discards graphs of earlier runs
    try:
        function(*args, **kwargs)
        metadata = context.export_run_metadata()
    finally:
        context.disable_run_metadata()
        tf.config.optimizer.set_experimental_options({"min_graph_nodes": before})
    graphs = [graph for function in metadata.function_graphs for graph in function.partition_graphs]
    if not graphs:
        raise ValueError(
            "`runner` must be a function that runs as a graph. XLA compiles all of this one (jit_compile=True), and "
            f"the rewrite does not apply. Received: runner={function!r}."
        )
    return graphs


def _report(nodes: list[Any]) -> ConversionReport:
    casts = Counter(match[1] for node in nodes if (match := _ADDED_CAST.search(node.name)))
    half = {"Fp16": "float16", "Bf16": "bfloat16"}
    # A session may convert through its own configuration.
    dtype = next((half[name] for name in casts if name in half), graph_rewrite.active())
    counted: Counter[tuple[str, str]] = Counter()
    for node in nodes:
        # The operation that a oneDNN kernel or a fused kernel replaces.
        ran_in, operation = _dtype_of(node), re.sub(r"(?<=Norm|Grad)Ex$", "V3", _KERNEL.sub("", node.op))
        if ran_in in _FLOATS and not _ADDED_CAST.search(node.name) and operation not in _BOOKKEEPING:
            counted[operation, ran_in] += 1
    counts = [Count(*key, number, list_of(key[0], dtype or "bfloat16")) for key, number in counted.items()]
    counts.sort(key=lambda count: (count.dtype == "float32", -count.nodes, count.operation))
    return ConversionReport(dtype, tuple(counts), (casts["Fp16"] + casts["Bf16"], casts["Fp32"]))


def _dtype_of(node: Any) -> str | None:
    for name in ("T", "dtype"):
        if node.attr[name].type and not node.op.startswith(_TRANSFERS):
            return str(tf.as_dtype(node.attr[name].type).name)
    return None


def list_of(operation: str, dtype: str) -> str:
    """Returns the rewrite's list for an operation: `"allow"`, `"infer"`, `"deny"`, `"clear"`, or `"none"`.

    Args:
        operation: The type of the operation, such as `"MatMul"`.
        dtype: The dtype that the rewrite converts to.

    Example:
    >>> list_of("MatMul", "bfloat16"), list_of("Softmax", "float16"), list_of("Exp", "float16")
    ('allow', 'infer', 'deny')
    """
    for name in _LISTS:
        if operation in (_lists(dtype)[name] | _from_environment(name, "ADD")) - _from_environment(name, "REMOVE"):
            return name
    return "none"


@functools.cache
def _lists(dtype: str) -> dict[str, frozenset[str]]:
    """Returns the operations of each list, read from the C++ header of the installed TensorFlow."""
    text = (Path(tf.sysconfig.get_include()) / _HEADER).read_text()
    (body,) = re.findall(rf"^class {_CLASSES[dtype]} .*?^}};", text, flags=re.DOTALL | re.MULTILINE)
    (shared,) = re.findall(r"tensor_list_ops\[\] = {(.*?)}", text, flags=re.DOTALL)
    found = {}
    for name in _LISTS:
        (method,) = re.findall(rf"{name.title()}List\(\) override {{(.*?)\n  }}\n", body, flags=re.DOTALL)
        # Names in capitals are environment variables.
        found[name] = frozenset(re.findall(r'"(\w*[a-z]\w*)"', method + (shared if name == "clear" else "")))
    return found


def _from_environment(name: str, change: str) -> set[str]:
    names = (name.upper() + "LIST", _OLD_NAMES.get(name, ""))
    values = (os.environ.get(f"{_PREFIX}{variable}_{change}", "") for variable in names)
    return {operation for value in values for operation in value.split(",") if operation}
