"""How much of every layer's output the input causes: `f(x) - f(0)` at every site.

The offset of a layer is its value at the input 0, and its feature is what the input adds to that:
`f(x) = g(x) + h` with the offset `h = f(0)`. In networks that were averaged or
pruned, features shrink from layer to layer while offsets do not, until the biases decide the output
("Vanishing Feature: Diagnosing Model Merging and Beyond", Qu and Horvath).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._maps import Maps
from vfjax._passes import Mask, check_finite_means
from vfjax._passes.masking import check_valid, read_by
from vfjax._types import Array, PyTree
from vfjax.diagnose import _rows
from vfjax.diagnose._compared import Compared, carry, compared
from vfjax.diagnose._sites import FeatureSite, describe, resolve_sites, unique
from vfjax.merge._arguments import weights_for
from vfjax.merge._merged import Merged
from vfjax.network._checks import check_batch
from vfjax.network._network import Network
from vfjax.network._sites import Sites

_FIELDS = ("feature", "feature_std", "offset", "mean", "std", "variance", "dead")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[*_FIELDS, "references"],
    meta_fields=["sites", "depth", "shares"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """Features and offsets of K networks, by site; made by `features`.

    A pytree. All numbers are float32 or better, in the units of the site's values. Inside the stems
    and heads of a `Merged`, where a site exists once per model, each number is the weighted average
    over the models, so that layers which are kept apart count as they do in their own models. Where
    models differ in a site's shape, as at the outputs of heads with different classes, `mean` and
    `std` lack the site; the other numbers are present.

    Attributes:
        feature: `[K]`, `E ||f(x) - f(0)||_2`: the norm is over all axes of an example, the mean
            over examples.
        feature_std: `[K]`, standard deviation of that norm over examples.
        offset: `[K]`, `||f(0)||_2`; with a mask, the mean over examples.
        mean: `[K, *channels]`, mean of each channel over examples and positions; without sites at
            which models differ in their channels.
        std: `[K, *channels]`, standard deviation of each channel over examples and positions, as in
            `vfjax.stats.moments`; without the same sites.
        variance: `[K]`, `E ||f(x) - E f(x)||^2 / size`: the variance over examples, averaged over
            all units (channels and positions). Differences between positions alone do not count.
            Unlike the other numbers it is a square: for values below 1e-19 it is 0.
        dead: `[K]`, share of channels that do not vary over examples and positions: those that
            `vfjax.renorm.repair` does not scale (no variance, or below 1e-12 of the layer's
            largest).
        references: The same numbers for the R reference networks, or None.
        sites: Description of each site, in the order requested (static).
        depth: Depth of the network, L (static).
        shares: For each network, the weights of the references in their means; empty without
            references (static).

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> v = {"w": 2 * jnp.eye(2), "b": jnp.array([3.0, 4.0])}
        >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
        >>> net = vfjax.trace(lambda v, x: x @ v["w"] + v["b"], v, x)
        >>> measured = features(net, v, [x], sites="layers")
        >>> [getattr(measured, what)["w"].tolist() for what in ("feature", "offset", "ratio")]
        [[4.0], [5.0], [0.800000011920929]]
    """

    feature: dict[str, Array]
    feature_std: dict[str, Array]
    offset: dict[str, Array]
    mean: dict[str, Array]
    std: dict[str, Array]
    variance: dict[str, Array]
    dead: dict[str, Array]
    references: Features | None
    sites: tuple[FeatureSite, ...]
    depth: int
    shares: tuple[tuple[float, ...], ...] = ()

    @property
    def models(self) -> int:
        """Number of networks, K, without references."""
        return next(iter(self.feature.values())).shape[0]

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the references that all networks share; empty without references.

        Raises:
            ValueError: If networks have different weights; see `shares`.
        """
        if len(set(self.shares)) > 1:
            raise ValueError(f"networks have different weights of the references: {self.shares}")
        return self.shares[0] if self.shares else ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites, in order."""
        return tuple(site.name for site in self.sites)

    @property
    def feature_rms(self) -> dict[str, Array]:
        """Features as root mean squares over units instead of norms, `[K]` by site."""
        return self._per_unit(self.feature)

    @property
    def offset_rms(self) -> dict[str, Array]:
        """Offsets as root mean squares over units, `[K]` by site."""
        return self._per_unit(self.offset)

    @property
    def ratio(self) -> dict[str, Array]:
        """Feature over offset, `[K]` by site.

        Infinite where the offset is 0, as in a network without biases; NaN where both are.
        """
        return {name: self.feature[name] / self.offset[name] for name in self.names}

    @property
    def relative(self) -> dict[str, Array]:
        """Feature over the weighted mean of the references' features, `[K]` by site.

        The sequence of the paper's section on vanishing features, which `bound_sequence` bounds.
        NaN or infinite where all references' features are 0.

        Raises:
            ValueError: If there are no references.
        """
        return self._relative("feature")

    @property
    def variance_ratio(self) -> dict[str, Array]:
        """`variance` over the weighted mean of the references' variances, `[K]` by site.

        Variances are reduced by their mean over units, so this is also the ratio of the traces.
        NaN or infinite where all references' variances are 0.

        Raises:
            ValueError: If there are no references.
        """
        return self._relative("variance")

    def site(self, name: str) -> FeatureSite:
        """The description of a site.

        Raises:
            ValueError: If the record has no such site.
        """
        for site in self.sites:
            if site.name == name:
                return site
        raise ValueError(f"nothing was measured at '{name}'; sites are {list(self.names)}")

    def _per_unit(self, values: dict[str, Array]) -> dict[str, Array]:
        return {site.name: values[site.name] / np.sqrt(max(site.size, 1)) for site in self.sites}

    def _relative(self, what: str) -> dict[str, Array]:
        if self.references is None:
            raise ValueError(
                "there are no references to relate to: give the edge models, or the network before "
                "pruning, as features(..., references=[a, b])"
            )
        mine, others = getattr(self, what), getattr(self.references, what)

        def divided(name: str) -> Array:
            shares = jnp.asarray(self.shares, others[name].dtype)
            # Divided by an array: XLA would turn division by a scalar into multiplication by its
            # inverse, and a network relative to itself would not be exactly 1.
            return mine[name] / (shares * others[name][None]).sum(1)

        return {name: divided(name) for name in self.names}


def features(
    net: Network | Sequence[Network],
    variables: PyTree | Merged | Sequence[PyTree | Merged],
    data: Iterable[Any],
    *,
    references: Sequence[PyTree | Merged] = (),
    maps: Maps | None = None,
    weights: Sequence[float] | None = None,
    sites: Sites = "taps",
    mask: Mask | None = None,
) -> Features:
    """Measures what the input causes at every layer: `g(x) = f(x) - f(0)` against `f(0)`.

    The input 0 is the zero tensor that the network takes: the mean image if inputs are normalised,
    and zeros of their dtype for integer inputs. One forward pass of one example gives `f(0)`; one
    pass over the data gives everything else, in one compiled call per batch for all networks.
    Results do not depend on how the data is split into batches, or on sharding over devices. The
    axis of examples is inferred from shapes; where a network merges it with positions, as by
    `x.reshape(-1, features)`, examples are the outer axis.

    Args:
        net: The traced network; or one per reference, as `variables` were merged with, in which
            case trees belong to the first. References of a `Merged` with several networks get
            those automatically.
        variables: A tree of its variables, a `vfjax.merge.Merged`, or a sequence of these.
        data: Re-iterable of `x` or `(x, label)`.
        references: Edge models, or the network before pruning, to compare with. Leaves that only
            heads of a `Merged` read may differ in shape.
        maps: The maps by which the edge models, given as trees, were merged, if they are not
            aligned: their values are carried into the basis of the merge.
        weights: One per reference, summing to one, for means over references. None for the weights
            of each network that is a `Merged` of as many models, and for 1/R each otherwise.
        sites: `"taps"`: the value after every layer and the elementwise region that follows (norm,
            activation, residual sum), the last layer's included. `"layers"`: every layer's
            pre-activation, where the paper measures. Or any name of `vfjax.stats.resolve_sites`
            that is a whole value. The first two include shortcuts; `Features.sites` says which.
        mask: Which positions of a batch count, such as those that are no padding: a function of x
            to booleans, as `mask=lambda x: x["mask"] > 0`; see `vfjax.stats.moments`. Norms are
            then over the entries that count in an example, and the input 0 of an example keeps the
            arrays that the mask reads: `f(0)` is what the network gives for zeros at as many
            positions. (A mask that reads all of x, as of tokens, keeps nothing.)
            `Features.offset` is the mean of its norm over examples, in a second forward pass per
            batch.

    Returns:
        Features, offsets and moments by site.

    Raises:
        TypeError: If `net` is not a traced network, a leaf is not an array, `sites` is neither a
            string nor a sequence of strings, or data has another structure or dtype than was
            traced.
        ValueError: If a tree does not fit the network or holds NaN or infinite values; if a site
            does not exist or has no axis of examples; if weights do not fit; if data is empty or
            exhausted; if a value is NaN or infinite, on data or at 0; or if a variance exceeds the
            dtype (values of 1e19 in float32).

    Example:
        >>> import jax, jax.numpy as jnp, vfjax
        >>> def apply_fn(v, x):
        ...     return jax.nn.relu(x @ v["a"] + 1) @ v["b"]
        >>> edges = [{"a": s * jnp.eye(2), "b": jnp.ones((2, 1))} for s in (1.0, -1.0)]
        >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
        >>> net = vfjax.trace(apply_fn, edges[0], x)
        >>> merged = vfjax.merge.interpolate(edges)
        >>> measured = features(net, merged, [x], references=edges)
        >>> {name: value.tolist() for name, value in measured.feature.items()}
        {'a:act': [0.0], 'b:act': [0.0]}
        >>> theirs = measured.references
        >>> theirs.feature["b:act"].tolist(), theirs.offset["b:act"].tolist()
        ([1.0, 1.0], [2.0, 2.0])

    Source: "Vanishing Feature: Diagnosing Model Merging and Beyond", definitions of the vanishing
    feature for linear and general networks.
    """
    given = compared(net, variables, references)
    if weights is not None and not given.others:
        raise ValueError("weights are those of the references, and there are none")
    names = resolve_sites(given.net, sites)
    return measured(given, data, maps=maps, weights=weights, names=names, mask=mask)


def measured(
    given: Compared,
    data: Iterable[Any],
    *,
    maps: Maps | None,
    weights: Sequence[float] | None,
    names: Sequence[str],
    mask: Mask | None = None,
) -> Features:
    """As `features`, for networks that have been checked and sites given by name."""
    net, mine, others = given.net, given.mine, given.others
    check_batch(net)
    carried = carry(given, maps)
    shares = tuple(weights_for(network, weights, len(others)) for network in mine if others)
    cuts = [network.model for network in (*mine, *others) if not network.plain]
    chosen, source = unique(net, names, cuts)
    if mask is None:
        job = _rows.Job(net, chosen)
        shifts = _rows.offsets(job, carried)
        at_zero = jax.tree.map(np.asarray, shifts)
        _check_defined(job, at_zero)
    else:
        kept = read_by(mask, net.x)
        if all(kept):  # nothing else would be left to be 0
            kept = (False,) * len(kept)
        job = _rows.Job(net, chosen, kept)
        shifts, at_zero = (), _rows.shapes(job, carried)
    rows = _rows.measure(job, carried, shifts, data, mask)
    means = {
        site.name: np.concatenate([np.ravel(row.mean) for of in rows for row in of[site.name]])
        for site in job.sites
    }
    check_finite_means(means)
    _check_offsets(rows)
    if mask is not None:
        check_valid({name: max(row.size for row in rows[0][name]) for name in means})

    by_site = {
        site.name: [
            _rows.numbers(site, of[site.name], zero[site.source], network.model.weights)
            for network, of, zero in zip(carried, rows, at_zero, strict=True)
        ]
        for site in job.sites
    }
    _check_range(by_site)
    sizes = {
        site.name: round(np.mean([row.size for of in rows for row in of[site.name]]))
        for site in job.sites
    }
    described = tuple(describe(net, name, sizes[source[name]]) for name in names)
    static = {"sites": described, "depth": net.depth}

    def record(part: slice, references: Features | None, shares: Any) -> Features:
        def stacked(what: str) -> dict[str, Array]:
            values: dict[str, list[Any]]
            values = {name: [n.get(what) for n in by_site[source[name]][part]] for name in names}
            found = {
                name: np.stack(each)
                for name, each in values.items()
                if each[0] is not None and len({np.shape(value) for value in each}) == 1
            }
            # `jnp.asarray` would compile a program for each shape.
            return jax.device_put(found)

        fields = {what: stacked(what) for what in _FIELDS}
        return Features(**fields, references=references, **static, shares=shares)

    count = len(mine)
    theirs = record(slice(count, None), None, ()) if others else None
    return record(slice(count), theirs, shares)


def _check_range(by_site: dict[str, list[dict[str, np.ndarray]]]) -> None:
    """Checks the numbers of every site: squares may overflow where values are finite."""
    for site, each in by_site.items():
        for what, value in ((w, v) for numbers in each for w, v in numbers.items()):
            if not np.isfinite(value).all():
                raise ValueError(
                    f"the {what} of '{site}' is too large for {value.dtype}: its values are finite "
                    "on the data, but the network is about to overflow"
                )


def _check_offsets(rows: _rows.Rows) -> None:
    """Checks what a pass with a mask found at the input 0."""
    named = ((site, row) for of in rows for site, found in of.items() for row in found)
    for site, row in named:
        if row.offset is not None and not np.isfinite(row.offset):
            raise ValueError(
                f"f(0) is NaN or infinite at '{site}': the network is not defined at the input 0, "
                "which has zeros in all arrays that mask does not read"
            )


def _check_defined(job: _rows.Job, at_zero: _rows.Offsets) -> None:
    for site in job.sites:
        values = [value for zero in at_zero for value in zero[site.source]]
        bad = sum(int(np.size(v) - np.count_nonzero(np.isfinite(v))) for v in values)
        if bad:
            raise ValueError(
                f"f(0) is NaN or infinite in {bad} entries of '{site.name}': the network is not "
                "defined at the input 0, from which features are measured"
            )
