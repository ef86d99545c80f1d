"""Which laws hold of networks that others published?

    python experiments/benchmarks/published.py          # all that are installed, half an hour
    python experiments/benchmarks/published.py --networks "hf Bert" "keras LSTM"

Networks of Keras, Haiku, Hugging Face Flax, Equimo, penzai and jraph (extra `zoo`) are built from
small configurations, traced, and held to what should be true of any: permuting its groups changes
nothing, a permuted copy finds back to its order by weights and by activations, PFM ends in the
merged model and in the ensemble, a merge with itself is itself, REPAIR reaches its goals on one
batch, masks leave a network that works, and the report says something. What does not hold is told.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _frame
import _networks
from kit import records, tables
from tqdm import tqdm

import vfjax
from vfjax import align, diagnose, merge, prune, renorm, stats

# Of the size of what is compared: rounding of float32 through tens of layers.
ROUNDING = 1e-3


def lively(variables: Any, seed: int) -> Any:
    """Leaves without ties: initial zeros and ones would hide what is not permuted."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Any:
        leaf = np.asarray(leaf)
        if not np.issubdtype(leaf.dtype, np.floating):
            return leaf
        drawn = rng.normal(size=leaf.shape)
        if "var" in jax.tree_util.keystr(path[-2:]).lower() and (leaf >= 0).all():
            return np.asarray(0.5 + drawn**2, leaf.dtype)
        spread = leaf.std() if leaf.size > 1 else 0.0
        moved = drawn * spread if spread > 1e-3 else leaf + 0.2 * drawn
        return np.asarray(moved, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, variables)


def gap(found: Any, wanted: Any) -> float:
    """The largest difference, relative to the largest entry that is wanted."""
    worst = 0.0
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        size = np.abs(other[np.isfinite(other)]).max(initial=0.0) or 1.0
        with np.errstate(invalid="ignore"):
            change = np.where(one == other, 0, np.abs(one - other))
        worst = max(worst, float(change.max(initial=0.0)) / size)
    return worst


def near(found: Any, wanted: Any, tol: float = ROUNDING) -> str:
    off = gap(found, wanted)
    return "" if off < tol else f"off by {off:.1e} of its size"


class Case:
    """A traced network with two sets of variables."""

    def __init__(self, fn: Callable[..., Any], variables: Any, x: Any) -> None:
        self.a, self.b = lively(variables, 1), lively(variables, 2)
        self.x, self.net = x, vfjax.trace(fn, self.a, x)
        if self.net.norms:
            # As of trained networks: stored statistics of other features would silence these.
            self.a, self.b = (renorm.reset(self.net, tree, [x]) for tree in (self.a, self.b))
        self.merged = merge.interpolate([self.a, self.b])

    def symmetric(self) -> str:
        out = self.net.run(self.a, self.x)
        order = self.net.spec.random(jax.random.key(0), self.a)
        return near(self.net.run(self.net.spec.permute(self.a, order), self.x), out)

    def lost(self, match: Callable[[Any], align.Alignment]) -> tuple[list[str], Any]:
        """The groups of a permuted copy that do not find back to their order, and the copy."""
        spec = self.net.spec
        order = {g: np.asarray(p) for g, p in spec.random(jax.random.key(7), self.a).items()}
        copy = spec.permute(self.a, order)
        found = match(copy).permutations

        def back(group: str) -> bool:
            if group not in found:
                return False
            there = np.take_along_axis(order[group], np.asarray(found[group]), -1)
            return bool((there == np.arange(there.shape[-1])).all())

        return [group for group in order if not back(group)], spec.permute(copy, found)

    def told(self, lost: Sequence[str]) -> str:
        groups = len(self.net.spec.groups)
        if not groups:
            return "there are no groups"
        return f"{len(lost)} of {groups} groups are not found: {lost[0]}" if lost else ""

    def weights(self) -> str:
        key = jax.random.key(0)
        lost, _ = self.lost(lambda copy: align.match_weights(self.net, self.a, copy, key=key))
        return self.told(lost)

    def activations(self) -> str:
        """Units that are dead on all examples may go anywhere: their features are the same."""
        net, x = self.net, self.x
        lost, copy = self.lost(lambda copy: align.match_activations(net, self.a, copy, [x]))
        sites = [tap.name for tap in net.taps if tap.group in lost]
        if {tap.group for tap in net.taps} >= {*lost}:
            features = [net.run(tree, x, capture=sites)[1] for tree in (copy, self.a)]
            lost = lost if near(*features) else []
        return self.told(lost)

    def limits(self) -> str:
        net, pair = self.net, [self.a, self.b]
        first, last = (merge.preserve_first(net, pair, layers=n)(self.x) for n in (0, net.depth))
        outs = [net.run(tree, self.x) for tree in pair]
        mean = jax.tree.map(lambda *o: sum(np.asarray(i, np.float64) for i in o) / 2, *outs)
        told = {
            "l = 0 is not the merged model: ": near(first, net.run(self.merged, self.x)),
            "l = L is not the ensemble: ": near(last, mean),
        }
        return "; ".join(what + off for what, off in told.items() if off)

    def itself(self) -> str:
        net, out = self.net, self.net.run(self.a, self.x)
        for count in (0, net.depth // 2, net.depth):
            off = near(merge.preserve_first(net, [self.a, self.a], layers=count)(self.x), out)
            if off:
                return f"l = {count}: {off}"
        return ""

    def repaired(self) -> str:
        """Whether all pre-activations have the mean and deviation that those of the two have."""
        net, sites = self.net, stats.resolve_sites(self.net, "paper")
        if not sites:
            return "no sites"
        new = renorm.repair(net, self.merged, [self.x], references=[self.a, self.b])
        models = [
            one if isinstance(one, merge.Merged) else merge.as_merged(net, one)
            for one in (self.a, self.b, new)
        ]
        taken = [model.run(self.x, capture=sites)[1] for model in models]
        layers = {layer.name: layer for layer in net.layers}
        for site in sites:
            axes = tuple(layers[site].sample_axes)
            values = [np.asarray(of[site], np.float64) for of in taken]
            (*goals, mean), (*wanted, std) = (
                [of(value, axis=axes) for value in values] for of in (np.mean, np.std)
            )
            goal, centre = sum(wanted) / 2, sum(goals) / 2
            alive = std > 1e-6 * goal.max(initial=0)
            size = max(goal.max(initial=0), np.abs(centre).max(initial=0), 1e-30)
            off = [np.abs(std - goal)[alive].max(initial=0)]
            if not net.norms:  # before a norm without a bias, shifts go into what it subtracts
                off.append(np.abs(mean - centre).max(initial=0))
            if max(off) > 1e-2 * size:
                return f"{site}: off by {max(off) / size:.1e} of its size"
        return ""

    def masked(self) -> str:
        scores = prune.magnitude(self.net, self.a)
        masks = prune.masks(scores, 0.5)
        pruned = prune.apply(self.a, masks)
        out = jax.tree.leaves(self.net.run(pruned, self.x))
        kept = [
            np.asarray(m).mean()
            for m in jax.tree.leaves(masks)
            if np.asarray(m).dtype == bool and not np.asarray(m).all()
        ]
        if not kept:
            return "nothing is pruned"
        return "" if all(np.isfinite(np.asarray(o)).any() for o in out) else "not finite"

    def reported(self) -> str:
        text = str(diagnose.report(self.net, self.merged, [self.x], references=[self.a, self.b]))
        return "" if text else "no words"


LAWS = {
    "check_spec": Case.symmetric,
    "copy, by weights": Case.weights,
    "copy, by activations": Case.activations,
    "limits of PFM": Case.limits,
    "self-merge": Case.itself,
    "REPAIR": Case.repaired,
    "masks": Case.masked,
    "report": Case.reported,
}


def checked(built: _networks.Built) -> dict[str, Any]:
    """What a network has, and by law why it does not hold, or nothing."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case, found = Case(*built), {}
        for name, law in LAWS.items():
            try:
                found[name] = law(case)
            except Exception as error:  # that, too, is what a law comes to
                found[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    net, spec = case.net, case.net.spec
    counts = {"layers": len(net.layers), "depth": net.depth, "norms": len(net.norms)}
    counts |= {"groups": len(spec.groups), "fixed": len(spec.fixed), "parameters": net.params}
    return counts | found | {"seconds": time.perf_counter() - start}


def table(title: str, rows: Sequence[dict[str, Any]]) -> tables.Table:
    """What the networks are, and what holds of them."""
    keys, lines = ("layers", "norms", "groups", "fixed"), []
    for row in rows:
        failed = [f"{name} ({row[name]})" for name in LAWS if row[name]]
        held = f"all but {records.joined(failed)}" if failed else "all"
        lines.append([row["what"], *(str(row[key]) for key in keys), held])
    return tables.Table(title, ["network", *keys, "what holds"], lines)


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the benchmark; returns the path of the record."""
    parser = _frame.parser(__doc__)
    parser.add_argument(
        "--networks", nargs="+", metavar="NAME", choices=_networks.NETWORKS, help="only these"
    )
    args = parser.parse_args(argv)
    names = args.networks or (["equinox MLP"] if args.quick else list(_networks.NETWORKS))
    rows = []
    for name in tqdm(list(filter(_networks.installed, names)), leave=False):
        found = checked(_networks.NETWORKS[name]())
        held = not any(found[law] for law in LAWS)
        rows.append({"what": name} | found | {"target": "all laws", "met": held})
        jax.clear_caches()
    title = "Published networks, built small, with random weights"
    return _frame.finish("published", args, title, rows, table(title, rows))


if __name__ == "__main__":
    main()
