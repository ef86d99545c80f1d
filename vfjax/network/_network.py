"""`trace`, and the `Network` that it returns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vfjax._analysis import (
    from_propagation,
    report_missing_layers,
    report_statistics,
    report_training,
)
from vfjax._deprecated import OldName
from vfjax._passes import Owner
from vfjax._trees import flatten_named
from vfjax._trees.concrete import check_values
from vfjax._types import Array, PyTree
from vfjax.network import _cost, _fold, _retrace, _run, _sites, _summary
from vfjax.network._checks import (
    check_depth,
    check_part,
    named_leaves,
)
from vfjax.network._crossing import Crossing, average, mapped, mapped_value
from vfjax.network._misuse import check_layers
from vfjax.network._records import (
    JointTap,
    Layer,
    Norm,
    Tap,
    describe_joint_taps,
    describe_layer,
    describe_norm,
    describe_taps,
)
from vfjax.network._run import Edit
from vfjax.symmetry._group_maps import as_array, check_by_group, check_permutations
from vfjax.symmetry._places import Place
from vfjax.symmetry._spec import PermutationSpec


def trace(apply_fn: Callable[[PyTree, PyTree], PyTree], variables: PyTree, x: PyTree) -> Network:
    """Reads a network's layers, norms and symmetries off its jaxpr.

    Args:
        apply_fn: A pure function `(variables, x) -> output`, in evaluation mode (no dropout).
        variables: Its parameters and stored statistics: a pytree of arrays, or of
            `jax.ShapeDtypeStruct`s, since only shapes and dtypes matter.
        x: An example input, of the same kinds of leaves; axis 0 of every leaf is the batch.

    Returns:
        The network. It holds no parameters.

    Raises:
        TypeError: If `apply_fn` cannot be called, or a leaf is not an array (an unpartitioned
            Equinox module).
        ValueError: If the weights are closed over instead of passed in `variables`, `apply_fn`
            raises a KeyError (if it looks up a key that the trees do not have, say), a kernel's
            path is `input` or `output`, which name the network's ends, a kernel has no entries, or
            `x` has no examples or a symbolic size.
        Exception: Whatever else `apply_fn` raises, with a note on what it was called with.

    Warns:
        UserWarning: If the network has no layers, some weights are closed over, leaves are
            subtracted from activations or divide them outside of any norm that is recognised,
            `apply_fn` looks like a network in training mode, or `x` like a single example without
            its batch axis.

    Example:
        >>> import jax, jax.numpy as jnp, vfjax
        >>> model = vfjax.models.MLP((8,), classes=2)
        >>> x = jax.ShapeDtypeStruct((5, 3), jnp.float32)
        >>> v = jax.eval_shape(model.init, jax.random.key(0), x)
        >>> [(layer.bias, layer.shape) for layer in vfjax.trace(model.apply, v, x).layers]
        [('params/dense1/bias', (3, 8)), ('params/head/bias', (8, 2))]
    """
    return Network(apply_fn, variables, x)


class Network(Owner):
    """A traced network, made by `trace`: its records, and methods to run, cut and fold it.

    It is hashable by identity, static in pytrees, and not saved in checkpoints.

    Example:
        >>> import jax, jax.numpy as jnp, vfjax
        >>> p, x = {"w0": jnp.ones((3, 8)), "w1": jnp.ones((8, 2))}, jnp.ones((5, 3))
        >>> net = vfjax.trace(lambda p, x: jax.nn.relu(x @ p["w0"]) @ p["w1"], p, x)
        >>> net
        Network(2 layers, depth 2, 40 parameters, 1 groups)
        >>> net.layer("w1").depth, net.flops, net.paths
        (2, 48, ('w0', 'w1'))

        Cut at depth 1, the stem hands the pre-activation of `w0` to the trunk:

        >>> sorted(net.stem_leaves(1)), net.stem_params(1), net.trunk_flops(1)
        (['w0'], 24, 24)
        >>> [(aval.shape, set(groups)) for aval, groups in net.crossing(1)]
        [((5, 8), {'w0'})]
        >>> [(net.in_stem(site, 1), net.crosses(site, 1)) for site in ("input", "w0", "w1")]
        [(True, False), (True, True), (False, False)]
        >>> crossing = net.run(p, x, stop=1)
        >>> bool((net.run(p, crossing, start=1) == net.run(p, x)).all())
        True

        Without a bias, a layer cannot absorb a shift:

        >>> net.can_fold("w0"), net.can_fold("w0", shift=False)
        (False, True)
    """

    def __init__(self, apply_fn: Callable[..., Any], variables: PyTree, x: PyTree) -> None:
        """See `trace`."""
        if not callable(apply_fn):
            raise TypeError(
                f"apply_fn must be a function (variables, x) -> output; it was a "
                f"{type(apply_fn).__name__}. For a Flax module, pass `model.apply`."
                + " The order is vfjax.trace(apply_fn, variables, x)."
                * (callable(variables) or callable(x))
            )
        self._traces = _retrace.Retracer(apply_fn, variables, x)
        self._reference = self._traces.reference
        taken = next((name for name in self._reference.layers if name in ("input", "output")), None)
        if taken is not None:
            raise ValueError(
                f"the kernel '{taken}' would name a layer like the site '{taken}' of the network "
                f"itself: rename it, or put it into a dict, {{'{taken}': {{'kernel': ...}}}}"
            )
        report_missing_layers(self._reference)
        report_statistics(self._reference)
        report_training(self._reference.graph)
        check_layers(self._reference, self.x)

    def __repr__(self) -> str:
        """Size and depth at a glance."""
        return (
            f"Network({len(self.layers)} layers, depth {self.depth}, {self.params:,} "
            f"parameters, {len(self.spec.groups)} groups)"
        )

    # -------------------------------------------------------------------------------------- records

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all leaves of the variables."""
        return tuple(self._traces.avals)

    @functools.cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The linear and convolution layers, in the order of evaluation."""
        return tuple(
            describe_layer(
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
        return tuple(describe_norm(self._reference, n) for n in self._reference.norms)

    @property
    def unrecognised(self) -> tuple[tuple[str, str, str], ...]:
        """Leaves that act on activations as stored statistics do, but belong to none of `norms`.

        `(path, "subtracts from" or "divides", file:line)` of those with several entries. Nothing
        renews them.
        """
        return self._reference.unrecognised

    @functools.cached_property
    def _propagation(self) -> Any:
        return self._reference.propagation

    @functools.cached_property
    def _symmetry(self) -> tuple[PermutationSpec, dict[int, str]]:
        return from_propagation(self._propagation, self.paths, self._reference.effects)

    @property
    def spec(self) -> PermutationSpec:
        """Groups of axes that can be permuted together without changing the function."""
        return self._symmetry[0]

    @functools.cached_property
    def taps(self) -> tuple[Tap, ...]:
        """Where each group shows: one record per tap and group, each value once."""
        return describe_taps(self._reference, axes=self._propagation.axes, groups=self._symmetry[1])

    @functools.cached_property
    def joint_taps(self) -> tuple[JointTap, ...]:
        """Where groups show inside the entries of the groups that they are within."""
        return describe_joint_taps(self._reference, self.spec.within)

    @functools.cached_property
    def sites(self) -> Mapping[str, _sites.Site]:
        """Every site by its name; `vfjax.stats.resolve_sites` explains the names."""
        return _sites.sites_of(self)

    @property
    def depth(self) -> int:
        """L, the number of layers on the longest path from input to output."""
        return self._reference.depth

    @functools.cached_property
    def statistics(self) -> frozenset[str]:
        """Paths of the stored statistics of norms, which do not count as parameters."""
        return frozenset(p for norm in self.norms for p in (norm.mean, norm.var))

    @property
    def params(self) -> int:
        """Number of parameters, not counting stored statistics."""
        return _cost.params_of(self, self.paths)

    parameters = OldName("params")
    stem_parameters, trunk_parameters = OldName("stem_params"), OldName("trunk_params")

    @functools.cached_property
    def flops(self) -> int:
        """Operations per example: see `Layer.flops`, plus norms, activations and pools.

        The paper's tool counts modules, which leaves out functional ReLUs: 41.21 million for
        ResNet20, which has 41.4 million here.
        """
        return _cost.flops_of(self, range(len(self._reference.graph.equations)))

    @property
    def x(self) -> PyTree:
        """The traced input: `jax.ShapeDtypeStruct`s, batch axis first."""
        return self._traces.x

    @functools.cached_property
    def residual(self) -> bool:
        """Whether the network has a residual join: a sum of values that follow different layers."""
        return self._reference.joins

    @property
    def opaque(self) -> tuple[tuple[str, str], ...]:
        """Primitives that hold linear equations and were kept whole: (primitive, file:line)."""
        return self._reference.opaque

    @property
    def others(self) -> tuple[tuple[str, str, str], ...]:
        """Leaves that act outside of layers, norms and biases: (path, primitive, file:line).

        Examples are embeddings, layer scales and gates. Permutations follow them, corrections and
        the removal of biases do not. A leaf that is itself an output is listed under `output`.
        """
        return self._reference.others

    def summary(self) -> str:
        """A table of layer, depth, shapes, parameters, FLOPs and group.

        Returns:
            Text of several lines; notes below the table list what could not be followed.
        """
        return _summary.summary(self)

    def layer(self, name: str) -> Layer:
        """The layer with a given name.

        Args:
            name: As in `Layer.name`.

        Returns:
            Its record.

        Raises:
            ValueError: If there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise ValueError(_sites.no_layer(self, name))

    def norm(self, name: str) -> Norm:
        """The norm with a given name.

        Args:
            name: As in `Norm.name`: the path of its leaf of means.

        Returns:
            Its record.

        Raises:
            ValueError: If there is none.
        """
        for norm in self.norms:
            if norm.name == name:
                return norm
        raise ValueError(_sites.unknown(self, "norm", name, [x.name for x in self.norms]))

    # ----------------------------------------------------------------------------------- evaluation

    def run(
        self,
        variables: PyTree,
        x: PyTree,
        *,
        capture: Iterable[str] | None = None,
        edit: Mapping[str, Edit] | None = None,
        stop: int | None = None,
        start: int | None = None,
    ) -> Any:
        """Evaluates the network, or one side of a cut, with values read or replaced at named sites.

        Sites are named as in `vfjax.stats.resolve_sites`; whole values are read, not parts of taps.
        An edit at `<layer>:in` or `<norm>:in` affects that layer or norm only; any other affects
        everything that reads the value. `jit`, `vmap` and `grad` work.

        The stem of a cut at depth l computes the pre-activations of the first l layers of the
        longest path; and those of a branch, which no layer of a longer path reads, except for its
        last L - l layers, where L is `depth`. So at l = L it computes all layers. A shortcut goes
        with the first layer that reads it.

        Args:
            variables: Parameters; leaves that the requested side does not read may be None.
            x: The input, or with `start` a `Crossing`.
            capture: Sites whose values to return, after their edits.
            edit: By site, a function from the value to one of equal shape and dtype. It may append
                statistics to a list that it closes over.
            stop: Depth to stop at: returns the `Crossing` there.
            start: Depth to start from; with `stop`, only the part between runs.

        Returns:
            The output (or the `Crossing`); with `capture`, a pair of it and a dict by site.

        Raises:
            TypeError: If `stop` or `start` is not a whole number, `capture` is not a sequence of
                names, `edit` is not a mapping to functions, or a leaf is not an array.
            ValueError: If a site does not exist or lies on the other side, a depth is out of
                range, `stop` is less than `start`, `x` is not the `Crossing` that `start` takes,
                the tree has leaves that were not traced or lacks one that is read, `apply_fn` has
                other layers at this input, or an edit changes shape or dtype.

        Example:
            >>> import jax, jax.numpy as jnp, vfjax
            >>> p = {"w0": jnp.eye(2), "w1": jnp.ones((2, 1))}
            >>> x = jnp.array([[1.0, -2.0]])
            >>> net = vfjax.trace(lambda p, x: jax.nn.relu(x @ p["w0"]) @ p["w1"], p, x)
            >>> out, values = net.run(p, x, capture=["w0:act"], edit={"w0": jnp.negative})
            >>> out.tolist(), values["w0:act"].tolist()
            ([[2.0]], [[0.0, 2.0]])
        """
        return _run.run(self, variables, x, capture, edit, stop, start)

    def average_crossings(
        self, crossings: Iterable[Crossing], weights: Sequence[Any] | None = None
    ) -> Crossing:
        """Averages the values that several stems hand to one trunk.

        Values that depend on parameters are averaged (in float32 or better, then cast back); values
        of the input alone are equal in all stems and passed on.

        Args:
            crossings: One per model, all of one cut and one input.
            weights: One per model, summing to one; None for 1/K.

        Returns:
            A crossing like each of them.

        Raises:
            TypeError: If `weights` is not a flat sequence.
            ValueError: If there are no crossings, they are of different cuts or inputs, the weights
                do not fit or do not sum to one, or a value that would have to be averaged is an
                integer or boolean.

        Example:
            >>> import jax.numpy as jnp, vfjax
            >>> trees, x = [{"w": jnp.eye(2)}, {"w": 3 * jnp.eye(2)}], jnp.ones((1, 2))
            >>> net = vfjax.trace(lambda p, x: x @ p["w"], trees[0], x)
            >>> stems = [net.run(tree, x, stop=1) for tree in trees]
            >>> net.average_crossings(stems, (0.75, 0.25)).values[0].tolist()
            [[1.5, 1.5]]
        """
        crossings = tuple(crossings)
        if not crossings:
            raise ValueError("crossings is empty; give one per model.")
        return average(crossings, self._reference.cut(crossings[0].depth).averaged, weights)

    def map_crossing(
        self, variables: PyTree, crossing: Crossing, maps: Mapping[str, Any]
    ) -> Crossing:
        """Maps the values that cross a cut, along the axes that carry groups.

        A merge matrix takes a model's features to the basis of the merge; an unmerge matrix takes
        merged features back to the model's basis.

        Args:
            variables: The leaves that the crossing was computed with; only their types matter.
            crossing: The crossing.
            maps: By group a matrix `[m, n]`, applied in float32 or better, or a permutation
                `int[n]`, by indexing (`take(old, p)`). Other groups stay as they are.

        Returns:
            A crossing with m entries in place of n.

        Raises:
            TypeError: If `maps` is not a mapping, or a map does not hold numbers.
            ValueError: If a group is unknown, a map does not fit its group, an array of integers is
                no permutation, or a matrix would map a value of integers.

        Example:
            >>> import jax.numpy as jnp, vfjax
            >>> p, x = {"w": jnp.eye(2), "v": jnp.eye(2)}, jnp.array([[1.0, 3.0]])
            >>> net = vfjax.trace(lambda p, x: x @ p["w"] @ p["v"], p, x)
            >>> crossing = net.run(p, x, stop=1)
            >>> net.map_crossing(p, crossing, {"w": jnp.array([[0.5, 0.5]])}).values[0].tolist()
            [[2.0]]
        """
        check_by_group("maps", maps)
        if not maps:
            return crossing
        self.spec.check_known("maps", maps)
        maps = {group: as_array(given) for group, given in maps.items()}
        check_permutations(
            {group: p for group, p in maps.items() if np.issubdtype(p.dtype, np.integer)},
            self.spec.sizes,
            self.spec.within,
        )
        traced = self._traces.at_crossing(named_leaves(self, variables), crossing)
        places = [traced.places(v) for v in traced.cut(crossing.depth).crossing]
        return mapped(crossing, places, maps)

    def map_site(
        self, variables: PyTree, x: PyTree, site: str, value: Array, maps: Mapping[str, Any]
    ) -> Array:
        """Maps the value of a site along the axes that carry groups, as `map_crossing` does.

        Args:
            variables: The leaves that the value was computed with; only their types matter.
            x: The input; only its type matters.
            site: Name of the site, as in `run`; `output` and an `input` of several arrays carry no
                groups.
            value: The value.
            maps: By group a matrix `[m, n]` or a permutation `int[n]`.

        Returns:
            The value in the basis that the maps lead to.

        Raises:
            ValueError: If there is no such site, or a matrix does not fit its group.
        """
        if site in ("input", "output"):
            return value
        traced = self._traces.at(named_leaves(self, variables), x)
        return mapped_value(value, traced.places(_sites.locate(self, traced, site)[0]), maps)

    # ------------------------------------------------------------------------------- sides of a cut

    def stem_leaves(self, depth: int) -> frozenset[str]:
        """Paths of the leaves that the stem of a cut reads.

        Args:
            depth: Depth of the cut, from 0 to `net.depth`.

        Raises:
            TypeError: If `depth` is not a whole number.
            ValueError: If it is out of range.
        """
        check_depth(self, depth, "depth")
        return self._leaves(None, depth)

    def trunk_leaves(self, depth: int, stop: int | None = None) -> frozenset[str]:
        """Paths of the leaves that the trunk of a cut reads.

        Args:
            depth: Depth of the cut, from 0 to `net.depth`.
            stop: Depth of a second cut at which the trunk ends; None for the output.

        Raises:
            TypeError: If a depth is not a whole number.
            ValueError: If it is out of range, or `stop` is less than `depth`.
        """
        check_depth(self, depth, "depth")
        return self._leaves(depth, stop)

    def head_leaves(self, start: int, end: int | None) -> frozenset[str]:
        """Paths of the leaves that only heads read, and neither stems nor the trunk.

        Args:
            start: Depth at which the trunk begins, from 0 to `net.depth`.
            end: Depth at which heads begin; None if there are no heads.
        """
        if end is None:
            return frozenset()
        shared = self.trunk_leaves(start, end) | self.stem_leaves(start)
        return self.trunk_leaves(end) - shared

    def leaves(self, paths: Iterable[str]) -> dict[str, Any]:
        """Abstract values of leaves of the variables, by path."""
        return {path: self._traces.avals[path] for path in paths}

    def stem_params(self, depth: int) -> int:
        """Number of parameters that the stem of a cut reads; see `stem_leaves`."""
        return _cost.params_of(self, self.stem_leaves(depth))

    def trunk_params(self, depth: int, stop: int | None = None) -> int:
        """Number of parameters that the trunk of a cut reads; see `trunk_leaves`."""
        return _cost.params_of(self, self.trunk_leaves(depth, stop))

    def stem_flops(self, depth: int) -> int:
        """Operations per example of the stem of a cut, counted as in `flops`."""
        check_depth(self, depth, "depth")
        return _cost.flops_of(self, self._reference.part(None, depth))

    def trunk_flops(self, depth: int, stop: int | None = None) -> int:
        """Operations per example of the trunk of a cut, counted as in `flops`."""
        check_depth(self, depth, "depth")
        check_part(self, depth, stop)
        return _cost.flops_of(self, self._reference.part(depth, stop))

    def _leaves(self, start: int | None, stop: int | None) -> frozenset[str]:
        check_part(self, start, stop)
        traced = self._reference
        return traced.leaves_of(traced.part(start, stop), traced.ends(stop))

    def crossing(self, depth: int) -> tuple[tuple[Any, frozenset[str]], ...]:
        """For each value that crosses a cut, its abstract value and the groups along its axes.

        Args:
            depth: Depth of the cut, from 0 to `net.depth`.

        Raises:
            TypeError: If `depth` is not a whole number.
            ValueError: If it is out of range.
        """
        check_depth(self, depth, "depth")
        traced = self._reference
        return tuple(
            (traced.graph.avals[v], frozenset(place.group for place in traced.places(v)))
            for v in traced.cut(depth).crossing
        )

    def places(self, site: str) -> tuple[Place, ...]:
        """The groups along the axes of a site's value, each with its place there.

        Args:
            site: Name of a site that holds one array, as in `run`.

        Raises:
            ValueError: If the network has no such site, or it holds several arrays.
        """
        traced = self._reference
        return traced.places(_sites.locate(self, traced, site)[0])

    def in_stem(self, site: str, depth: int) -> bool:
        """Whether the value at a site is computed in the stem of a cut.

        Args:
            site: Name of a site, as in `run`.
            depth: Depth of the cut, from 0 to `net.depth`.

        Raises:
            TypeError: If `depth` is not a whole number.
            ValueError: If it is out of range, or the network has no such site.
        """
        check_depth(self, depth, "depth")
        return _sites.in_stem(self, self._reference, site, depth)

    def crosses(self, site: str, depth: int) -> bool:
        """Whether the value at a site is handed from the stem of a cut to its trunk.

        Args:
            site: Name of a site, as in `run`.
            depth: Depth of the cut, from 0 to `net.depth`.

        Raises:
            TypeError: If `depth` is not a whole number.
            ValueError: If it is out of range, or the network has no such site.
        """
        check_depth(self, depth, "depth")
        return _sites.crosses(self, self._reference, site, depth)

    # -------------------------------------------------------------------------------------- folding

    def can_fold(self, layer: str, *, shift: bool = True) -> bool:
        """Whether a correction of a layer's pre-activation can be folded into leaves.

        Args:
            layer: Name of the layer.
            shift: Whether the correction shifts, or only scales.

        Returns:
            Whether `fold` would succeed.

        Raises:
            ValueError: If there is no such layer.
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
            scale: Float array of shape `Layer.channel_shape`.
            shift: The same, or None for no shift.

        Returns:
            A new tree.

        Raises:
            FoldError: If the correction cannot be folded, or the leaf to fold it into is missing.
            TypeError: If a leaf is not an array.
            ValueError: If there is no such layer, or `scale` or `shift` has the wrong shape.

        Example:
            >>> import jax.numpy as jnp, vfjax
            >>> p = {"w": jnp.eye(2), "b": jnp.ones(2)}
            >>> net = vfjax.trace(lambda p, x: x @ p["w"] + p["b"], p, jnp.ones((1, 2)))
            >>> new = net.fold(p, "w", jnp.array([2.0, 3.0]), jnp.array([0.0, 1.0]))
            >>> new["w"].tolist(), new["b"].tolist()
            ([[2.0, 0.0], [0.0, 3.0]], [2.0, 4.0])
        """
        self.layer(layer)
        flat = flatten_named(variables)
        check_values("folding computes", variables=variables, scale=scale, shift=shift)
        return flat.put(_fold.fold(self._reference, flat.leaves, layer, scale, shift)).tree()
