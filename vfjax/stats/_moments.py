"""`Moments`: means, variances and covariances of several models, measured in one pass."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._passes import Mask, check_finite_means, stream
from vfjax._passes.masking import check_valid
from vfjax._trees import check_sequence, resolve_weights
from vfjax._types import Array, PyTree
from vfjax.network._arguments import Models, comparable, networks
from vfjax.network._checks import check_batch
from vfjax.network._layout import check_operand, layout_of
from vfjax.network._network import Network
from vfjax.network._sites import Sites
from vfjax.stats._carry import carry, single
from vfjax.stats._measure import (
    Job,
    Model,
    finish,
    measure,
    merge,
    pool,
)
from vfjax.stats._sites import resolve_sites
from vfjax.symmetry._places import Place


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["count", "mean", "var", "covariance"],
    meta_fields=["axes"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Moments of the values at sites, for K models.

    A pytree, so `jax.tree.map`, `jit` and checkpoints work on it. `var` and `covariance` are
    population moments (divided by the number of samples).

    Attributes:
        count: Samples per channel (examples times positions, with a mask those that are valid), by
            site.
        mean: `[K, *channels]` by site, float32 or better.
        var: `[K, *channels]` by site, float32 or better.
        covariance: `[K, K, n, n]` by site, entry `[i, j, a, b]` between channel a of model i and b
            of model j, or None if none was requested. Blocks that were not requested are NaN.
        axes: By site, the places of groups along the channel axes, which `carried` uses.
    """

    count: dict[str, float]
    mean: dict[str, Array]
    var: dict[str, Array]
    covariance: dict[str, Array] | None = None
    axes: tuple[tuple[str, tuple[Place, ...]], ...] = ()

    @property
    def models(self) -> int:
        """Number of models, K.

        Raises:
            ValueError: If there are no sites, so that K is unknown.
        """
        if not self.mean:
            raise ValueError("these moments have no sites, so the number of models is unknown")
        return next(iter(self.mean.values())).shape[0]

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites."""
        return tuple(self.mean)

    @property
    def std(self) -> dict[str, Array]:
        """Standard deviations, `[K, *channels]` by site."""
        return {site: jnp.sqrt(var) for site, var in self.var.items()}

    def mixed(
        self, weights: Sequence[float] | None = None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Means and standard deviations, averaged over the models.

        These are the goal statistics of REPAIR and RESCALE ("Vanishing Feature", section on
        normalisation): standard deviations are averaged, not variances.

        Args:
            weights: One weight per model, summing to one; None for equal ones.

        Returns:
            Mean and standard deviation, each `[*channels]` by site.

        Raises:
            ValueError: If the weights do not fit the number of models or do not sum to one.

        Example:
            >>> import jax.numpy as jnp
            >>> mean, var = jnp.array([[0.0], [4.0]]), jnp.array([[1.0], [9.0]])
            >>> goal = Moments({"a": 8.0}, {"a": mean}, {"a": var}).mixed((0.5, 0.5))
            >>> [float(value["a"][0]) for value in goal]
            [2.0, 2.0]
        """
        share = jnp.asarray(resolve_weights(weights, self.models, of="models"), jnp.float32)
        return tuple(  # type: ignore[return-value]
            {site: jnp.tensordot(share.astype(value.dtype), value, 1) for site, value in of.items()}
            for of in (self.mean, self.std)
        )

    def carried(self, maps: Sequence[Mapping[str, Any] | None]) -> Moments:
        """The moments of the models after linear maps of their groups, without another pass.

        A matrix `M` turns means into `M mu` and covariances into `M C M^T`; variances are their
        diagonals. Permutations are applied by indexing.

        Args:
            maps: One per model, None for the identity: by group a permutation `int[n]` (new axis =
                `take(old, p)`), or `int[h, n]` for a group within another; a matrix `[m, n]`, or
                `[h, m, n]` for a group within another; or a pair of merge and unmerge matrices
                `(M, U)`, of which the first is used. Groups left out stay. At one site, the models'
                matrices must agree in m.

        Returns:
            Moments at the same sites.

        Raises:
            TypeError: If a permutation does not hold integers.
            ValueError: If there are not K maps, one is neither a permutation of its group nor a
                matrix that fits it, or a matrix meets a site where the covariance within each model
                was not measured.

        Example:
            >>> import jax.numpy as jnp, vfjax
            >>> mean = jnp.array([[1.0, 2.0, 3.0]])
            >>> axes = (("a", (Place("g", vfjax.symmetry.Axis("", 0)),)),)
            >>> measured = Moments({"a": 8.0}, {"a": mean}, {"a": mean}, axes=axes)
            >>> measured.carried([{"g": jnp.array([2, 0, 1])}]).mean["a"].tolist()
            [[3.0, 1.0, 2.0]]
        """
        if isinstance(maps, Mapping) or len(maps) != self.models:
            raise ValueError(
                f"`maps` must be a sequence with one map (or None) for each of {self.models} "
                f"models, got {'a mapping' if isinstance(maps, Mapping) else len(maps)}"
            )
        mean: dict[str, Any] = dict(self.mean)
        var: dict[str, Any] = dict(self.var)
        covariance: dict[str, Any] | None = None
        if self.covariance is not None:
            covariance = dict(self.covariance)
        places = {site: list(axes) for site, axes in self.axes}
        for site, axes in places.items():
            for k, axis in enumerate(axes):
                chosen = [single(m[axis.group]) if m and axis.group in m else None for m in maps]
                if all(m is None for m in chosen):
                    continue
                block = None if covariance is None else covariance.get(site)
                length = mean[site].shape[1 + axis.at.axis]
                mean[site], var[site], block = carry(
                    mean[site], var[site], block, axes[k], chosen, site
                )
                if mean[site].shape[1 + axis.at.axis] != length:
                    m = next(np.shape(given)[-2] for given in chosen if given is not None)
                    axes[:] = [other.after(axes[k].at, length, m) for other in axes]
                if covariance is not None and block is not None:
                    covariance[site] = block
        mean, var, covariance = jax.tree.map(jnp.asarray, (mean, var, covariance))
        axes = tuple((site, tuple(after)) for site, after in places.items())
        return dataclasses.replace(self, mean=mean, var=var, covariance=covariance, axes=axes)


def moments(
    net: Network | Sequence[Network],
    trees: Sequence[PyTree],
    data: Iterable[Any],
    *,
    sites: Sites = "paper",
    covariance: bool | Literal["cross"] | Sequence[str] = False,
    mask: Mask | None = None,
) -> Moments:
    """Measures means, variances and covariances of K models in one pass over data.

    Moments are pooled over all samples (examples and positions), whatever the batches. Statistics
    are float32, or float64 for float64 values; a channel that is constant up to rounding has
    variance 0. Batches that are sharded over devices give the same numbers.

    Args:
        net: The traced network, or one per tree.
        trees: One parameter tree per model. Leaves that no site depends on, such as those of heads
            with different classes, may differ in shape if `apply_fn` accepts that; models with
            different `apply_fn`s need one network each.
        data: Re-iterable of `x` or `(x, label)`.
        sites: As in `resolve_sites`. At a tap the channels are the `n` features of its group (at a
            joint tap those inside all entries of the owner, `h * n`), at a layer or norm its
            channel axes, at `"input"` and `"output"` all axes but the first.
        covariance: True for the covariances between all pairs of models (also each with itself) at
            the requested taps, or at all taps if `sites` has none; `"cross"` for pairs of different
            models only, which is all that matching needs; a list of site names for all pairs at
            those sites.
        mask: Which positions of a batch count, such as those that are no padding: a function of x
            to booleans `[batch, ...]` along the leading axes of an array of x (of size 1 along an
            axis where all count alike), as `mask=lambda x: x["mask"] > 0`. None if all count. The
            moments are those of the valid positions alone. At a site behind a pool, a reduction or
            a strided layer, a position counts if any of those that it stands for does.

    Returns:
        Moments by site.

    Raises:
        TypeError: If `net` is not a traced network, `trees` is not a sequence of trees, or data has
            another structure or dtype; if `mask` is not a function, or gives no booleans.
        ValueError: If networks or trees differ before a site, a site does not exist, data is empty
            or exhausted or makes a site NaN or infinite, or `covariance` is `"cross"` with a single
            model; if what `mask` gives fits no array of x, leaves nothing valid, or does not tell
            what counts at a site.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> x = jnp.arange(12.0).reshape(4, 3)
        >>> net = vfjax.trace(lambda v, x: x @ v["a"], {"a": jnp.eye(3)}, x)
        >>> trees = [{"a": jnp.eye(3)}, {"a": 2 * jnp.eye(3)}]
        >>> moments(net, trees, [x[:3], x[3:]], sites=["a"]).mean["a"].tolist()
        [[4.5, 5.5, 6.5], [9.0, 11.0, 13.0]]
    """
    check_sequence(trees, name="trees")
    nets = networks(net, len(trees))
    planned = functools.partial(_job, sites=sites, covariance=covariance, models=len(trees))
    job = planned(nets[0])
    models = comparable(nets, trees, [site.source for site in job.sites])
    if any(planned(own) != job for own in dict.fromkeys(nets) if own is not nets[0]):
        raise ValueError(
            "net has networks that lay out the values at the sites differently; measure each "
            "separately, stats.moments(net[k], [trees[k]], data, ...)"
        )
    return _measured(models, data, job, mask)


def measured(
    models: Models,
    data: Iterable[Any],
    names: Sequence[str],
    covariance: Sequence[str] = (),
    *,
    cross: bool = False,
    mask: Mask | None = None,
) -> Moments:
    """Like `moments`, for models that are known to be comparable at the sites.

    Args:
        models: The models, of one network or of several that lay out the sites in the same way.
        data: Re-iterable of `x` or `(x, label)`.
        names: Names of sites.
        covariance: Names of the sites where covariances are wanted.
        cross: Whether to measure covariances of different models only.
        mask: As in `moments`.
    """
    job = _planned(models.net, tuple(names), tuple(covariance), len(models), cross=cross)
    return _measured(models, data, job, mask)


def _measured(models: Models, data: Iterable[Any], job: Job, mask: Mask | None) -> Moments:
    pooled, counts = stream(
        functools.partial(measure, job),
        functools.partial(pool if job.covariance else merge, job),
        tuple(map(Model, models.nets, models.trees)),
        data,
        like=models.net.x,
        mask=mask,
        host=None if job.covariance else lambda piece: piece,
    )
    check_valid(dict(zip([site.name for site in job.sites], counts, strict=True)))
    check_finite_means(pooled["mean"])
    mean, var, blocks = finish(job, pooled)
    return Moments(
        count={s.name: float(np.max(n)) for s, n in zip(job.sites, counts, strict=True)},
        # In the requested order: dicts that pass through jit come back sorted by name.
        mean={site.name: mean[site.name] for site in job.sites},
        var={site.name: var[site.name] for site in job.sites},
        covariance={name: blocks[name] for name in job.covariance} or None,
        axes=tuple((site.name, site.groups) for site in job.sites),
    )


def _job(net: Network, sites: Sites, covariance: bool | str | Sequence[str], models: int) -> Job:
    if isinstance(covariance, str) and covariance == "cross" and models < 2:
        raise ValueError(
            f'`covariance`: "cross" needs two models or more, for pairs of different ones; `trees` '
            f"has {models}. Pass True for the covariances within a model"
        )
    names = resolve_sites(net, sites)
    if isinstance(covariance, bool) or covariance == "cross":
        known = resolve_sites(net, "taps")
        chosen = tuple(name for name in names if name in known) if covariance else ()
        if covariance and not chosen:
            chosen = known
    elif isinstance(covariance, str):
        raise ValueError(
            f'`covariance` must be a bool, "cross" or a list of site names, got "{covariance}"'
        )
    else:
        chosen = resolve_sites(net, covariance)
    return _planned(net, names, chosen, models, cross=covariance == "cross")


def _planned(
    net: Network, names: tuple[str, ...], chosen: tuple[str, ...], models: int, *, cross: bool
) -> Job:
    """The job that measures named sites, with covariances at the chosen ones."""
    check_batch(net)
    names = tuple(dict.fromkeys((*names, *chosen)))
    pairs = tuple((i, j) for i in range(models) for j in range(i + cross, models)) if chosen else ()
    for name in names:
        check_operand(net, name)
    return Job(tuple(layout_of(net, name) for name in names), chosen, pairs)
