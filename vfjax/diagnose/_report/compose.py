"""`report`: where a network's features vanish, and what to do about it.

Everything is computed from one pass of `vfjax.diagnose.features` over the pre-activations and the
inputs of norms, and from the weights (`findings`). The advice follows from these numbers by fixed
rules (`advice`), which `report` lists; no remedy is tried out.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vfjax._files import write_whole
from vfjax._maps import Maps
from vfjax._passes import Mask
from vfjax._types import PyTree
from vfjax.diagnose._bounds import (
    Bound,
    Collapse,
    bound_sequence,
    variance_collapse,
)
from vfjax.diagnose._compared import compared, mapped
from vfjax.diagnose._features import Features, measured
from vfjax.diagnose._report import findings, html
from vfjax.diagnose._report.advice import (
    MEAN_OFF,
    STD_OFF,
    Advice,
    Case,
    advise,
)
from vfjax.diagnose._report.figure import draw
from vfjax.diagnose._report.findings import LayerFinding, NormFinding
from vfjax.diagnose._report.table import text_table
from vfjax.diagnose._sites import resolve_sites
from vfjax.merge._arguments import weights_for
from vfjax.merge._merged import Merged
from vfjax.merge._unpacked import Unpacked
from vfjax.network._network import Network
from vfjax.network._sites import Sites

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Gamma of the paper's detailed plots.
_GAMMA = 1.4
# Ratios that are at least this fraction of each other are called equal.
_SAME = 0.99


def report(
    net: Network | Sequence[Network],
    variables: PyTree | Merged,
    data: Iterable[Any],
    *,
    references: Sequence[PyTree | Merged],
    maps: Maps | None = None,
    weights: Sequence[float] | None = None,
    sites: Sites = "layers",
    threshold: float = 0.5,
    title: str = "Vanishing features",
    page: str | os.PathLike[str] | None = None,
    figure: str | os.PathLike[str] | None = None,
    mask: Mask | None = None,
) -> Report:
    """Says where features vanish, whether biases dominate the output, and what likely helps.

    Let r be the features relative to the references' mean, at every layer of the main path and at
    the output. Features vanish at the first layer from which on r stays at or below `threshold`, up
    to the output; dead branches, where r is 0 although it is positive later, do not count. If the
    output is not a single array with an axis of examples, the last layer takes its place. The
    network counts as a merge of its references if these are several, all of them trees, and its
    kernels have a cosine of 0.9 or more with their mean. The advice follows from measured numbers:

    - match first, for such a merge: features vanish, the references' kernels have a cosine below
      0.1 with each other, and there are units to permute;
    - RESET: the stored statistics of a norm differ from its input, beyond the references' own
      differences, by a factor of 1.25 in standard deviation or by 0.5 standard deviations in mean.
      Moments after such a norm say nothing about layers, so the next two are left to a second
      report;
    - RESCALE or REPAIR: the moments of a layer of the trunk are off by as much. The first such
      layer decides, since nothing upstream confounds it: RESCALE if its standard deviation is off
      and scaling brings its means within 0.5 standard deviations of the references', else REPAIR.
      No scale brings back features where none are left; such layers decide last, by their means;
    - bias calibration, for such a merge: biases dominate the output, some feature is left there,
      kernels are below 0.9 of the references' magnitude (geometric mean), layers after the first
      have biases, and no bias serves layers of several depths; it needs no data;
    - PFM, for such a merge: features vanish, but not entirely, and either in the second half or
      with half of the loss (on a logarithmic scale) at one layer. l is the smallest number of
      layers for which the layers after l keep at least a share `threshold`;
    - nothing to do: none of these applies, features do not vanish, biases do not dominate, and
      every layer varies with the input;
    - none known: none of these applies, but something is wrong.

    Calls in the advice name the arguments given here `net`, `merged`, `data`, `references`, `maps`
    and `mask`, and a random key `key`; they pass the references' weights where the defaults differ.

    Args:
        net: The traced network, or one per reference, as in `features`.
        variables: A tree of its variables, or a `vfjax.merge.Merged`: one network.
        data: Re-iterable of `x` or `(x, label)`.
        references: The edge models, aligned as they were merged, or the network before pruning.
            Where they differ in a site's shape, as at the outputs of heads with different classes,
            features and offsets are compared but channels are not: there, `std_ratio`, `mean_shift`
            and `rescaled_shift` are NaN.
        maps: The maps by which the edge models, given as trees, were merged, if they are not
            aligned: their values and kernels are carried into the basis of the merge.
        weights: One per reference, summing to one. None for those of `variables`, if that is a
            `Merged` of as many models, else 1/R each.
        sites: As in `features`; those on the main path count, and the output always. Remedies act
            on pre-activations, so leave `"layers"` unless one of them cannot be measured.
        threshold: Share of the references' features, in (0, 1).
        title: Title of figure and page.
        page: A file to write the page to, if any.
        figure: A file to write the figure to as PNG, if any.
        mask: Which positions of a batch count, such as those that are no padding: a function of x
            to booleans, as `mask=lambda x: x["mask"] > 0`; see `features`.

    Returns:
        The report; `print` shows its words, advice and table.

    Raises:
        TypeError: As `features`.
        ValueError: As `features`; or if there is no reference or more than one network, if
            `threshold` is not in (0, 1), if no site of the main path is left, or if the references'
            features or variance are 0 at one of them (as when all examples are equal).
        OSError: If page or figure cannot be written.

    Example:
        >>> import jax, jax.numpy as jnp, vfjax
        >>> v = {"a": jnp.eye(2), "b": jnp.eye(2), "c": jnp.eye(2)}
        >>> def apply_fn(v, x):
        ...     return jax.nn.relu(jax.nn.relu(x @ v["a"]) @ v["b"] + 0.1) @ v["c"]
        >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
        >>> net = vfjax.trace(apply_fn, v, x)
        >>> made = report(net, v | {"b": v["b"] / 10}, [x], references=[v])
        >>> made.vanishes.site, round(made.left, 3), made.advice[0].remedy
        ('b', 0.1, 'RESCALE')
        >>> report(net, v, [x], references=[v]).advice[0].remedy
        'nothing to do'

    Source: "Vanishing Feature: Diagnosing Model Merging and Beyond", definitions of the vanishing
    feature and of variance collapse, the upper-bound sequence, and the sections on normalisation
    and on Preserve-First Merging. The numbers in the rules are this library's own choice.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie between 0 and 1, got {threshold!r}")
    if references is None or (isinstance(references, (list, tuple)) and not references):
        raise ValueError(
            "references must hold at least one network to compare with: the edge models, or the "
            "network before pruning"
        )
    given = compared(net, variables, references)
    net, network, others = given.net, _one(given.mine), given.others
    model = network.model
    names = resolve_sites(net, sites)
    norms = [norm.site for norm in net.norms if norm.site not in names]
    path, end = findings.main_path(net, names)
    numbers = measured(
        given,
        data,
        maps=maps,
        weights=weights_for(network, weights, len(others)),
        names=tuple(dict.fromkeys([*names, *norms, *path])),
        mask=mask,
    )
    aligned = mapped(given, maps)
    bound = bound_sequence(numbers, sites=path)
    smoothed = bound_sequence(numbers, sites=path, gamma=_GAMMA)
    collapse = variance_collapse(numbers, eps=threshold**2, sites=path, relative=True)
    rows = findings.layer_findings(net, network, aligned, numbers, bound, smoothed)
    heads = [site for site in numbers.names if model.in_heads(site)]
    inside = [norm.site for norm in net.norms if norm.site in heads]
    # Norms in heads store statistics of values in the models' own bases, so with maps these values
    # are measured once more, unmapped.
    own = numbers
    if inside and maps is not None:
        alone = given._replace(others=())
        own = measured(alone, data, maps=None, weights=None, names=inside, mask=mask)
    stored = findings.norm_findings(
        net, network, aligned, numbers, own, mean_error=MEAN_OFF, std_ratio=STD_OFF
    )
    case = Case(
        net=net,
        span=model.span,
        mapped=maps is not None,
        masked=mask is not None,
        weights=numbers.weights,
        own_weights=weights_for(network, None, len(others)),
        trees=all(other.plain for other in others),
        rows=rows,
        norms=stored,
        end=end,
        threshold=float(threshold),
    )
    made = Report(
        title=title,
        features=numbers,
        bound=bound,
        smoothed=smoothed,
        collapse=collapse,
        layers=rows,
        norms=stored,
        depth=net.depth,
        end=end,
        threshold=case.threshold,
        vanishes=case.vanishes,
        largest_drop=case.largest_drop,
        biases_dominate=case.biases_dominate,
        advice=advise(case),
    )
    if page is not None:
        made.page(page)
    if figure is not None:
        from vfjax import plot

        plot.save(made.figure(), figure)
    return made


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Report:
    """A network compared with its references; made by `report`.

    Attributes:
        title: Title of the report.
        features: The measurements.
        bound: Relative features and their tight bound, along the main path.
        smoothed: Their bound with gamma = 1.4.
        collapse: Variance collapse, relative to the references, with `eps = threshold ** 2`.
        layers: Findings of every site of the main path, by depth, and of the output where that is
            a different value.
        norms: Findings of every norm with stored statistics outside stems.
        depth: L, the network's number of layers.
        end: Name of the last of `layers`: `"the output"`, or a site, if the output is not a single
            array that has features.
        threshold: The share of the references' features at or below which they count as vanished.
        vanishes: The first site from which on features stay at or below that share, up to the
            end (the first whose tight bound is at or below it), or None. Dead branches, which have
            no feature while a later site has one, do not count.
        largest_drop: The site with the smallest `step`, not counting dead branches.
        biases_dominate: Whether at the end the offset exceeds the feature, and the ratio of feature
            to offset is at or below `threshold` times the references'.
        advice: Likely remedies, in the order in which to apply them.

    Example:
        >>> import jax, jax.numpy as jnp, vfjax
        >>> v = {"a": jnp.eye(2), "b": jnp.eye(2)}
        >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
        >>> net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["a"]) @ v["b"], v, x)
        >>> report(net, v | {"b": v["b"] / 8}, [x], references=[v])
        Report(features vanish at 'b', 0.125 left at the output, advice: RESCALE)
    """

    title: str
    features: Features
    bound: Bound
    smoothed: Bound
    collapse: Collapse
    layers: tuple[LayerFinding, ...]
    norms: tuple[NormFinding, ...]
    depth: int
    end: str
    threshold: float
    vanishes: LayerFinding | None
    largest_drop: LayerFinding
    biases_dominate: bool
    advice: tuple[Advice, ...]

    @property
    def left(self) -> float:
        """Share of the references' features that reaches the end."""
        return self.layers[-1].relative

    @property
    def words(self) -> tuple[str, ...]:
        """The findings, in plain sentences."""
        return (
            self._vanishing(),
            self._drop(),
            self._biases(),
            self._variance(),
            *self._silent(),
            self._dead(),
            *self._stored(),
        )

    def table(self) -> str:
        """The findings of every layer as a text table, without a trailing newline."""
        return text_table(self.layers)

    def figure(self) -> Figure:
        """Draws features and offsets over relative depth, of the network and its references.

        Root mean squares over units, on a logarithmic axis; zeros are gaps.

        Returns:
            A matplotlib figure; `vfjax.plot.save` writes it.
        """
        sizes = [self.features.site(row.site).size for row in self.layers]
        return draw(self.layers, sizes, self.depth, self.vanishes, self.title)

    def page(self, path: str | os.PathLike[str]) -> Path:
        """Writes the report as one HTML page that needs no other files and no internet access.

        Args:
            path: The file to write; its folder is created.

        Returns:
            The path.

        Raises:
            OSError: If the file cannot be written; an existing file is then kept.
        """
        text = html.page(
            self.title, self.words, self.advice, self.layers, self.vanishes, self.figure()
        )
        return write_whole(path, text.encode())

    def __str__(self) -> str:
        """Words, advice and table."""
        advice = [f"- {one}" for one in self.advice]
        return "\n".join([self.title, "", *self.words, "", *advice, "", self.table()])

    def __repr__(self) -> str:
        """The outcome, in one line."""
        where = f"features vanish at '{self.vanishes.site}'" if self.vanishes else "features live"
        remedies = ", ".join(one.remedy for one in self.advice)
        return f"Report({where}, {self.left:.3g} left at {self.end}, advice: {remedies})"

    # --------------------------------------------------------------------------------- sentences

    def _vanishing(self) -> str:
        left = f"at {self.end} {self.left:.3g} of them is left"
        if self.left and self.left < 1:
            times = 1 / self.left
            left += f", {times:,.0f} times less" if times >= 1000 else f", {times:.3g} times less"
        if self.vanishes is None:
            return f"Features do not vanish: {left}, relative to the references."
        return (
            f"Features vanish at {self._at(self.vanishes)}: from there on they stay at or below "
            f"{self.threshold:.3g} of the references' features; {left}."
        )

    def _drop(self) -> str:
        drop = self.largest_drop
        if drop.step >= 0.99:
            return "No layer loses more than 1 % of its features against the references."
        text = f"The largest drop is at {self._at(drop)}, to {drop.step:.3g} of what came before"
        if self.vanishes is not None and self.left > 0:
            share = min(1.0, float(np.log(drop.step) / np.log(self.left)))
            text += f": {100 * share:.0f} % of the loss, on a logarithmic scale"
        return text + "."

    def _biases(self) -> str:
        last = self.layers[-1]
        mine, theirs = last.ratio, last.reference_ratio
        if not mine < 1:
            does = f"Biases do not dominate {self.end}"
        elif self.biases_dominate:
            does = f"Biases dominate {self.end}, and far more than in the references"
        elif mine < _SAME * theirs:
            does = f"Biases dominate {self.end}, somewhat more than in the references"
        else:
            does = f"Biases dominate {self.end}, but no more than in the references"
        known = f"||f(x) - f(0)|| is {mine:.3g} of ||f(0)|| there"
        reference = _undefined(theirs) or f"it is {theirs:.3g}"
        return f"{does}: {_undefined(mine) or known}, in the references {reference}."

    def _variance(self) -> str:
        does = "collapses" if self.collapse.collapsed[0] else "does not collapse"
        return (
            f"The variance {does}: that of {self.end} is {self.collapse.final[0]:.3g} of the "
            f"references' (collapsed at or below {self.collapse.eps:.3g})."
        )

    def _silent(self) -> tuple[str, ...]:
        silent = [row for row in self.layers if row.silent]
        if not silent:
            return ()
        others = f" and at {len(silent) - 1} more" if len(silent) > 1 else ""
        return (
            f"What is left at {self._at(silent[0])}{others} does not vary with the input: no scale "
            "brings features back there.",
        )

    def _dead(self) -> str:
        worst = max(self.layers, key=lambda row: row.dead - row.reference_dead)
        if worst.dead <= worst.reference_dead:
            return "No layer has more dead channels than the references."
        return (
            f"Most dead channels beyond the references' are at {self._at(worst)}: "
            f"{100 * worst.dead:.0f} % against {100 * worst.reference_dead:.0f} %."
        )

    def _stored(self) -> tuple[str, ...]:
        if not self.norms:
            return ()
        stale = [norm for norm in self.norms if norm.stale]
        if not stale:
            return (
                f"The stored statistics of all {len(self.norms)} norms fit what they read, as well "
                "as the references' do.",
            )
        return (
            f"The stored statistics of {len(stale)} of {len(self.norms)} norms do not fit what "
            f"they read, first those of {stale[0].name}.",
        )

    def _at(self, row: LayerFinding) -> str:
        return f"{row.site} (depth {row.depth} of {self.depth})"


def _undefined(ratio: float) -> str:
    """The words for a ratio of feature to offset that is not a finite number; else empty."""
    if np.isnan(ratio):
        return "there is neither feature nor offset"
    return "there is no offset" if np.isinf(ratio) else ""


def _one(networks: tuple[Unpacked, ...]) -> Unpacked:
    if len(networks) != 1:
        raise ValueError(f"variables must be one network, got {len(networks)}; report on each")
    return networks[0]
