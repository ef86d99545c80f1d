"""`Merged`: models apart, then one, then apart again, as a pytree that can be called."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vfjax._deprecated import OldName
from vfjax._types import Array, PyTree
from vfjax.merge import _cost, _saved
from vfjax.network._crossing import Crossing
from vfjax.network._network import Network
from vfjax.network._run import check_capture, check_edit

Edits = Mapping[str, Callable[[Array], Array]]

# By group, a matrix.
Matrices = Mapping[str, jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["stems", "trunk", "corrections", "heads", "merge", "unmerge"],
    meta_fields=["net", "cut", "weights", "end", "nets"],
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Merged:
    """Several models that share a range of layers, as `vfjax.merge.partial` returns them.

    Every model runs its own stem. The values that cross from the stems are mapped into the basis of
    the merge and averaged, and one averaged trunk follows. The values that cross from the trunk are
    mapped back into each model's own basis, where its head computes the output. Without heads, as
    `vfjax.merge.preserve_first` makes it, the trunk computes the output.

    A frozen pytree whose leaves are parameters: `model(x)`, `jax.jit(model)(x)`, `jax.grad`,
    `jax.jit(lambda m, x: m(x))(model, x)`, `jax.device_put` and `jax.tree.map` all work. Equality
    and hash are by identity.

    Attributes:
        stems: One tree per model with the leaves that its stem reads, and None in place of the
            others; empty at cut 0.
        trunk: The averaged tree, with None in place of leaves that the trunk does not read; at cut
            0 and without heads the whole tree. Variances that merging left unknown are None as
            well, until `vfjax.renorm.reset` measures them.
        corrections: `{layer name: (scale, shift)}`, float32 or better, shaped like the layer's
            channels: `z <- scale * z + shift` on its pre-activation (averaged, at the cut). Holds
            only corrections that could not be folded into leaves.
        net: The traced network, of the trunk (static).
        cut: Number of first layers that each model keeps, from 0 to `net.depth` (static).
        weights: The weights of the averages, one float per model (static).
        heads: One tree per model with the leaves that its head reads; empty without heads.
        merge: Per model, the matrices `[m, n]` of groups that cross into the trunk, float32; empty
            where no group is mapped. Permutations need no matrix: leaves are permuted beforehand.
        unmerge: Per model, the matrices `[n, m]` of groups that cross into the heads, float32.
        end: Depth of the last merged layer, where heads begin; None without heads (static).
        nets: One network per model where models have different ones (static); else empty.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> a, b = {"w0": jnp.eye(2), "w1": jnp.eye(2)}, {"w0": jnp.eye(2), "w1": 3 * jnp.eye(2)}
        >>> x = jnp.array([[1.0, 2.0]])
        >>> net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["w0"]) @ v["w1"], a, x)
        >>> model = vfjax.merge.preserve_first(net, [a, b], layers=1)
        >>> model
        Merged(cut=1 of 2, models=2, weights=(0.5, 0.5), params=12, flops=14, corrections=[])
        >>> jax.jit(model)(x).tolist()
        [[2.0, 4.0]]
    """

    stems: tuple[PyTree, ...]
    trunk: PyTree
    corrections: Mapping[str, tuple[Array, Array]]
    net: Network
    cut: int
    weights: tuple[float, ...]
    heads: tuple[PyTree, ...] = ()
    merge: tuple[Matrices, ...] = ()
    unmerge: tuple[Matrices, ...] = ()
    end: int | None = None
    nets: tuple[Network, ...] = ()

    # ---------------------------------------------------------------------------------- description

    @property
    def span(self) -> slice:
        """The merged layers, as a slice of the list of all layers by depth."""
        return slice(self.cut, self.net.depth if self.end is None else self.end)

    merged = OldName("span")

    def net_of(self, model: int) -> Network:
        """The network of a model's stem and head.

        Args:
            model: Its number.

        Returns:
            The model's own network where models have different ones, else the one they share.

        Example: see `run_head`.
        """
        return self.nets[model] if self.nets else self.net

    def apart(self, site: str) -> bool:
        """Whether a site lies inside stems or heads, where it has a value per model.

        Values that cross the cut are averaged, so the layers at the cut are not apart, and neither
        are values that cross into the heads.

        Args:
            site: Name of a site, as in `Network.run`.

        Raises:
            ValueError: If the network has no such site.

        Example:
            >>> import jax.numpy as jnp, vfjax
            >>> a = {"w0": jnp.eye(2), "w1": jnp.eye(2), "w2": jnp.eye(2)}
            >>> net = vfjax.trace(lambda v, x: x @ v["w0"] @ v["w1"] @ v["w2"], a, jnp.ones((1, 2)))
            >>> model = vfjax.merge.preserve_first(net, [a, a], layers=2)
            >>> [model.apart(site) for site in ("input", "w0", "w1", "w2")]
            [True, True, False, False]
        """
        return self.in_stems(site) or self.in_heads(site)

    def in_stems(self, site: str) -> bool:
        """Whether a site lies inside the stems, where it has a value per model.

        Args:
            site: Name of a site, as in `Network.run`.

        Returns:
            False for the layers at the cut, whose pre-activations are averaged.

        Raises:
            ValueError: If the network has no such site.

        Example: see `run_head`.
        """
        inside = self.net.in_stem(site, self.cut)  # at cut 0 too: it checks the name
        return self.cut > 0 and inside and not self.net.crosses(site, self.cut)

    def in_heads(self, site: str) -> bool:
        """Whether a site lies inside the heads, where it has a value per model.

        Args:
            site: Name of a site, as in `Network.run`.

        Returns:
            False without heads, and for the pre-activations of the last merged layers.

        Raises:
            ValueError: If there are heads, and the network has no such site.

        Example: see `run_head`.
        """
        return self.end is not None and not self.net.in_stem(site, self.end)

    @property
    def params(self) -> int:
        """Number of parameters of every stem, the trunk and every head.

        Running statistics are not parameters. Matrices at the cuts count, unless they only select
        units.
        """
        return _cost.params_of(self)

    parameters = OldName("params")

    @property
    def flops(self) -> int:
        """Multiply-accumulates per example of every stem, the trunk and every head.

        Matrices at the cuts count, unless they only select units.
        """
        return _cost.flops_of(self)

    def __repr__(self) -> str:
        """Cut, weights and cost in one line, without arrays."""
        heads = "" if self.end is None else f"heads after {self.end}, "
        maps = sorted({group for of in (*self.merge, *self.unmerge) for group in of})
        return (
            f"Merged(cut={self.cut} of {self.net.depth}, {heads}models={len(self.weights)}, "
            f"weights={self.weights}, params={self.params}, flops={self.flops}, "
            f"corrections={list(self.corrections)}{f', mapped={maps}' if maps else ''})"
        )

    # ----------------------------------------------------------------------------------- evaluation

    def __call__(self, x: PyTree) -> PyTree:
        """Evaluates the model on a batch x, as the traced `apply_fn` would.

        With heads, the result is a tuple of their outputs, one per model.
        """
        return self.run(x)

    def run(
        self,
        x: PyTree,
        *,
        capture: Sequence[str] | None = None,
        edit: Edits | None = None,
    ) -> PyTree:
        """Evaluates the model; reads or replaces values of trunk and heads, as `Network.run`.

        Args:
            x: A batch, or the `Crossing` that `crossing` made of one.
            capture: Names of sites to return: of the trunk (or the layers at the cut, whose
                pre-activation is the average over the stems), or of the heads.
            edit: `{site: function}`. A correction at the same site is applied first. An edit at a
                site of the heads applies to each of them.

        Returns:
            The output, or with `capture` the pair `(output, {name: value})`. With heads, the output
            and values captured inside the heads are tuples with one value per model.

        Raises:
            TypeError: If `capture` is not a sequence of names, or `edit` is not a mapping to
                functions.
            ValueError: If a site does not exist or lies inside the stems, x is neither a batch of
                the traced network nor a `Crossing` of this cut, an edit changes shape or dtype, or
                a variance is unknown.

        Example:
            >>> import jax.numpy as jnp, vfjax
            >>> a, b = {"w": jnp.eye(2)}, {"w": 3 * jnp.eye(2)}
            >>> x = jnp.array([[1.0, 2.0]])
            >>> net = vfjax.trace(lambda v, x: x @ v["w"], a, x)
            >>> model = vfjax.merge.preserve_first(net, [a, b], layers=1)
            >>> out, values = model.run(x, capture=["w"], edit={"w": lambda z: -z})
            >>> out.tolist(), values["w"].tolist()
            ([[-2.0, -4.0]], [[-2.0, -4.0]])
        """
        check_edit(edit)
        edit, sites = dict(edit or {}), check_capture(self.net, capture)
        inside = [site for site in sites if self.in_heads(site)]
        changes = {site: change for site, change in edit.items() if self.in_heads(site)}
        out, captured = self.run_trunk(
            x,
            capture=[site for site in sites if site not in inside],
            edit={site: change for site, change in edit.items() if site not in changes},
        )
        if self.heads:
            runs = [
                self.run_head(k, out, capture=inside, edit=changes) for k in range(len(self.heads))
            ]
            out = tuple(end for end, _ in runs)
            captured |= {site: tuple(values[site] for _, values in runs) for site in inside}
        return out if capture is None else (out, {site: captured[site] for site in sites})

    def run_trunk(
        self, x: PyTree, *, capture: Sequence[str] = (), edit: Edits | None = None
    ) -> tuple[PyTree, dict[str, Array]]:
        """Evaluates stems and trunk: returns the output or, with heads, the crossing into them.

        Args:
            x: A batch, or a `Crossing` at the cut.
            capture: Sites of the trunk.
            edit: By site of the trunk, a function; corrections come first.

        Returns:
            The output, or the `Crossing` in the basis of the merge; and the captured values.

        Example: see `run_head`.
        """
        edit = dict(edit or {})
        for name, (scale, shift) in self.corrections.items():
            edit[name] = _chain(self.net.layer(name).affine(scale, shift), edit.get(name))
        if self.cut > 0 and not isinstance(x, Crossing):
            x = self.crossing(x)
        return self.net.run(
            self.trunk, x, capture=capture, edit=edit, start=self.cut or None, stop=self.end
        )

    def run_head(
        self,
        model: int,
        crossing: Crossing,
        *,
        capture: Sequence[str] = (),
        edit: Edits | None = None,
    ) -> tuple[PyTree, dict[str, Array]]:
        """Evaluates one head on the crossing from the trunk.

        Args:
            model: Number of the model whose head it is.
            crossing: The crossing that `run_trunk` returned.
            capture: Sites of the head.
            edit: By site of the head, a function.

        Returns:
            The model's output, and the captured values.

        Example:
            >>> import jax.numpy as jnp, vfjax
            >>> tree, x = {"w": jnp.eye(2), "v": jnp.ones((2, 1))}, jnp.array([[1.0, 2.0]])
            >>> net = vfjax.trace(lambda v, x: abs(x @ v["w"]) @ v["v"], tree, x)
            >>> model = vfjax.merge.partial(net, [tree, tree], span=slice(None, 1))
            >>> crossing, values = model.run_trunk(x, capture=["w"])
            >>> crossing.values[0].tolist(), values["w"].tolist()
            ([[1.0, 2.0]], [[1.0, 2.0]])
            >>> model.run_head(1, crossing)[0].tolist(), model.net_of(1) is net
            ([[3.0]], True)
            >>> [model.in_stems(site) for site in ("w", "v")]
            [False, False]
            >>> [model.in_heads(site) for site in ("w", "v")]
            [False, True]
        """
        if self.unmerge:
            crossing = self.net.map_crossing(self.trunk, crossing, self.unmerge[model])
        return self.net_of(model).run(
            self.heads[model], crossing, capture=capture, edit=edit, start=self.end
        )

    def read(self, x: PyTree, sites: Sequence[str]) -> tuple[PyTree, dict[str, tuple[Any, ...]]]:
        """Evaluates the model and reads values at any sites, even inside the stems.

        Args:
            x: A batch.
            sites: Names of sites.

        Returns:
            The output, and a tuple for every site: with one value per model where the site is
            `apart`, with a single value elsewhere.

        Raises:
            TypeError: If `sites` is not a sequence of names.
            ValueError: If a site does not exist, or x is not a batch of the traced network.

        Example:
            >>> import jax.numpy as jnp, vfjax
            >>> a = {"w0": jnp.eye(2), "w1": jnp.eye(2)}
            >>> x = jnp.array([[1.0, 2.0]])
            >>> net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["w0"]) @ v["w1"], a, x)
            >>> model = vfjax.merge.preserve_first(net, [a, {**a, "w0": 3 * a["w0"]}], layers=2)
            >>> out, values = model.read(x, ["w0", "w1"])
            >>> [[value.tolist() for value in values[site]] for site in ("w0", "w1")]
            [[[[1.0, 2.0]], [[3.0, 6.0]]], [[[2.0, 4.0]]]]
        """
        sites = check_capture(self.net, sites)
        inside = [site for site in sites if self.in_stems(site)]
        runs = [
            self.net_of(k).run(stem, x, capture=inside, stop=self.cut)
            for k, stem in enumerate(self.stems)
        ]
        if self.cut > 0:
            x = self._join([end for end, _ in runs])
        out, others = self.run(x, capture=[site for site in sites if site not in inside])
        return out, {
            site: tuple(values[site] for _, values in runs)
            if site in inside
            else others[site]
            if self.in_heads(site)
            else (others[site],)
            for site in sites
        }

    def crossing(self, x: PyTree) -> Crossing:
        """Evaluates the stems on a batch and averages the values that cross the cut.

        Corrections at the cut are applied by `run`, so a crossing depends on the stems alone. It
        can be stored and given to `run`, or to `vfjax.renorm` as data, for every trunk that is
        tried behind the same stems.

        Args:
            x: A batch.

        Returns:
            The averaged crossing.

        Raises:
            ValueError: At cut 0, where nothing crosses.

        Example:
            >>> import jax.numpy as jnp, vfjax
            >>> a, b = {"w": jnp.eye(2)}, {"w": 3 * jnp.eye(2)}
            >>> x = jnp.array([[1.0, 2.0]])
            >>> net = vfjax.trace(lambda v, x: x @ v["w"], a, x)
            >>> model = vfjax.merge.preserve_first(net, [a, b], layers=1)
            >>> crossing = model.crossing(x)
            >>> crossing.values[0].tolist(), model.run(crossing).tolist()
            ([[2.0, 4.0]], [[2.0, 4.0]])
        """
        if self.cut == 0:
            raise ValueError("a model merged from its first layer on (cut 0) has no crossing")
        return self._join(
            [self.net_of(k).run(stem, x, stop=self.cut) for k, stem in enumerate(self.stems)]
        )

    def _join(self, crossings: Sequence[Crossing]) -> Crossing:
        """Averages the crossings from the stems, in the basis of the merge."""
        if self.merge:
            crossings = [
                self.net_of(k).map_crossing(self.stems[k], crossing, self.merge[k])
                for k, crossing in enumerate(crossings)
            ]
        return self.net.average_crossings(crossings, self.weights)

    # -------------------------------------------------------------------- compiled and stored

    @property
    def frame(self) -> Frame:
        """The model without arrays and weights: hashable, the key of a compilation."""
        return Frame(self.net, self.cut, self.end, self.nets)

    @property
    def arrays(self) -> Arrays:
        """The arrays, weights included: the traced argument of a compiled call of a `Frame`."""
        return Arrays(
            self.stems,
            self.trunk,
            dict(self.corrections),
            np.asarray(self.weights),
            self.heads,
            self.merge,
            self.unmerge,
        )

    def __checkpoint__(self) -> tuple[str, PyTree, dict[str, Any]]:
        """Returns (kind, arrays, JSON) for `vfjax.checkpoint.save`."""
        return "vfjax.merge.Merged", *_saved.take_apart(self)

    @classmethod
    def __from_checkpoint__(
        cls, tree: PyTree, meta: Mapping[str, Any], *, net: Network | Sequence[Network] | None
    ) -> Merged:
        """Rebuilds what `__checkpoint__` took apart."""
        return cls(**_saved.put_together(tree, meta, net))


class Arrays(NamedTuple):
    """The arrays of a `Merged`; weights are among them, though a `Merged` keeps these static."""

    stems: tuple[PyTree, ...]
    trunk: PyTree
    corrections: Mapping[str, tuple[Array, Array]]
    weights: Any
    heads: tuple[PyTree, ...]
    merge: tuple[Matrices, ...]
    unmerge: tuple[Matrices, ...]


class Frame(NamedTuple):
    """A `Merged` without its arrays: evaluates all models that differ only in these."""

    net: Network
    cut: int
    end: int | None = None
    nets: tuple[Network, ...] = ()

    def net_of(self, model: int) -> Network:
        """The network of a model's stem and head."""
        return self.nets[model] if self.nets else self.net

    def model(self, arrays: Arrays) -> Merged:
        """The model with given arrays."""
        return Merged(
            stems=arrays.stems,
            trunk=arrays.trunk,
            corrections=arrays.corrections,
            net=self.net,
            cut=self.cut,
            weights=tuple(arrays.weights),
            heads=arrays.heads,
            merge=arrays.merge,
            unmerge=arrays.unmerge,
            end=self.end,
            nets=self.nets,
        )

    def __call__(self, arrays: Arrays, x: PyTree) -> PyTree:
        """Evaluates the model with given arrays."""
        return self.model(arrays).run(x)


def _chain(first: Callable, second: Callable | None) -> Callable:
    return first if second is None else lambda z: second(first(z))
