"""Private names of Keras and TensorFlow that tfmixed uses. A change in a new version fails here first."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context

import tfmixed

OPTIMIZER, TRAINER = "keras.src.optimizers.base_optimizer", "keras.src.backend.tensorflow.trainer"

# Module, attribute, parameters (None if it is not checked), purpose.
HOOKS = [
    (OPTIMIZER, "BaseOptimizer._get_variable_index", ["self", "variable"], "name the variable of a gradient"),
    (OPTIMIZER, "BaseOptimizer._track_variable", ["self", "variable"], "let an optimizer hold views of its states"),
    (OPTIMIZER, "BaseOptimizer._filter_empty_gradients", ["self", "grads", "vars"], "apply gradients"),
    (
        OPTIMIZER,
        "BaseOptimizer._overwrite_variables_directly_with_gradients",
        ["self", "grads", "vars"],
        "apply gradients",
    ),
    (OPTIMIZER, "BaseOptimizer._use_weight_decay", ["self", "variable"], "decay float32 views of weights"),
    ("keras.src.utils.tracking", "Tracker.replace_tracked_value", None, "count steps in a variable of the user's"),
    ("keras.src.dtype_policies.dtype_policy", "dtype_policy", [], "make another policy the default"),
    ("keras.src.dtype_policies.dtype_policy", "set_dtype_policy", ["policy"], "make another policy the default"),
    ("keras.src.saving.saving_api", "save_model", None, "save what the script made"),
    (TRAINER, "TensorFlowTrainer._maybe_symbolic_build", ["self", "iterator", "data_batch"], "fit on workers"),
    (TRAINER, "TensorFlowTrainer._make_function", ["self", "step_function"], "fit on workers"),
    (TRAINER, "reduce_per_replica", ["values", "strategy", "reduction"], "fit on workers"),
    (TRAINER, "_collective_all_reduce_multi_worker", ["strategy"], "fit on workers"),
    (
        "keras.src.layers.layer",
        "Layer._flatten_layers",
        ["self", "include_self", "recursive"],
        "force float32, find widths",
    ),
    ("keras.src.layers.layer", "Layer._get_own_losses", ["self"], "sum added losses in float32"),
    ("keras.src.layers.layer", "Layer._get_regularization_losses", ["self"], "sum added losses in float32"),
    ("keras.src.backend.common.stateless_scope", "in_stateless_scope", [], "read variables of PyTorch directly"),
    ("keras.src.backend.common.tensor_attributes", "get_tensor_attr", ["tensor", "attr"], "remember float32 values"),
    (
        "keras.src.backend.common.tensor_attributes",
        "set_tensor_attr",
        ["tensor", "attr", "value"],
        "remember float32 values, keep masks",
    ),
    (
        "keras.src.trainers.data_adapters",
        "get_data_adapter",
        ["x", "y", "sample_weight", "batch_size", "steps_per_epoch", "shuffle", "class_weight"],
        "measure gradients on what fit takes",
    ),
    (
        "keras.src.backend.common.global_state",
        "get_global_attribute",
        ["name", "default", "set_to_default"],
        "give a random state back",
    ),
    (
        "keras.src.trainers.trainer",
        "Trainer._compute_loss",
        ["self", "x", "y", "y_pred", "sample_weight", "training"],
        "compute the loss as fit does",
    ),
    ("keras.src.backend.common.global_state", "set_global_attribute", ["name", "value"], "lend a generator of seeds"),
    ("tensorflow.python.ops.handle_data_util", "get_handle_data", ["source_t"], "read the variables of a graph"),
    (TRAINER, "TensorFlowTrainer._symbolic_build", ["self", "iterator", "data_batch"], "build a model as fit does"),
    (
        "tensorflow.python.eager.polymorphic_function.concrete_function",
        "ConcreteFunction._call_flat",
        ["self", "tensor_inputs", "captured_inputs"],
        "call a compiled function with other variables",
    ),
    ("tensorflow.python.ops.control_flow_util", "GraphOrParentsInXlaContext", ["graph"], "see a whole step under XLA"),
    ("tensorflow.python.framework.test_util", "IsMklEnabled", [], "see whether oneDNN is on"),
    ("tensorflow.python.framework.ops", "Graph._get_function", ["self", "name"], "read functions that a graph calls"),
    (
        "tensorflow.python.training.experimental.mixed_precision_global_state",
        "set_mixed_precision_graph_rewrite_enabled",
        ["enabled"],
        "tell tf_keras of the rewrite",
    ),
    ("tensorflow.python.eager.context", "_create_context", [], "wait until a script has chosen eager or not"),
    ("tensorflow.python.eager.context", "export_run_metadata", [], "read the graphs of functions"),
    ("tensorflow.python.trackable.base", "Trackable._track_trackable", None, "save what an optimizer holds"),
    ("tensorflow.python.framework.ops", "Graph._get_control_flow_context", ["self"], "know the top of a graph"),
    ("tensorflow.python.framework.ops", "Graph._attr_scope", ["self", "attr_map"], "mark gradients, inline functions"),
    ("tensorflow.python.framework.ops", "Operation._get_control_flow_context", None, "see what a branch can use"),
    (
        "tensorflow.python.ops.variables",
        "Variable._get_save_slice_info",
        ["self"],
        "know the parts of a partitioned variable",
    ),
    (
        "tensorflow.python.ops.math_grad",
        "_ReduceGradientArg",
        ["grad", "shape_axes_must_reduce"],
        "sum the gradients of broadcasts in float32",
    ),
    ("keras.src.backend", "AutocastScope", ["dtype"], "gather float32 rows of a variable"),
    ("keras.src.backend", "numpy.take", ["x", "indices", "axis"], "gather float32 rows"),
    ("tensorflow", "__internal__.distribute.strategy_supports_no_merge_call", [], "decide for all replicas"),
]
# Attributes of instances.
ATTRIBUTES = {
    "_trainable_variables": "list what an optimizer was built with",
    "_distribute_strategy": "fit on workers",
    "_distribution_strategy": "take a step on copies of the variables of several replicas",
    "_unique_id": "find the states of a variable that has a copy",
    "_dtype_policy": "compute in float32 for a while",
    "_call_has_training_arg": "call a model as the trainer does",
    "_compile_loss": "compute the loss as fit does",
    "_user_loss_weights": "compute the loss as fit does",
    "_keras_mask": "hand on the mask of a tensor",
    "_descriptor_cache": "make tf.function trace a layer's call again",
    "_inputs_struct": "know a functional model's inputs",
    "_flash_attention": "leave flash kernels in half precision",
    "_model_variables_moving_average": "overwrite rounded weights with averages",
    "_layout": "give an optimizer's variables the layout of weights",
    "_parallel_update_step": "update the variables of PyTorch in float32",
    "_tracker": "count steps in a variable of the user's",
    "_autocast": "count the half-precision copies of weights",
    "_foreach_norm": "check all gradients of PyTorch in one operation",
    "_foreach_mul": "unscale all gradients of PyTorch in one operation",
    "_foreach_div": "unscale them by a scale without a normal reciprocal",
    "_version": "know whether a tensor of PyTorch was written",
    "_learning_rate": "read it once a step, and see whether it is a user's schedule",
    "_layers": "find sublayers",
    "_buffers": "restore the buffers of PyTorch modules",
    "_rng": "draw other random numbers than the script's",
    "_build_shapes_dict": "trace what a layer gives",
    "_inbound_nodes": "find what an operation is given",
    "_outbound_nodes": "find who takes it",
    "_keras_history": "find what made an output",
    "_nodes_by_depth": "walk a functional graph",
    "_functional": "find the graph of a Sequential",
    "_dtype": "correct what a symbolic tensor says, know how a variable is stored",
    "_registry": "replace gradient functions",
    "_use_locking": "know how a TensorFlow 1 optimizer writes",
    "_is_stateful": "know what a gradient comes from",
    "_current_loss_scale": "let TensorFlow's loss scale follow ours",
    "_REGISTERED_WRAPPER_OPTIMIZER_CLS": "hand out our optimizer from TensorFlow's own function",
}


@pytest.mark.parametrize(("module", "path", "parameters", "purpose"), HOOKS, ids=[hook[1] for hook in HOOKS])
def test_private_functions_have_the_expected_parameters(module, path, parameters, purpose):
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name, None)
        assert found is not None, f"Keras {keras.__version__}, TensorFlow {tf.__version__}: no {path} to {purpose}"
    assert parameters in (None, list(inspect.signature(found).parameters)), f"{path} takes other arguments to {purpose}"


def test_private_attributes_exist():
    """On instances."""
    optimizer, variable = keras.optimizers.SGD(), keras.Variable([1.0])
    optimizer.build([variable])
    assert isinstance(optimizer._learning_rate, keras.Variable), ATTRIBUTES["_learning_rate"]
    assert optimizer._iterations is optimizer.variables[0], "set it, or count steps in a variable of the user's"
    assert optimizer._tracker.is_in_store("variables", optimizer._iterations), ATTRIBUTES["_tracker"]
    assert variable._value is variable.value  # set, to count steps in a variable of TensorFlow's
    assert optimizer._trainable_variables == [variable], ATTRIBUTES["_trainable_variables"]
    averaging = keras.optimizers.SGD(use_ema=True)
    averaging.build([variable])
    assert averaging._model_variables_moving_average == [averaging.variables[-1]], "overwrite weights with averages"
    assert optimizer._distribution_strategy is tf.distribute.get_strategy(), ATTRIBUTES["_distribution_strategy"]
    assert getattr(variable, "_layout", None) is None, ATTRIBUTES["_layout"]  # absent in Keras 3.14
    assert variable._autocast is True, ATTRIBUTES["_autocast"]
    assert optimizer._var_key(variable) == variable.value._unique_id, ATTRIBUTES["_unique_id"]
    assert keras.Sequential()._distribute_strategy is None, ATTRIBUTES["_distribute_strategy"]
    model = keras.Sequential([keras.Input((2,)), dense := keras.layers.Dense(1)])
    assert isinstance(model._dtype_policy, keras.DTypePolicy), ATTRIBUTES["_dtype_policy"]
    assert model._call_has_training_arg, ATTRIBUTES["_call_has_training_arg"]
    functional = keras.Model(model.inputs, model.outputs)
    assert functional._inputs_struct is not None, ATTRIBUTES["_inputs_struct"]
    attention = keras.layers.MultiHeadAttention(1, 1), keras.layers.GroupQueryAttention(1, 1, 1)
    assert not any(layer._flash_attention for layer in attention), ATTRIBUTES["_flash_attention"]
    assert model._layers[1] is dense, ATTRIBUTES["_layers"]
    assert dense._losses == [], "know the layers that add losses, and restore those that they added"
    assert vars(context.context())["_rng"].random(), ATTRIBUTES["_rng"]
    assert dense._build_shapes_dict == {"input_shape": (None, 2)}, ATTRIBUTES["_build_shapes_dict"]
    dense.kernel.regularizer = keras.regularizers.L2()
    assert vars(dense.kernel)["_regularizer"] is dense.kernel.regularizer, "know what regularizes a variable"
    graph = model._functional
    assert graph.outputs[0]._keras_history[0] is dense, ATTRIBUTES["_keras_history"]
    assert graph._nodes_by_depth[0] == dense._inbound_nodes, ATTRIBUTES["_nodes_by_depth"]
    assert graph.operations[0]._outbound_nodes == dense._inbound_nodes, ATTRIBUTES["_outbound_nodes"]
    assert graph.outputs[0]._dtype == graph.outputs[0].dtype, ATTRIBUTES["_dtype"]
    model.compile("sgd", "mse", loss_weights=[2.0])
    assert model._compile_loss._user_loss_weights == [2.0], ATTRIBUTES["_user_loss_weights"]
    assert model._compile_loss is not None, ATTRIBUTES["_compile_loss"]
    masked = keras.layers.Masking()(np.ones((1, 2, 1), "float32"))
    assert masked._keras_mask is not None, ATTRIBUTES["_keras_mask"]
    call = tf.function(lambda self: self)
    holder = type("Holder", (), {"call": call})()
    assert holder.call is not None
    assert list(call._descriptor_cache) == [holder], ATTRIBUTES["_descriptor_cache"]
    # Keras reads it with this default too, on variables that hold float8 scales.
    assert "overwrite_with_gradient" in inspect.getsource(importlib.import_module(OPTIMIZER))


def test_private_attributes_of_tensorflow_1_exist():
    """For `tfmixed.compat.v1`."""
    from tensorflow.python.client.session import BaseSession
    from tensorflow.python.framework import ops
    from tensorflow.python.training.experimental import mixed_precision

    v1 = tf.compat.v1
    assert v1.train.AdamOptimizer()._use_locking is False, ATTRIBUTES["_use_locking"]
    takes = list(inspect.signature(BaseSession.__init__).parameters)
    assert takes == ["self", "target", "graph", "config"]  # replaced, to reach sessions that have a configuration
    with tf.Graph().as_default():
        operations = (tf.constant(1.0).op, v1.get_variable("w", initializer=1.0).handle.op)
        assert [each._is_stateful for each in operations] == [False, True], ATTRIBUTES["_is_stateful"]
    assert callable(ops.gradient_registry._registry["BiasAdd"]["type"]), ATTRIBUTES["_registry"]
    scale = v1.mixed_precision.DynamicLossScale(8.0)
    assert float(scale._current_loss_scale) == 8.0, ATTRIBUTES["_current_loss_scale"]
    wrappers = mixed_precision._REGISTERED_WRAPPER_OPTIMIZER_CLS
    assert v1.train.Optimizer in wrappers, ATTRIBUTES["_REGISTERED_WRAPPER_OPTIMIZER_CLS"]


def test_overridden_private_methods_exist():
    """Keras calls the first after each build, when a loaded model repeats its changes, and the others in an update."""
    assert list(inspect.signature(keras.Operation._post_build).parameters) == ["self"]
    for name, parameters in {
        "_backend_apply_gradients": ["grads", "trainable_variables"],
        "_backend_update_step": ["grads", "trainable_variables", "learning_rate"],
        "_clip_gradients": ["grads"],
        "_apply_weight_decay": ["variables"],
        "_update_model_variables_moving_average": ["trainable_variables"],
        "_overwrite_model_variables_with_average_value": ["trainable_variables"],
        "_var_key": ["variable"],
    }.items():
        found = inspect.signature(getattr(keras.optimizers.Optimizer, name)).parameters
        assert list(found) == ["self", *parameters], name
    parallel = Path(keras.__file__).parent / "src/backend/torch/optimizers/torch_parallel_optimizer.py"
    assert "self._parallel_update_step(" in parallel.read_text(), ATTRIBUTES["_parallel_update_step"]


def test_names_that_promotion_patches_exist():
    """Promotion patches them for the process when a half-precision policy is set."""
    names = ("__init__", "__call__", "stateless_call", "compute_output_spec", "compute_dtype", "losses")
    assert set(names) <= set(vars(keras.layers.Layer))
    for layer in (keras.layers.Normalization, keras.layers.Rescaling, keras.layers.RandomFlip):
        assert layer.call.__module__.startswith("keras.src.layers.preprocessing."), "know what prepares data"
    assert not keras.layers.Dense.call.__module__.startswith("keras.src.layers.preprocessing.")


def _is_private(name):
    return isinstance(name, str) and name.startswith("_")


def called(node):
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def private_names():
    """Returns the private attributes that the package reads but does not define."""
    read, defined = set(), set()
    for path in Path(tfmixed.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                own = isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"
                (defined if own else read).add(node.attr)
            elif isinstance(node, ast.Call) and called(node) in ("put", "getattr", "wrap"):
                # `temporary_state.put(stack, owner, name, value)`, `patches.wrap(owner, target, name, wrapper)`
                read |= {word.value for word in node.args if isinstance(word, ast.Constant) and _is_private(word.value)}
    return {name for name in read - defined if name.strip("_") not in dir(object) and not hasattr(object, name)}


def test_the_list_is_complete():
    """Add every other private name that you use to `HOOKS` or `ATTRIBUTES`."""
    listed = {part for _, path, _, _ in HOOKS for part in path.split(".") if part.startswith("_")} | set(ATTRIBUTES)
    python = {"_asdict", "_fields", "_replace", "__name__", "__version__", "_getframe", "__stderr__", "__signature__"}
    python |= {"__cause__", "__context__", "__traceback__", "__mro__", "__excepthook__", "__spec__", "__loader__"}
    python |= {"_current_frames", "__func__", "_exit", "_args_from_interpreter_flags"}
    assert private_names() - python == listed
