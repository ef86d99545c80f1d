"""What goes wrong when a function is traced: inputs that are none, and errors explained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax

from vfjax._analysis import Traced
from vfjax._trees import leaf_paths, some
from vfjax._types import PyTree


def check_sizes(avals: Mapping[str, Any], x: PyTree) -> None:
    """Checks that the sizes of what is traced first are numbers, and that there are examples.

    Raises:
        ValueError: If a size is symbolic, or there are no examples.
    """
    inputs = [(f"x{jax.tree_util.keystr(p)}", a) for p, a in jax.tree_util.tree_leaves_with_path(x)]
    leaves = [(f"variables' leaf '{path}'", aval) for path, aval in avals.items()]
    for name, aval in leaves + inputs:
        symbolic = [size for size in aval.shape if not isinstance(size, int)]
        if symbolic:
            raise ValueError(
                f"{name} has the symbolic size {symbolic[0]} in its shape {_shape(aval)}: trace "
                "with numbers, as layers are told apart by their sizes. Network.run takes any "
                "batch size, and exports under symbolic ones."
            )
    for name, aval in inputs:
        if aval.shape and aval.shape[0] == 0:
            raise ValueError(
                f"{name} has shape {_shape(aval)}, without examples: its axis 0 is the batch; give "
                "one example or more"
            )


def check_axes(x: PyTree, like: PyTree) -> None:
    """Checks that an input has as many axes as the one first traced, whose axis 0 is the batch.

    Raises:
        ValueError: If it has others.
    """
    if jax.tree.structure(x) != jax.tree.structure(like):
        return
    for (path, leaf), traced in zip(
        jax.tree_util.tree_leaves_with_path(x), jax.tree.leaves(like), strict=True
    ):
        shape = tuple(jax.numpy.shape(leaf))
        if len(shape) != len(traced.shape):
            name, wanted = f"x{jax.tree_util.keystr(path)}", ["batch", *traced.shape[1:]]
            single = shape == tuple(traced.shape[1:])
            raise ValueError(
                f"{name} has shape {shape}, but the network was traced with "
                f"[{', '.join(map(str, wanted))}]: "
                + ("give a single example its batch axis, x[None]" if single else "trace it anew")
            )


def check_layers(traced: Traced, x: PyTree) -> None:
    """Checks that layers have weights, and warns where one sees no batch.

    Raises:
        ValueError: If a layer has no inputs or no outputs.

    Warns:
        UserWarning: If the axes of a pre-activation are all channels, as of a single example.
    """
    for name, site in traced.layers.items():
        kernel = traced.graph.avals[traced.graph.equations[site.index].values[site.side]].shape
        if 0 in kernel:
            raise ValueError(
                f"the layer '{name}' has a kernel of shape {kernel}, without weights: give it one "
                "unit or more, or leave it out of apply_fn and variables"
            )
        if len(site.channel_axes) == len(traced.graph.avals[site.preactivation].shape):
            warnings.warn(
                f"the layer '{name}' makes no axis of examples of x = {_listed(x)}: if x is a "
                "single example, trace a batch, x[None], with a function of batches, such as "
                "jax.vmap(apply_fn, (None, 0)), since axis 0 of x is the batch.",
                UserWarning,
                stacklevel=4,
            )
            return


def explain(error: Exception, variables: Any, avals: Mapping[str, Any], x: PyTree) -> None:
    """Raises a better error for one that a function raised when it was first traced, or adds to it.

    Args:
        error: The error.
        variables: What was given as variables.
        avals: Their leaves by path.
        x: The input.

    Raises:
        TypeError: If the arguments look swapped, or are a training state.
    """
    if isinstance(error.__cause__, KeyError):
        return  # explained where it was raised
    said = f"apply_fn raised {type(error).__name__}: {_first_line(error)}."
    if hasattr(variables, "params") and hasattr(variables, "opt_state"):
        raise TypeError(
            f"{said} variables is a {type(variables).__name__}, a state of training: pass what "
            "apply_fn takes, such as {'params': state.params}"
        ) from error
    if list(avals) == [""] and jax.tree.structure(x) != jax.tree.structure(0):
        raise TypeError(
            f"{said} variables is one array of shape {_shape(avals[''])}, and x is a tree with "
            f"{some(leaf_paths(x))}: are they swapped? It is vfjax.trace(apply_fn, variables, x)"
        ) from error
    note = (
        "apply_fn raised this when vfjax traced apply_fn(variables, x), with variables of "
        f"{some(avals)} and x = {_listed(x)}."
    )
    named, _ = jax.tree_util.tree_flatten_with_path(variables, is_leaf=lambda a: a is None)
    absent = [jax.tree_util.keystr(path) for path, leaf in named if leaf is None]
    if absent:
        note += f" variables has None at {some(absent)}."
    if type(error).__module__.startswith("flax"):
        note += " Flax's model.apply takes variables as {'params': ...}, not the parameters alone."
    error.add_note(note)


def explain_input(error: Exception, x: PyTree, like: PyTree) -> None:
    """Adds to an error that a function raised for another input than the one first traced.

    Raises:
        TypeError: If the input has another structure.
    """
    if leaf_paths(x) != leaf_paths(like):
        raise TypeError(
            f"x must be an input like the one that was traced, {_listed(like)}; it was "
            f"{_listed(x)}, and apply_fn raised {type(error).__name__}: {_first_line(error)}"
        ) from error
    error.add_note(
        f"apply_fn raised this for x = {_listed(x)}; it was traced with {_listed(like)}."
    )


def _listed(x: PyTree) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(x)
    if not leaves:
        return f"{x!r}, without arrays"
    shown = [f"{jax.tree_util.keystr(p)} {a.dtype}{_shape(a)}".strip() for p, a in leaves]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def _shape(aval: Any) -> str:
    return f"[{', '.join(map(str, aval.shape))}]"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:200].rstrip(".")
