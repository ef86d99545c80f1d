"""Do residual connections help against vanishing features, in linear networks that are averaged?

    python experiments/residual_linear.py                        # MNIST, five pairs each
    python experiments/residual_linear.py --dataset digits       # needs no data
    python experiments/residual_linear.py --seeds 0 1            # one pair

Linear networks of 5 layers, 784-32-32-32-32-10 with biases, as they are and with skips around
layers 2 to 4, are trained with the paper's recipe (Adam at 0.01, 20 epochs, weights of standard
deviation 0.005 at the start). Pairs that differ in their random seed are averaged with weights
1 - alpha and alpha, directly and after matching the second network's weights to the first's.

The paper ("Vanishing Feature", mean of 5 runs): networks with skips lose less accuracy between the
two ends, averaged directly as well as after weight matching.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
from kit import claims, figures, grid, records, tables
from kit.claims import Claim, Decision
from kit.experiment import Experiment, Run
from kit.records import Record, Row

from vfjax import diagnose, models, train

MODEL = models.LinearNetwork(width=32, depth=5, std=0.005)
RECIPE = train.RECIPES["paper-linear"]
NETWORKS = {"plain": "plain", "residual": "with skips"}
MATCHES = {"direct": "direct", "weight": "weights matched"}
ALPHAS = 11


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config(grid.LinearOptions):
    seeds: tuple[int, ...] = grid.seeds(range(10))
# fmt: on


def measure(config: Config, run: Run) -> Iterator[Row]:
    """Accuracy and loss along alpha, without and with skips, direct and matched."""
    work: grid.Linear = run.setup
    test = work.batches("test")

    @functools.lru_cache(maxsize=1)
    def trained(name: str, k: int) -> list[Any]:
        with run.watch("training"):
            model, seeds = work.models[name], work.pairs[k]
            runs = train.fit_seeds(model, work.recipe, work.dataset, seeds=seeds)
            return [one.variables for one in runs]

    plan = [
        {"network": name, "pair": k, "merged": merged}
        for name in NETWORKS for k in range(len(work.pairs)) for merged in MATCHES
    ]  # fmt: skip
    for cell in run.cells(plan):
        name, k, merged = cell.values()
        trees = trained(name, k)
        match: dict[str, Any] = {}
        if merged == "weight":
            match = {"match": merged, "key": jax.random.key(work.pairs[k][0])}
        with run.watch(f"interpolation, {merged}"):
            found = diagnose.interpolation(work.nets[name], trees, test, alphas=ALPHAS, **match)
        yield from records.curve_rows(cell, found)


def middle(record: Record, network: str, merged: str) -> list[float]:
    return record.rows.values(network=network, merged=merged, alpha=0.5)


def less_is_lost(record: Record, merged: str) -> Decision:
    plain, skips = (middle(record, name, merged) for name in NETWORKS)
    barriers = [record.rows.mean("barrier", network=name, merged=merged) for name in NETWORKS]
    means = [records.mean_std(values)[0] for values in (plain, skips)]
    better = sum(s > p for s, p in zip(skips, plain, strict=True))
    here = f"midpoint {tables.percent(skips)} with skips and {tables.percent(plain)} without "
    here += f"(better with them in {better} of {len(plain)} pairs; mean barriers "
    here += f"{100 * barriers[1]:.1f} and {100 * barriers[0]:.1f} points)"
    gap, free = barriers[0] - barriers[1], claims.free(record, means[0])
    near = claims.near_chance(record, *means) or abs(gap) <= free
    return None if near else gap > 0, here


CLAIMS = [
    Claim(f"vf.residual.{merged}", f"{text}, networks with skips lose less accuracy in between",
          "they lose less (mean of 5 runs)", functools.partial(less_is_lost, merged=merged),
          by="the mean barrier of accuracy is lower with them; two standard errors of the plain "
          "midpoint are level, and so are midpoints near chance")
    for merged, text in MATCHES.items()
]  # fmt: skip


def title_of(record: Record) -> str:
    what = f"linear networks of {MODEL.depth} layers, {MODEL.width} wide"
    return grid.titled(record, what, len(record.rows.distinct("pair")))


def finding_of(record: Record) -> str:
    means = {(n, m): f"{100 * records.mean_std(middle(record, n, m))[0]:.1f}%"
             for n in NETWORKS for m in MATCHES}  # fmt: skip
    text = "With skips midpoints have {}, without {}; matched {} and {}"
    order = [(network, merged) for merged in MATCHES for network in ("residual", "plain")]
    return text.format(*(means[name] for name in order))


def lines_of() -> dict[str, dict[str, str]]:
    """By its name, what the rows of a network and a matching have."""
    return {
        f"{kind}, {text}": {"network": network, "merged": merged}
        for network, kind in NETWORKS.items()
        for merged, text in MATCHES.items()
    }


def tables_of(record: Record) -> list[tables.Table]:
    columns = [
        tables.Column("edge models, %", {"alpha": (0.0, 1.0)}),
        tables.Column("midpoint, %", {"alpha": 0.5}),
        tables.Column("barrier, points", key="barrier"),
        tables.Column("loss barrier, nats", key="loss_barrier", show=tables.number()),
    ]
    about = {"title": record["title"], "corner": "network"}
    return [tables.pivot(record.rows, lines_of(), columns, **about)]


def figure_of(record: Record) -> Any:
    """Accuracy and loss against alpha."""
    row = []
    for key, y, scale in (("accuracy", figures.ACCURACY, 100), ("loss", "cross-entropy (nats)", 1)):
        lines = [
            figures.line(record.rows, "alpha", key, name=name, scale=scale,
                         method=list(NETWORKS).index(where["network"]),
                         dashed=where["merged"] == "direct", **where)
            for name, where in lines_of().items()
        ]  # fmt: skip
        limits = (0, 101) if key == "accuracy" else None
        x = "alpha, weight of the second network"
        row.append(figures.Panel(f"test {key}", x, y, lines, y_limits=limits))
    bars = f"standard deviation over {len(record.rows.distinct('pair'))} pairs"
    return figures.of_record(record, row, bars=bars)


LEGEND = """Here skips stay exact: what is added to a layer's output is its input. So units of all
layers along the skips are permuted alike, which leaves matching one permutation where the plain
network has four. The paper's code holds the identities of the skips as buffers, permutes each
layer's units apart and averages what this makes of the identities, so that after matching its
networks have other skips than the ones that were trained."""
EXPERIMENT = Experiment(
    name="residual_linear", doc=__doc__, options=Config, measure=measure,
    prepare=grid.linear(RECIPE, {name: dataclasses.replace(MODEL, residual=name == "residual")
                                 for name in NETWORKS}),
    title=title_of, finding=finding_of, figure=figure_of, tables=tables_of, claims=CLAIMS,
    legend=LEGEND, stem=grid.stem, untold=lambda record: record["config"]["quick"])  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
