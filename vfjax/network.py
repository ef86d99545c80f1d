"""`trace`: everything that merging, repair and diagnosis need to know of a network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax import (
    _describe,
    _fold,
    _graph,
    _outside,
    _propagate,
    _retrace,
    _route,
    _summary,
    _tree,
    symmetry,
)
from vfjax._fold import FoldError
from vfjax._plan import Edit, Plan
from vfjax._records import Crossing, Layer, Norm, Tap, average
from vfjax._traced import Traced

__all__ = ["Crossing", "Edit", "FoldError", "Layer", "Network", "Norm", "Tap", "trace"]

Array = jax.Array
PyTree = Any


def trace(apply_fn: Callable[[PyTree, PyTree], PyTree], variables: PyTree, x: PyTree) -> Network:
    """Reads a network's layers, norms and symmetries off its jaxpr.

    Args:
        apply_fn: A pure function `(variables, x) -> output`, in evaluation mode (no dropout).
        variables: Its parameters and stored statistics: a pytree of arrays, or of
            `jax.ShapeDtypeStruct`s, since only shapes and dtypes are looked at.
        x: An example input, likewise; axis 0 of every leaf is the batch.

    Returns:
        The network. It holds no parameters.

    Raises:
        TypeError: If a leaf of `variables` is no array (an unpartitioned Equinox module).
        ValueError: If the weights are closed over instead of passed in `variables`.

    Warns:
        UserWarning: If the network has no layers, or some weights are closed over.

    Example:
        >>> import jax, jax.numpy as jnp, vfjax
        >>> def mlp(p, x):
        ...     return jax.nn.relu(x @ p["w0"] + p["b0"]) @ p["w1"]
        >>> p = {"w0": jnp.ones((3, 8)), "b0": jnp.ones(8), "w1": jnp.ones((8, 2))}
        >>> net = vfjax.trace(mlp, p, jnp.ones((5, 3)))
        >>> [(layer.name, layer.depth) for layer in net.layers]
        [('w0', 1), ('w1', 2)]
        >>> list(net.spec.groups)
        ['w0']
    """
    return Network(apply_fn, variables, x)


class Network:
    """A traced network; hashable by identity, static in pytrees, not saved. Made by `trace`."""

    def __init__(self, apply_fn: Callable[..., Any], variables: PyTree, x: PyTree) -> None:
        """See `trace`."""
        if not callable(apply_fn):
            raise TypeError(
                f"apply_fn must be a function (variables, x) -> output; it was a "
                f"{type(apply_fn).__name__}. For a Flax module, pass `model.apply`."
            )
        self._traces = _retrace.Retracer(apply_fn, variables, x)
        self._reference, self._treedef = self._traces.reference, self._traces.treedef
        self._avals = self._traces.avals
        _outside.report_missing_layers(self._reference)

    def __repr__(self) -> str:
        """Size and depth at a glance."""
        return (
            f"Network({len(self.layers)} layers, depth {self.depth}, {self.parameters:,} "
            f"parameters, {len(self.spec.groups)} groups)"
        )

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all leaves of the variables."""
        return tuple(self._avals)

    @functools.cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The linear and convolution layers, in the order of evaluation."""
        return tuple(
            _describe.describe_layer(
                self._reference,
                name,
                batch=self._traces.batch,
                axes=self._propagation.axes,
                groups=self._symmetry[1],
            )
            for name in self._reference.layers
        )

    @functools.cached_property
    def norms(self) -> tuple[Norm, ...]:
        """The normalisations with stored statistics, in the order of evaluation."""
        return tuple(_describe.describe_norm(self._reference, n) for n in self._reference.norms)

    @functools.cached_property
    def _propagation(self) -> Any:
        return _propagate.propagate(self._reference.graph)

    @functools.cached_property
    def _symmetry(self) -> tuple[symmetry.PermutationSpec, dict[int, str]]:
        return symmetry.from_propagation(self._propagation, self.paths)

    @property
    def spec(self) -> symmetry.PermutationSpec:
        """Groups of axes that can be permuted together without changing the function."""
        return self._symmetry[0]

    @functools.cached_property
    def taps(self) -> tuple[Tap, ...]:
        """Where each group shows: one per tap of a layer and group, each value once."""
        return _describe.describe_taps(
            self._reference, axes=self._propagation.axes, groups=self._symmetry[1]
        )

    @property
    def depth(self) -> int:
        """L, the number of layers on the longest path from input to output."""
        return self._reference.depth

    @functools.cached_property
    def statistics(self) -> frozenset[str]:
        """Paths of the stored statistics of norms, which are no parameters."""
        return frozenset(p for norm in self.norms for p in (norm.mean, norm.var))

    @property
    def parameters(self) -> int:
        """Number of parameters, stored statistics not counted."""
        return self._count(self.paths)

    @functools.cached_property
    def flops(self) -> int:
        """Operations per example: see `Layer.flops`, plus norms, activations and pools."""
        return self._flops(range(len(self._reference.graph.equations)))

    @property
    def x(self) -> PyTree:
        """The traced input: `jax.ShapeDtypeStruct`s, batch axis first."""
        return self._traces.x

    @functools.cached_property
    def residual(self) -> bool:
        """Whether the network has a residual join: a sum of values behind different layers."""
        return self._reference.joins

    @property
    def opaque(self) -> tuple[tuple[str, str], ...]:
        """Primitives that hold linear equations and were kept whole: (primitive, file:line)."""
        return self._reference.opaque

    @property
    def others(self) -> tuple[tuple[str, str, str], ...]:
        """Leaves that act outside of layers, norms and biases: (path, primitive, file:line).

        Embeddings, layer scales and gates are such. Permutations follow them, corrections and the
        removal of biases do not. A leaf that is an output by itself is listed under `output`.
        """
        return self._reference.others

    def summary(self) -> str:
        """A table of layer, depth, shapes, parameters, FLOPs and group, as text."""
        return _summary.summary(self)

    def layer(self, name: str) -> Layer:
        """The layer of a name.

        Args:
            name: As in `Layer.name`.

        Raises:
            ValueError: If there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise ValueError(self._unknown("layer", name, [x.name for x in self.layers]))

    def norm(self, name: str) -> Norm:
        """The norm of a name; raises a ValueError if there is none."""
        for norm in self.norms:
            if norm.name == name:
                return norm
        raise ValueError(self._unknown("norm", name, [x.name for x in self.norms]))

    # ------------------------------------------------------------------------------- evaluation

    def run(
        self,
        variables: PyTree,
        x: PyTree,
        *,
        capture: Sequence[str] | None = None,
        edit: Mapping[str, Edit] | None = None,
        stop: int | None = None,
        start: int | None = None,
    ) -> Any:
        """Evaluates the network, or one side of a cut, with values read or replaced at named sites.

        Sites are `<layer>` (its pre-activation), `<layer>:act` (the tap after it), `<norm>:in`
        (what that norm alone reads), `input` and `output`. `jit`, `vmap` and `grad` go through.

        Args:
            variables: Parameters; leaves that the requested side does not read may be None.
            x: The input, or with `start` a `Crossing`.
            capture: Sites to return; each value is as it is after its edit.
            edit: By site, a function from the value to one of equal shape and dtype. It may close
                over a list to hand statistics out.
            stop: Depth to stop at: returns the `Crossing` there.
            start: Depth to start from.

        Returns:
            The output (or the `Crossing`); with `capture`, a pair of it and a dict by site.

        Raises:
            ValueError: If a site or depth does not exist, or a needed leaf is missing.
        """
        if stop is not None:
            self._check_depth(stop, "stop")
        if start is not None:
            self._check_depth(start, "start")
        _check_crossing(x, start)
        if stop is not None and start is not None:
            raise ValueError("run takes stop or start, not both; run the two sides one by one.")
        named = self._named(variables)
        if isinstance(x, Crossing):
            traced = self._traces.at_crossing(named, x)
            env = dict(zip(traced.cut(x.depth).crossing, x.values, strict=True))
        else:
            traced = self._traces.at(named, x)
            inputs = traced.graph.inputs[len(self._avals) :]
            env = dict(zip(inputs, jax.tree.leaves(x), strict=True))
        ids = zip(traced.graph.inputs, self._avals, strict=False)
        env |= {value: named[path] for value, path in ids if path in named}
        env = {v: a if isinstance(a, jax.Array) else jnp.asarray(a) for v, a in env.items()}

        plan = Plan(self, traced, capture, edit, stop, start)
        env = plan.enter(env)
        ends = traced.cut(stop).crossing if stop is not None else traced.graph.output_ids
        wanted = list(dict.fromkeys([*ends, *plan.values]))
        self._check_present(traced, wanted, env, "variables")
        values = _graph.evaluate(
            traced.graph,
            env,
            wanted,
            edits=plan.edits,
            operand_edits=plan.operand_edits,
            rules=_route.rules(),
        )
        if stop is not None:
            out: Any = Crossing(tuple(values[v] for v in ends), stop, _retrace.origin_of(x))
        else:
            out = plan.finish(traced.output(values))
        if capture is None:
            return out
        return out, plan.captured(values, env, out)

    def average_crossings(
        self, crossings: Sequence[Crossing], weights: Sequence[Any] | None = None
    ) -> Crossing:
        """Averages what several stems hand to one trunk.

        Values that depend on parameters are averaged (in float32 or better, cast back); values of
        the input alone are equal in all stems and passed on.

        Args:
            crossings: One per model, all of one cut and one input.
            weights: One per model; None for 1/K.

        Raises:
            ValueError: If there are none, they are of different cuts or inputs, or a value that
                would have to be averaged is an integer or boolean.
        """
        if not crossings:
            raise ValueError("crossings is empty; give one per model.")
        return average(crossings, self._reference.cut(crossings[0].depth).averaged, weights)

    # ------------------------------------------------------------------------------------- cuts

    def stem_leaves(self, depth: int) -> frozenset[str]:
        """Paths of the leaves that the stem of a cut reads."""
        self._check_depth(depth, "depth")
        return self._reference.leaves_of(self._reference.sides(depth)[0])

    def trunk_leaves(self, depth: int) -> frozenset[str]:
        """Paths of the leaves that the trunk of a cut reads."""
        self._check_depth(depth, "depth")
        outputs = self._reference.graph.output_ids
        return self._reference.leaves_of(self._reference.sides(depth)[1], outputs)

    def stem_parameters(self, depth: int) -> int:
        """Number of parameters that the stem of a cut reads."""
        return self._count(self.stem_leaves(depth))

    def trunk_parameters(self, depth: int) -> int:
        """Number of parameters that the trunk of a cut reads."""
        return self._count(self.trunk_leaves(depth))

    def stem_flops(self, depth: int) -> int:
        """Operations per example of the stem of a cut."""
        self._check_depth(depth, "depth")
        return self._flops(self._reference.sides(depth)[0])

    def trunk_flops(self, depth: int) -> int:
        """Operations per example of the trunk of a cut."""
        self._check_depth(depth, "depth")
        return self._flops(self._reference.sides(depth)[1])

    def in_stem(self, site: str, depth: int) -> bool:
        """Whether the value at a site is made in the stem of a cut."""
        self._check_depth(depth, "depth")
        return Plan(self, self._reference, None, None, None, None).in_stem(site, depth)

    # ---------------------------------------------------------------------------------- folding

    def can_fold(self, layer: str, *, shift: bool = True) -> bool:
        """Whether a correction of a layer's pre-activation can go into its leaves.

        Args:
            layer: Name of the layer.
            shift: Whether the correction shifts, or only scales.
        """
        self.layer(layer)
        return _fold.obstacle(self._reference, layer, shift=shift) is None

    def fold(self, variables: PyTree, layer: str, scale: Array, shift: Array | None) -> PyTree:
        """Folds `z' = scale * z + shift` of a layer's pre-activation into its leaves.

        The kernel and the bias are scaled; the shift goes into the bias or, for a layer without
        one, into the stored mean of the normalisation that follows directly.

        Args:
            variables: Parameters.
            layer: Name of the layer.
            scale: Float array of shape `channel_shape`.
            shift: Alike, or None.

        Returns:
            A new tree.

        Raises:
            FoldError: If there is nowhere to fold it.
        """
        self.layer(layer)
        named, treedef = _tree.flatten_named(variables)
        new = _fold.fold(self._reference, named, layer, scale, shift)
        return jax.tree.unflatten(treedef, [new[path] for path in named])

    # ---------------------------------------------------------------------------------- private

    def _count(self, paths: Iterable[str]) -> int:
        """Number of parameters: stored statistics, integers and random keys are none."""
        avals = [self._avals[p] for p in paths if p not in self.statistics]
        return sum(int(np.prod(a.shape)) for a in avals if jnp.issubdtype(a.dtype, jnp.inexact))

    def _flops(self, equations: Iterable[int]) -> int:
        return sum(self._reference.flops(i) for i in equations) // self._traces.batch

    def opaque_hint(self) -> str:
        """A sentence for messages about layers: what hides some of them, or an empty string."""
        if not self.opaque:
            return ""
        primitive, where = self.opaque[0]
        return (
            f" Layers inside the opaque {primitive} at {where} cannot be reached: write it as a "
            f"Python loop, or as a scan over at most {_graph.MAX_UNROLL} stacked layers."
        )

    def _check_depth(self, depth: Any, argument: str) -> None:
        if isinstance(depth, bool) or not isinstance(depth, (int, np.integer)):
            raise TypeError(f"{argument} must be a whole number of layers; it was {depth!r}.")
        if not 0 <= depth <= self.depth:
            raise ValueError(
                f"{argument} was {depth}; this network has {self.depth} layers from input to "
                f"output, so give 0 to {self.depth}.{self.opaque_hint()}"
            )

    def _unknown(self, kind: str, name: str, known: Sequence[str]) -> str:
        parts = {part for part in str(name).split("/") if part}
        near = sorted(known, key=lambda k: -len(parts & set(k.split("/"))))
        known = f"it has, among others, {near[:6]}.{self.opaque_hint()}"
        return f"The network has no {kind} '{name}'; {known}"

    def _named(self, variables: PyTree) -> dict[str, Any]:
        named, _ = _tree.flatten_named(variables)
        unknown = [path for path in named if path not in self._avals]
        if unknown:
            raise ValueError(
                f"variables has leaves {unknown[:3]} that the traced network has not; pass a tree "
                "of the structure that was traced."
            )
        return named

    def _check_present(
        self, traced: Traced, wanted: Sequence[int], env: Mapping[int, Any], name: str
    ) -> None:
        """Checks that all leaves are there that computing values reads."""
        graph = traced.graph
        read = {v for i in graph.needed(wanted, env) for v in graph.equations[i].values}
        given = graph.inputs[: len(self._avals)]
        leaves = zip(given, self._avals, strict=True)
        missing = [p for v, p in leaves if v in read | set(wanted) and v not in env]
        if missing:
            raise ValueError(
                f"{name} lacks {missing[:3]}{' and more' if len(missing) > 3 else ''}, which this "
                "part of the network reads; pass a tree of the structure that was traced."
            )


def _check_crossing(x: Any, start: int | None) -> None:
    if start is None:
        if isinstance(x, Crossing):
            raise ValueError(f"x is a Crossing of a cut at {x.depth}; run it with start={x.depth}.")
    elif not isinstance(x, Crossing) or x.depth != start:
        found = f"a cut at {x.depth}" if isinstance(x, Crossing) else type(x).__name__
        raise ValueError(
            f"start={start} takes the Crossing that run(..., stop={start}) returns in place of x; "
            f"it was {found}."
        )
