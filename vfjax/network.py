"""`trace`: everything that merging, repair and diagnosis need to know of a network, from its jaxpr."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax import _fold, _graph, _propagate, _route, _summary, _tree, symmetry
from vfjax._fold import FoldError
from vfjax._traced import Traced

Array = jax.Array
PyTree = Any
Edit = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear or convolution layer: one operand made of parameters only, the other of the input.

    Attributes:
        name: Path of the leaf that is its kernel, such as `params/Conv_0/kernel`; `name#2` for the
            second use of a shared kernel, `layers/kernel[3]` in an unrolled scan.
        kernel: Path of the kernel's leaf; None if more than casts and layout lies between the leaf
            and the layer (a mask, a low-rank sum), in which case corrections stay explicit.
        bias: Path of the bias's leaf, or None.
        kind: `"dense"` or `"conv"`.
        depth: Number of layers on the longest path from the input up to and including this one.
        main: Whether it lies on a longest path from input to output; a shortcut does not.
        shape: Shape of the kernel as the layer uses it.
        output_shape: Shape of the pre-activation; axis 0 is the batch in most networks.
        channel_axes: Axes of the pre-activation that hold channels.
        sample_axes: Its other axes, over which statistics are taken.
        parameters: Number of entries of kernel and bias.
        flops: Operations per example: multiply-accumulates once, and a convolution's bias.
        group: Name of the permutation group of its (last free) output axis, or None.
        norm: Name of the normalisation with stored statistics that follows directly, or None.
        where: Source line, as `file:line`.
    """

    name: str
    kernel: str | None
    bias: str | None
    kind: str
    depth: int
    main: bool
    shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    channel_axes: tuple[int, ...]
    sample_axes: tuple[int, ...]
    parameters: int
    flops: int
    group: str | None
    norm: str | None
    where: str

    @property
    def channels(self) -> int:
        """Number of channels of the pre-activation."""
        return int(np.prod([self.output_shape[a] for a in self.channel_axes]))

    @property
    def channel_shape(self) -> tuple[int, ...]:
        """Sizes of the pre-activation's channel axes: the shape of a scale or a shift."""
        return tuple(self.output_shape[a] for a in self.channel_axes)

    @property
    def tap(self) -> str:
        """Name of the site after the elementwise region that follows: `<layer>:act`."""
        return f"{self.name}:act"


@dataclasses.dataclass(frozen=True)
class Norm:
    """A normalisation by stored statistics, `(x - mean) * rsqrt(var + eps) * scale + bias`.

    Attributes:
        name: Path of the leaf of means.
        mean: Path of the leaf of means.
        var: Path of the leaf of variances.
        scale: Path of the leaf of scales, or None.
        bias: Path of the leaf of shifts, or None.
        eps: What is added to the variance.
        input_shape: Shape of its input.
        channel_axes: Axes of its input that the statistics vary along.
        sample_axes: The other axes.
        layer: Name of the layer whose pre-activation it normalises directly, or None.
    """

    name: str
    mean: str
    var: str
    scale: str | None
    bias: str | None
    eps: float
    input_shape: tuple[int, ...]
    channel_axes: tuple[int, ...]
    sample_axes: tuple[int, ...]
    layer: str | None

    @property
    def site(self) -> str:
        """Name of the site of its input: `<norm>:in`."""
        return f"{self.name}:in"


@dataclasses.dataclass(frozen=True)
class Tap:
    """Where a permutation group shows in the activations.

    Attributes:
        name: Site name, `<layer>:act`.
        group: The group.
        axis: The axis of the value that holds it.
        outer: The axis is a row-major `(outer, n, inner)`; the group's n entries are in the middle.
        inner: See `outer`.
    """

    name: str
    group: str
    axis: int
    outer: int = 1
    inner: int = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Crossing:
    """The values that cross a cut, from stem to trunk.

    Attributes:
        values: Arrays, in the network's own order.
        depth: Depth of the cut.
    """

    values: tuple[Array, ...]
    depth: int = dataclasses.field(metadata={"static": True})


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
                f"apply_fn must be a function (variables, x) -> output; it was {apply_fn!r}. For a "
                "Flax module, pass `model.apply`."
            )
        self._apply = apply_fn
        named, self._treedef = _tree.flatten_named(variables)
        self._avals = {path: _abstract(leaf) for path, leaf in named.items()}
        self._x = jax.tree.map(_abstract, x)
        self._cache: dict[Hashable, Traced] = {}
        self._lock = threading.Lock()
        self._reference = self._traced(named, x)
        if not self._reference.layers:
            _explain_no_layers(self._reference)

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
        return tuple(self._layer(name) for name in self._reference.layers)

    @functools.cached_property
    def norms(self) -> tuple[Norm, ...]:
        """The normalisations with stored statistics, in the order of evaluation."""
        return tuple(self._norm(name) for name in self._reference.norms)

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
        found: dict[tuple[int, str], Tap] = {}
        for name, value in self._reference.taps.items():
            for axis, atoms in enumerate(self._propagation.axes.get(value, ())):
                sizes = [atom.size for atom in atoms]
                for k, atom in enumerate(atoms):
                    group = self._symmetry[1].get(atom.group)
                    if group is None or (value, group) in found:
                        continue
                    outer, inner = int(np.prod(sizes[:k])), int(np.prod(sizes[k + 1 :]))
                    found[value, group] = Tap(f"{name}:act", group, axis, outer, inner)
        return tuple(found.values())

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
        return self._x

    @functools.cached_property
    def residual(self) -> bool:
        """Whether the network has a residual join: a sum of values behind different layers."""
        return self._reference.joins

    @property
    def opaque(self) -> tuple[tuple[str, str], ...]:
        """Primitives that hold linear equations and were kept whole: (primitive, file:line)."""
        return self._reference.opaque

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
        raise ValueError(self._unknown(f"layer '{name}'", [x.name for x in self.layers]))

    def norm(self, name: str) -> Norm:
        """The norm of a name; raises a ValueError if there is none."""
        for norm in self.norms:
            if norm.name == name:
                return norm
        raise ValueError(self._unknown(f"norm '{name}'", [x.name for x in self.norms]))

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

        Sites are `<layer>` (its pre-activation), `<layer>:act` (the tap after it), `<norm>:in` (what
        that norm alone reads), `input` and `output`. `jit`, `vmap` and `grad` go through.

        Args:
            variables: Parameters; leaves that the requested side does not read may be None.
            x: The input, or with `start` a `Crossing`.
            capture: Sites to return; each value is as it is after its edit.
            edit: By site, a function from the value to one of equal shape and dtype. It may close
                over a list to hand statistics out.
            stop: Depth to stop at: returns the `Crossing` there.
            start: Depth to start from.

        Returns:
            The output (or the `Crossing`); with `capture`, a pair of it and a dict from site to value.

        Raises:
            ValueError: If a site or depth does not exist, or a needed leaf is missing.
        """
        traced, env = self._inputs(variables, x, start)
        if stop is not None:
            self._check_depth(stop, "stop")
        if stop is not None and start is not None:
            raise ValueError("run takes stop or start, not both; run the two sides one by one.")
        plan = _Plan(self, traced, capture or (), edit or {}, stop, start)
        for value, change in plan.edits.items():
            if value in env:
                env[value] = change(env[value])
        ends = traced.cut(stop).crossing if stop is not None else traced.graph.output_ids
        values = _graph.evaluate(
            traced.graph,
            env,
            list(dict.fromkeys([*ends, *plan.values])),
            edits=plan.edits,
            operand_edits=plan.operand_edits,
            rules=_route.rules(),
        )
        if stop is not None:
            out: Any = Crossing(tuple(values[v] for v in ends), stop)
        else:
            leaves = [
                values[v] if isinstance(v, int) else jnp.asarray(v.val)
                for v in traced.graph.outputs
            ]
            out = plan.finish(jax.tree.unflatten(traced.out_tree, leaves))
        if capture is None:
            return out
        return out, plan.captured(values, out, x)

    def average_crossings(
        self, crossings: Sequence[Crossing], weights: Sequence[Any] | None = None
    ) -> Crossing:
        """Averages what several stems hand to one trunk.

        Values that depend on parameters are averaged (in float32 or better, cast back); values of
        the input alone are equal in all stems and passed on.

        Args:
            crossings: One per model, all of one cut.
            weights: One per model; None for 1/K.

        Raises:
            ValueError: If the crossings are of different cuts, or a value that would have to be
                averaged is an integer or boolean.
        """
        depth = crossings[0].depth
        if any(c.depth != depth for c in crossings):
            raise ValueError(
                f"crossings are of different cuts: {sorted({c.depth for c in crossings})}."
            )
        weights = [1 / len(crossings)] * len(crossings) if weights is None else list(weights)
        if len(weights) != len(crossings):
            raise ValueError(
                f"weights has {len(weights)} entries for {len(crossings)} crossings; give one each."
            )
        averaged = self._reference.cut(depth).averaged
        values = []
        for column, mix in zip(zip(*(c.values for c in crossings), strict=True), averaged):
            if not mix:
                values.append(column[0])
                continue
            if not jnp.issubdtype(column[0].dtype, jnp.inexact):
                raise ValueError(
                    f"A value of dtype {column[0].dtype} that depends on parameters crosses the cut "
                    f"at depth {depth}; models disagree on it, and it has no average. Cut elsewhere."
                )
            wide = jnp.promote_types(column[0].dtype, jnp.float32)
            total = sum(w * v.astype(wide) for w, v in zip(weights, column, strict=True))
            values.append(total.astype(column[0].dtype))
        return Crossing(tuple(values), depth)

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
        plan = _Plan(self, self._reference, (), {}, None, None)
        value, equation = plan.locate(site)
        index = equation if equation is not None else self._reference.graph.producer.get(value)
        return index is None or index in self._reference.cut(depth).stem

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

        The kernel and the bias are scaled; the shift goes into the bias or, for a layer without one,
        into the stored mean of the normalisation that follows directly.

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

    def _layer(self, name: str) -> Layer:
        traced, site = self._reference, self._reference.layers[name]
        graph = traced.graph
        equation = graph.equations[site.index]
        shape = graph.avals[site.preactivation].shape
        operand = graph.avals[equation.inputs[site.side]]
        flops = traced.flops(site.index)
        if site.bias_equation is not None:
            flops += traced.flops(site.bias_equation)
        leaves = [v for v in (site.kernel, site.bias) if v is not None]
        counted = sum(
            int(np.prod(graph.avals[graph.inputs[v.leaf]].shape[v.slot is not None :]))
            for v in leaves
        )
        conv = equation.primitive == "conv_general_dilated"
        return Layer(
            name=name,
            kernel=None if site.kernel is None else traced.paths[site.kernel.leaf],
            bias=None if site.bias is None else traced.paths[site.bias.leaf],
            kind="conv" if conv else "dense",
            depth=traced.depth_of(site),
            main=traced.is_main(site),
            shape=operand.shape,
            output_shape=shape,
            channel_axes=site.channel_axes,
            sample_axes=tuple(a for a in range(len(shape)) if a not in site.channel_axes),
            parameters=counted,
            flops=flops // self._batch,
            group=self._group_of(site.preactivation, site.channel_axes),
            norm=traced.norm_after(site),
            where=equation.where,
        )

    def _group_of(self, value: int, axes: Sequence[int]) -> str | None:
        atoms = self._propagation.axes.get(value, ())
        names = [self._symmetry[1].get(t.group) for a in axes if a < len(atoms) for t in atoms[a]]
        return next((n for n in reversed(names) if n is not None), None)

    def _norm(self, name: str) -> Norm:
        traced, site = self._reference, self._reference.norms[name]
        value = traced.graph.equations[site.index].inputs[0]
        shape = traced.graph.avals[value].shape

        def path(view: Any) -> str | None:
            return None if view is None else traced.paths[view.leaf]

        before = [n for n, s in traced.layers.items() if traced.norm_after(s) == name]
        return Norm(
            name=name,
            mean=traced.paths[site.mean.leaf],
            var=traced.paths[site.var.leaf],
            scale=path(site.scale),
            bias=path(site.bias),
            eps=site.eps,
            input_shape=shape,
            channel_axes=site.channel_axes,
            sample_axes=tuple(a for a in range(len(shape)) if a not in site.channel_axes),
            layer=before[0] if before else None,
        )

    @property
    def _batch(self) -> int:
        leaves = jax.tree.leaves(self._x)
        return max(1, leaves[0].shape[0]) if leaves and leaves[0].shape else 1

    def _count(self, paths: Any) -> int:
        return sum(int(np.prod(self._avals[p].shape)) for p in paths if p not in self.statistics)

    def _flops(self, equations: Any) -> int:
        return sum(self._reference.flops(i) for i in equations) // self._batch

    def _check_depth(self, depth: Any, argument: str) -> None:
        if isinstance(depth, bool) or not isinstance(depth, (int, np.integer)):
            raise TypeError(f"{argument} must be a whole number of layers; it was {depth!r}.")
        if not 0 <= depth <= self.depth:
            hint = f" Layers inside {self.opaque} cannot be reached." if self.opaque else ""
            raise ValueError(
                f"{argument} was {depth}; this network has {self.depth} layers from input to output, "
                f"so give 0 to {self.depth}.{hint}"
            )

    def _unknown(self, what: str, known: Sequence[str]) -> str:
        near = [n for n in known if any(part in n for part in what.split("'")[1].split("/"))]
        listed = (near or list(known))[:6]
        hint = "".join(f" It may lie inside the opaque {p} at {w}." for p, w in self.opaque[:1])
        return f"The network has no {what}; it has, among others, {listed}.{hint}"

    def _traced(self, named: Mapping[str, Any], x: PyTree) -> Traced:
        """The trace for these leaves and this input, from the cache or made now."""
        avals = [_abstract(named[p]) if p in named else self._avals[p] for p in self._avals]
        inputs, x_tree = jax.tree.flatten(jax.tree.map(_abstract, x))
        key = (x_tree, *map(_key, avals), *map(_key, inputs))
        with self._lock:
            found = self._cache.get(key)
        if found is not None:
            return found

        def flat(leaves: Sequence[Any], xs: Sequence[Any]) -> Any:
            variables = jax.tree.unflatten(self._treedef, leaves)
            return self._apply(variables, jax.tree.unflatten(x_tree, xs))

        # A network is what it is outside of any transformation: shapes alone decide the trace.
        closed, shape = jax.make_jaxpr(flat, return_shape=True)(avals, inputs)
        graph = _graph.flatten(closed, len(avals))
        traced = Traced(graph, list(self._avals), jax.tree.structure(shape))
        reference = next(iter(self._cache.values()), None)
        if reference is not None and reference.signature != traced.signature:
            raise ValueError(
                "apply_fn is another network at this input: its layers or norms differ from those of "
                f"the first trace (x was {self._x}, is {jax.tree.map(_abstract, x)}). Trace it anew."
            )
        with self._lock:
            self._cache[key] = traced
        return traced

    def _inputs(self, variables: PyTree, x: PyTree, start: int | None) -> tuple[Traced, dict]:
        named, _ = _tree.flatten_named(variables)
        unknown = [p for p in named if p not in self._avals]
        if unknown:
            raise ValueError(
                f"variables has leaves {unknown[:3]} that the traced network has not; pass a tree of "
                "the structure that was traced."
            )
        if start is None:
            missing = [p for p in self._avals if p not in named]
            traced = self._traced(named, x)
            env = dict(zip(traced.graph.inputs[len(self._avals) :], jax.tree.leaves(x)))
        else:
            self._check_depth(start, "start")
            if not isinstance(x, Crossing) or x.depth != start:
                found = f"a cut at {x.depth}" if isinstance(x, Crossing) else type(x).__name__
                raise ValueError(
                    f"start={start} takes the Crossing that run(..., stop={start}) returns in place "
                    f"of x; it was {found}."
                )
            traced = self._traced_for(named, x)
            missing = [p for p in self.trunk_leaves(start) if p not in named]
            env = dict(zip(traced.cut(start).crossing, x.values, strict=True))
        for value, path in zip(traced.graph.inputs, self._avals, strict=False):
            if path in named:
                env[value] = named[path]
        if missing and start is not None:
            raise ValueError(f"variables lacks {missing[:3]}, which the trunk reads.")
        return traced, env

    def _traced_for(self, named: Mapping[str, Any], crossing: Crossing) -> Traced:
        """The trace whose crossing has these shapes: of the reference input, at some batch size."""
        sizes = {v.shape[0] for v in crossing.values if v.ndim} | {self._batch}
        for size in sizes:
            x = jax.tree.map(
                lambda a, n=size: jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype), self._x
            )
            traced = self._traced(named, x)
            ids = traced.cut(crossing.depth).crossing
            shapes = [traced.graph.avals[v].shape for v in ids]
            if shapes == [v.shape for v in crossing.values]:
                return traced
        raise ValueError(
            f"The crossing's shapes {[v.shape for v in crossing.values]} belong to no batch of the "
            f"traced input {self._x}; slice crossings along axis 0 only."
        )


class _Plan:
    """Sites of one run, resolved to values and equations of one trace."""

    def __init__(
        self,
        net: Network,
        traced: Traced,
        capture: Sequence[str],
        edit: Mapping[str, Edit],
        stop: int | None,
        start: int | None,
    ) -> None:
        if isinstance(capture, str):
            raise TypeError(f"capture must be a sequence of site names; it was the string {capture!r}.")
        self.net, self.traced, self.capture = net, traced, tuple(capture)
        self.edits: dict[int, Edit] = {}
        self.operand_edits: dict[tuple[int, int], Edit] = {}
        self.seen: dict[str, Any] = {}
        self._output = edit.get("output")
        self._where: dict[str, int] = {}
        for site in dict.fromkeys([*edit, *self.capture]):
            if site in ("output",):
                if stop is not None:
                    raise ValueError(f"Site 'output' lies in the trunk; stop={stop} ends before it.")
                continue
            value, equation = self.locate(site)
            self._check_side(site, value, equation, stop, start)
            change = _checked(edit[site], site) if site in edit else None
            if equation is None:
                if change is not None:
                    self.edits[value] = change
                self._where[site] = value
            elif change is not None:
                self.operand_edits[equation, 0] = functools.partial(self._record, site, change)
            else:
                self._where[site] = value
        # Values that a run must make for the sake of a capture alone.
        self.values = [self._where[s] for s in self.capture if s in self._where]
        for site in self.capture:
            if site in edit and site not in self._where and site != "output":
                equation = self.locate(site)[1]
                self.values.append(traced.graph.equations[equation].outputs[0])

    def locate(self, site: str) -> tuple[int, int | None]:
        """Id of the value at a site; and the one equation that reads it, where the site is that use."""
        traced = self.traced
        if site == "input":
            ids = traced.graph.inputs[traced.graph.num_leaves :]
            if len(ids) != 1:
                raise ValueError("Site 'input' needs an x that is a single array.")
            return ids[0], None
        if site in traced.layers:
            return traced.layers[site].preactivation, None
        if site.endswith(":act") and site[:-4] in traced.layers:
            return traced.taps[site[:-4]], None
        if site.endswith(":in") and site[:-3] in traced.norms:
            index = traced.norms[site[:-3]].index
            return traced.graph.equations[index].inputs[0], index
        known = [*traced.layers, *(f"{n}:in" for n in traced.norms), "input", "output"]
        raise ValueError(self.net._unknown(f"site '{site}'", known))

    def _check_side(
        self, site: str, value: int, equation: int | None, stop: int | None, start: int | None
    ) -> None:
        depth = stop if stop is not None else start
        if depth is None:
            return
        cut = self.traced.cut(depth)
        index = equation if equation is not None else self.traced.graph.producer.get(value)
        inside = index is None or index in cut.stem
        if stop is not None and not inside:
            raise ValueError(f"Site '{site}' lies in the trunk; stop={stop} ends before it.")
        if start is not None and inside and value not in cut.crossing:
            raise ValueError(f"Site '{site}' lies in the stem; start={start} begins after it.")

    def _record(self, site: str, change: Edit, value: Array) -> Array:
        self.seen[site] = change(value)
        return self.seen[site]

    def finish(self, out: Any) -> Any:
        return out if self._output is None else _checked(self._output, "output")(out)

    def captured(self, values: Mapping[int, Any], out: Any, x: Any) -> dict[str, Any]:
        found = {}
        for site in self.capture:
            if site == "output":
                found[site] = out
            else:
                found[site] = self.seen[site] if site in self.seen else values[self._where[site]]
        return found


def _checked(change: Edit, site: str) -> Edit:
    def checked(value: Array) -> Array:
        new = change(value)
        before = [(a.shape, a.dtype) for a in jax.tree.leaves(value)]
        after = [(jnp.shape(a), jnp.result_type(a)) for a in jax.tree.leaves(new)]
        if before != after:
            raise ValueError(
                f"edit['{site}'] must keep shape and dtype; it made {after} of {before}. Cast back "
                "with `.astype(value.dtype)`."
            )
        return new

    return checked


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    aval = jax.typeof(leaf)
    sharding = getattr(aval, "sharding", None)
    if sharding is not None and sharding.mesh.empty:
        sharding = None
    weak = getattr(aval, "weak_type", False)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding, weak_type=weak)


def _key(leaf: Any) -> Hashable:
    return (leaf.shape, leaf.dtype, leaf.weak_type, leaf.sharding)


def _explain_no_layers(traced: Traced) -> None:
    graph = traced.graph
    for equation in graph.equations:
        if equation.primitive in _graph.LINEAR and any(
            isinstance(v, int) and not graph.depends[v] for v in equation.inputs[:2]
        ):
            shapes = [v.aval.shape for v in equation.eqn.invars[:2]]
            raise ValueError(
                f"No layer reads variables, yet {equation.primitive} of {shapes} at {equation.where} "
                "reads a constant: the weights are closed over. Pass them: "
                "`apply_fn = lambda variables, x: ...`."
            )


__all__ = ["Crossing", "FoldError", "Layer", "Network", "Norm", "Tap", "trace"]
