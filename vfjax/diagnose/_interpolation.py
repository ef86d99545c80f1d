"""Loss and accuracy between two networks, and the barrier between them.

For every alpha the two networks are averaged with the weights `(1 - alpha, alpha)`, renormalised if
requested, and evaluated. Alpha is an argument of the compiled programs, never a constant in them:
one program averages, one corrects and one evaluates (that of `vfjax._passes.evaluation`), whatever
the number of alphas. Batches are read once, and the moments of the references are measured once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, SupportsIndex

import jax
import numpy as np
from tqdm import tqdm

from vfjax import align, merge, renorm
from vfjax._passes import Mask, batches, keep, labelled
from vfjax._passes.evaluation import Evaluation, Loss, check_functions, evaluate
from vfjax._trees import check_trees, flatten_named
from vfjax._trees.concrete import check_host
from vfjax._types import Array, PyTree
from vfjax.merge._merged import Merged
from vfjax.merge._soups import interpolate
from vfjax.network._arguments import check_net
from vfjax.network._checks import check_depth
from vfjax.network._network import Network
from vfjax.renorm._renorm import repair, rescale, reset
from vfjax.stats._moments import Moments, moments
from vfjax.stats._sites import resolve_sites

Match = Literal["weight", "activation"] | Callable[[PyTree, PyTree], Any] | None
Renormalise = str | tuple[str, int | str] | Callable[[Merged, Any, Any], PyTree | Merged] | None

_MATCHES = ("weight", "activation")
_PLAIN = ("reset", "repair", "rescale", "bias_calibration")
_NEED_DATA = ("reset", "repair", "rescale")


def barrier(
    alphas: Sequence[float] | np.ndarray,
    accuracies: Sequence[float] | np.ndarray,
    *,
    definition: Literal["paper", "reference"] = "paper",
    ends: Sequence[float] | np.ndarray | None = None,
) -> float:
    """Measures how far a curve between two networks falls below its ends.

    - `"paper"`: `max over alpha of (1 - alpha) Acc_0 + alpha Acc_1 - Acc(alpha)`, the largest
      distance below the straight line between the ends. Alpha runs over all of [0, 1], so the ends
      count, where it is 0, and no barrier is negative;
    - `"reference"`: `(Acc_0 + Acc_1) / 2 - min over alpha of Acc(alpha)`, as in the reference code.
      The two definitions differ where the ends differ.

    For the barrier of a loss, which rises, give negative losses (and negative `ends`).

    Args:
        alphas: `[n]`, in [0, 1], in any order.
        accuracies: `[n]`, one for each alpha.
        definition: `"paper"` or `"reference"`.
        ends: Accuracies of the two networks; None for those of the curve at alpha 0 and 1.

    Returns:
        The barrier, in the unit of the accuracies.

    Raises:
        ValueError: If there is not one accuracy for each alpha, if an alpha is outside [0, 1], if
            the definition is unknown, or if `ends` is None and the curve lacks alpha 0 or 1.

    Example:
        >>> alphas, accuracies = [0.0, 0.5, 1.0], [0.75, 0.5, 0.25]
        >>> barrier(alphas, accuracies), barrier(alphas, accuracies, definition="reference")
        (0.0, 0.25)

    Source: "Vanishing Feature: Diagnosing Model Merging and Beyond", definition of the barrier, and
    its reference code. Of a loss: Entezari et al. (2022), "The Role of Permutation Invariance in
    Linear Mode Connectivity of Neural Networks".
    """
    at = _grid(alphas)
    values = np.asarray(accuracies, np.float64)
    if values.shape != at.shape:
        raise ValueError(
            f"accuracies must be one for each of {len(at)} alphas, got shape {list(values.shape)}"
        )
    if ends is None:
        first, second = values[at == 0.0], values[at == 1.0]
        if not len(first) or not len(second):
            raise ValueError(
                "alphas must hold 0 and 1, whose accuracies the others are compared to, got "
                f"{at.tolist()}; or give ends, the accuracies of the two networks"
            )
        ends = first[0], second[0]
    elif np.shape(ends) != (2,):
        raise ValueError(f"ends must be two accuracies, got shape {list(np.shape(ends))}")
    if definition == "paper":
        return float(np.max(ends[0] + at * (ends[1] - ends[0]) - values, initial=0.0))
    if definition == "reference":
        return float((ends[0] + ends[1]) / 2 - np.min(values))
    raise ValueError(f'definition must be "paper" or "reference", got {definition!r}')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Interpolation:
    """The result of `interpolation`; a frozen pytree of float64 NumPy arrays.

    Barriers are relative to the two networks themselves, which are the ends of the curve unless a
    renormalisation changes those too.

    Attributes:
        alphas: `[n]`, the weights of the second network.
        loss: `[n]`, mean cross-entropy in nats, or the mean of the caller's `loss`.
        accuracy: `[n]`, in [0, 1], or the mean of the caller's `score`; None where there is
            neither (`interpolation` says when).
        edge_loss: `[2]`, of the two (aligned) networks, without renormalisation.
        edge_accuracy: `[2]`, accuracies of the same, or None.

    Example:
        >>> curve = Interpolation(
        ...     alphas=np.array([0.0, 0.5, 1.0]),
        ...     loss=np.array([0.5, 2.0, 1.0]),
        ...     accuracy=np.array([0.75, 0.5, 0.25]),
        ...     edge_loss=np.array([0.5, 1.0]),
        ...     edge_accuracy=np.array([0.75, 0.25]),
        ... )
        >>> curve.barrier, curve.reference_barrier, curve.loss_barrier
        (0.0, 0.25, 1.25)
        >>> curve
        Interpolation(3 alphas, accuracy 0.75 and 0.25, least 0.25 at alpha 1, barrier 0)
    """

    alphas: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray | None
    edge_loss: np.ndarray
    edge_accuracy: np.ndarray | None

    @property
    def _scores(self) -> tuple[np.ndarray, np.ndarray]:
        if self.accuracy is None or self.edge_accuracy is None:
            raise ValueError(
                "this curve has no accuracy, as its labels are no class numbers: see loss_barrier, "
                "or give interpolation score=, a function of the output and the labels"
            )
        return self.accuracy, self.edge_accuracy

    @property
    def barrier(self) -> float:
        """Accuracy barrier by the paper's definition: see `vfjax.diagnose.barrier`."""
        accuracy, ends = self._scores
        return barrier(self.alphas, accuracy, ends=ends)

    @property
    def reference_barrier(self) -> float:
        """Accuracy barrier by the reference code's definition: see `vfjax.diagnose.barrier`."""
        accuracy, ends = self._scores
        return barrier(self.alphas, accuracy, definition="reference", ends=ends)

    @property
    def loss_barrier(self) -> float:
        """Largest distance of the loss above the line between the networks' losses.

        In nats, for the cross-entropy. Not negative, like `barrier`.
        """
        return barrier(self.alphas, -self.loss, ends=-self.edge_loss)

    def __repr__(self) -> str:
        """Ends, lowest point and barrier, in one line."""
        if self.accuracy is None:
            what, curve, ends = "loss", self.loss, self.edge_loss
            worst, word, gap = int(np.argmax(curve)), "most", self.loss_barrier
        else:
            what, (curve, ends) = "accuracy", self._scores
            worst, word, gap = int(np.argmin(curve)), "least", self.barrier
        return (
            f"Interpolation({len(self.alphas)} alphas, {what} {ends[0]:.4g} and {ends[1]:.4g}, "
            f"{word} {curve[worst]:.4g} at alpha {self.alphas[worst]:.4g}, barrier {gap:.4g})"
        )


def interpolation(
    net: Network,
    trees: Sequence[PyTree],
    test_data: Iterable[tuple[Any, Any]],
    *,
    loss: Loss | None = None,
    score: Loss | None = None,
    alphas: int | Sequence[float] | np.ndarray = 11,
    match: Match = None,
    renormalise: Renormalise = None,
    data: Iterable[Any] | None = None,
    references: Sequence[PyTree] | Moments | None = None,
    layers: int = 0,
    key: Array | None = None,
    progress: bool = True,
    mask: Mask | None = None,
) -> Interpolation:
    """Evaluates two networks and the averages between them, `(1 - alpha) a + alpha b`.

    Without renormalisation, and with `"bias_calibration"`, the ends of the curve are the edge
    models. With `"reset"`, `"repair"` and `"rescale"` the ends differ from these as far as the
    moments of `data` differ from those that the edge models were trained with.
    `("remove_bias", k)` also removes biases of the edge models, and after a matching that
    transforms both networks (such as ZipIt!) the given trees are not edge models to begin with. The
    result therefore also holds the two networks' own accuracies, to which barriers are relative.

    Args:
        net: The traced network; its output is logits `[n, classes]`, or what `loss` takes.
        trees: The two networks' variables, a and b.
        test_data: Batches `(x, label)`, read once and kept on the device up to 1 GiB, else read
            again for each alpha. Labels are integers `[n]`, or with `loss` what that takes: any
            pytree of arrays `[n, ...]` (reals, tokens, dicts).
        loss: `loss(output, label)`, the mean over a batch; None for the cross-entropy.
        score: `score(output, label)`, the mean over a batch of what is to be high, which stands in
            place of the accuracy; None for the accuracy, where labels are integers `[n]` and
            outputs are logits `[n, classes]`.
        alphas: Weights of b, in [0, 1]; or their number, evenly spaced from 0 to 1 (at least 2).
        match: How b is first permuted: `"weight"` (`vfjax.align.match_weights`, which needs `key`),
            `"activation"` (`vfjax.align.match_activations`, on `data`), a function of `(a, b)` that
            returns a `vfjax.align.Alignment` or the aligned b, or None for trees that are already
            aligned.
        renormalise: Correction of the average at each alpha: `"reset"`, `"repair"`, `"rescale"`,
            `"bias_calibration"` or `("remove_bias", last)`, as the functions of `vfjax.renorm` with
            their defaults; a function of `(merged, references, data)`, where merged is a `Merged`
            whose `weights` are `(1 - alpha, alpha)`, that returns a tree or a `Merged`; or None.
        data: Batches for statistics, `x` or `(x, label)`, for matching by activations and for
            renormalising; kept like `test_data`.
        references: Aligned trees, or their `vfjax.stats.Moments`, whose statistics REPAIR and
            RESCALE restore; None for the two (aligned) networks. Measured once. A function given
            as `renormalise` receives them unchanged.
        layers: Number of first layers that are kept apart (`vfjax.merge.preserve_first`).
        key: Random key, for `"weight"` only.
        progress: Whether a progress bar appears after two seconds.
        mask: Which positions of a batch of `data` count, such as those that are no padding: a
            function of x to booleans, as `mask=lambda x: x["mask"] > 0`; see `vfjax.stats.moments`.
            A function given as `match` or `renormalise` does not receive it.

    Returns:
        Loss and accuracy at each alpha, and those of the two networks, which are evaluated
        separately only if they are not on the curve.

    Raises:
        TypeError: If `net` is not a traced network, `trees` is not a sequence of trees, an option
            is of a kind not named above, batches have another structure or dtype, labels are not
            integers (with `loss`, numbers), or `loss` or `score` does not return a number.
        ValueError: If there are not two trees, if they do not fit, if an alpha is outside [0, 1],
            if a name is unknown, if `data` or `key` is missing where it is needed, or if batches
            are empty.

    Warns:
        UserWarning: As `vfjax.merge.preserve_first`.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> def apply_fn(v, x):
        ...     return jax.nn.relu(x @ v["w1"]) @ v["w2"]
        >>> a = {"w1": jnp.array([[1.0, -1.0]]), "w2": jnp.eye(2)}
        >>> x = jnp.array([[1.0], [-1.0]])
        >>> net = vfjax.trace(apply_fn, a, x)
        >>> b = net.spec.permute(a, {"w1": np.array([1, 0])})  # the same function
        >>> test = [(x, jnp.array([0, 1]))]
        >>> interpolation(net, [a, b], test, alphas=3).accuracy.tolist()
        [1.0, 0.5, 1.0]
        >>> interpolation(net, [a, b], test, match="weight", key=jax.random.key(0))
        Interpolation(11 alphas, accuracy 1 and 1, least 1 at alpha 0, barrier 0)

    Source: "Vanishing Feature: Diagnosing Model Merging and Beyond", figures of accuracy against
    alpha.
    """
    check_net(net)
    grid = _grid(alphas)
    check_trees(trees)
    check_host("networks are evaluated", trees=list(trees))
    if len(trees) != 2:
        raise ValueError(f"trees must be two, the ends of the interpolation, got {len(trees)}")
    check_depth(net, layers, "layers")
    check_functions(loss=loss, score=score)
    _check_match(match, data, key)
    _check_renormalise(renormalise, data)

    reader = "accuracy" if loss is None else "the loss"
    pairs = labelled(test_data, name="test_data", reader=reader, classes=loss is None)
    test = keep(((x, label) for _, x, label in pairs), test_data)
    if data is not None:
        data = keep(batches(data, like=net.x), data)
    a, b = trees
    trees = a, _aligned(net, a, b, match, data, key, mask)
    path = Path(net, merge.preserve_first(net, trees, layers=layers), trees, loss, score)
    renormalised = _renormaliser(net, trees, renormalise, references, data, mask)

    with tqdm(grid, "interpolating", delay=2, leave=False, disable=not progress) as bar:
        curve = [path.evaluate(renormalised(path.at(alpha)), test) for alpha in bar]
    ends = []
    for end in (0.0, 1.0):
        there = [k for k in np.flatnonzero(grid == end) if renormalise is None]
        ends.append(curve[there[0]] if there else path.evaluate(path.at(end), test))
    return Interpolation(
        alphas=grid,
        loss=np.array([point.loss for point in curve]),
        accuracy=_scored(curve),
        edge_loss=np.array([end.loss for end in ends]),
        edge_accuracy=_scored(ends),
    )


def _scored(points: Sequence[Evaluation]) -> np.ndarray | None:
    """The scores of several evaluations, or None without."""
    return None if points[0].accuracy is None else np.array([p.accuracy for p in points])


# ------------------------------------------------------------------------------------ the arguments


def _grid(alphas: Any) -> np.ndarray:
    """The alphas, float64 `[n]`."""
    if isinstance(alphas, SupportsIndex) and getattr(alphas, "ndim", 0) == 0:
        count = int(alphas)
        if isinstance(alphas, bool) or count < 2:
            raise ValueError(f"alphas must be at least 2 points, or a sequence, got {alphas!r}")
        return np.arange(count) / (count - 1)
    try:
        grid = np.asarray(alphas, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"alphas must be numbers, or how many, got {alphas!r}") from error
    if grid.ndim != 1 or not grid.size:
        raise ValueError(f"alphas must be a sequence of numbers, or how many, got {alphas!r}")
    wrong = grid[~((grid >= 0) & (grid <= 1))]
    if wrong.size:
        raise ValueError(f"alphas must be from 0 to 1, got {wrong[0]:g}")
    return grid


def _check_match(match: Any, data: Any, key: Any) -> None:
    if match is None or callable(match):
        return
    if not isinstance(match, str):
        raise TypeError(f"match must be a name, a function of (a, b) or None, got {match!r}")
    if match not in _MATCHES:
        raise ValueError(
            f"match must be one of {', '.join(_MATCHES)}, or a function, got {match!r}"
        )
    if match == "activation" and data is None:
        raise ValueError('match="activation" compares units on data; give data=batches of inputs')
    if match == "weight" and key is None:
        raise ValueError('match="weight" visits layers at random; give key=jax.random.key(0)')


def _check_renormalise(renormalise: Any, data: Any) -> None:
    if renormalise is None or callable(renormalise):
        return
    known = f'one of {", ".join(_PLAIN)}, ("remove_bias", last), a function or None'
    name, *rest = renormalise if isinstance(renormalise, tuple) else (renormalise,)
    if not isinstance(name, str):
        raise TypeError(f"renormalise must be {known}, got {renormalise!r}")
    if (len(rest) != 1) if name == "remove_bias" else (rest or name not in _PLAIN):
        raise ValueError(f"renormalise must be {known}, got {renormalise!r}")
    if name in _NEED_DATA and data is None:
        raise ValueError(f'renormalise="{name}" takes moments; give data=batches of inputs')


def _aligned(
    net: Network, a: PyTree, b: PyTree, match: Any, data: Any, key: Any, mask: Any
) -> PyTree:
    if match is None:
        return b
    if match == "weight":
        result = align.match_weights(net, a, b, key=key)
    elif match == "activation":
        result = align.match_activations(net, a, b, data, mask=mask)
    else:
        result = match(a, b)
    return (
        net.spec.permute(b, result.permutations, also={})
        if isinstance(result, align.Alignment)
        else result
    )


def _renormaliser(
    net: Network,
    trees: tuple[PyTree, ...],
    renormalise: Any,
    references: Any,
    data: Any,
    mask: Any,
) -> Callable[[Merged], PyTree | Merged]:
    """The correction as a function of the merged model; measures here what all alphas share."""
    if references is None:
        references = trees
    name, *rest = renormalise if isinstance(renormalise, tuple) else (renormalise,)
    if name is None:
        return lambda merged: merged
    if name == "reset":
        return lambda merged: reset(net, merged, data, mask=mask)
    if name == "remove_bias":
        return lambda merged: renorm.remove_bias(net, merged, last=rest[0])
    if name == "bias_calibration":
        return lambda merged: renorm.calibrate_bias(net, merged, references=trees)
    if callable(name):
        return lambda merged: name(merged, references, data)
    sites = resolve_sites(net, "paper")
    if sites and not isinstance(references, Moments):
        references = moments(net, references, data, sites=sites, mask=mask)
    correct = repair if name == "repair" else rescale
    return lambda merged: correct(net, merged, data, references=references, mask=mask)


@jax.jit
def _mix(trunks: tuple[PyTree, ...], weights: Array) -> PyTree:
    mix: tuple[Any, ...] = tuple(weights)
    return interpolate(trunks, mix)


@dataclasses.dataclass(frozen=True)
class Path:
    """The merged models of all alphas.

    Attributes:
        net: The traced network.
        start: The merged model of some alpha.
        trees: The two networks, aligned.
        loss: As in `interpolation`.
        score: As in `interpolation`.
    """

    net: Network
    start: Merged
    trees: tuple[PyTree, ...]
    loss: Loss | None = None
    score: Loss | None = None

    @functools.cached_property
    def _trunks(self) -> tuple[PyTree, ...]:
        """The leaves of each network that are averaged."""
        averaged = flatten_named(self.start.trunk).leaves
        return tuple(flatten_named(tree).only(averaged) for tree in self.trees)

    def at(self, alpha: float) -> Merged:
        """The merged model at an alpha."""
        weights = 1 - float(alpha), float(alpha)
        trunk = _mix(self._trunks, np.asarray(weights))
        return dataclasses.replace(self.start, trunk=trunk, weights=weights)

    def evaluate(self, model: PyTree | Merged, test: Iterable[Any]) -> Evaluation:
        """Accuracy and loss of a merged model, or of what a renormalisation made of it."""
        if not isinstance(model, Merged):
            model = merge.as_merged(self.net, model, weights=self.start.weights)
        elif model.net is not self.net:
            raise ValueError("renormalise must return a Merged of net, got one of another network")
        return evaluate(model.frame, model.arrays, test, loss=self.loss, score=self.score)
