"""Do residual connections help against vanishing features, in linear networks that are averaged?

    python experiments/residual_linear.py                        # MNIST, five pairs each
    python experiments/residual_linear.py --dataset digits       # needs no data
    python experiments/residual_linear.py --seeds 0 1            # one pair

Linear networks of 5 layers, 784-32-32-32-32-10 with biases, as they are and with skips around
layers 2 to 4, are trained with the paper's recipe (Adam at 0.01, 20 epochs, weights of standard
deviation 0.005 at the start). Pairs that differ in their random seed are averaged, directly and
after matching the second network's weights to the first's.

The paper ("Vanishing Feature", mean of 5 runs): networks with skips lose less accuracy between the
two ends, averaged directly as well as after weight matching.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
from kit import claims, figures, grid, records, tables
from kit.claims import Claim, Decision
from kit.experiment import Run
from kit.records import Record, Row

from vfjax import diagnose, models, train

PLAIN = models.LinearNetwork(width=32, depth=5, std=0.005)
MODELS = {"plain": PLAIN, "residual": dataclasses.replace(PLAIN, residual=True)}
MATCHES = {"direct": "direct", "weight": "weights matched"}
# Lines of the table and of the figure: what their rows have.
LINES = {
    f"{kind}, {text}": {"network": network, "merged": merged}
    for network, kind in {"plain": "plain", "residual": "with skips"}.items()
    for merged, text in MATCHES.items()
}


def measure(config: Any, run: Run) -> Iterator[Row]:
    """Accuracy and loss along alpha, without and with skips, direct and matched."""
    work = run.setup
    pairs = range(len(work.pairs))
    plan = ({"network": n, "pair": k, "merged": m} for n in MODELS for k in pairs for m in MATCHES)
    for cell in run.cells(plan):
        name, k, merged = cell.values()
        trees = [one.variables for one in work.trained(name, k)]
        match = None if merged == "direct" else merged
        key = jax.random.key(work.pairs[k][0])
        with run.watch(f"interpolation, {merged}"):
            net = work.nets[name]
            found = diagnose.interpolation(net, trees, work.test, match=match, key=key)
        yield from records.curve_rows(cell, found)


def less_is_lost(record: Record, merged: str) -> Decision:
    plain, skips = (record.rows.where(network=name, merged=merged) for name in MODELS)
    middles = [rows.mean(alpha=0.5) for rows in (skips, plain)]
    barriers = [rows.mean("barrier") for rows in (skips, plain)]
    here = "midpoint {:.1f}% with skips and {:.1f}% without, barriers of {:.1f} and {:.1f} points"
    holds = claims.beyond(barriers[1] - barriers[0], claims.free(record, middles[1]))
    near = claims.near_chance(record, *middles)
    return None if near else holds, here.format(*(100 * value for value in middles + barriers))


CLAIMS = [
    Claim(f"vf.residual.{merged}", f"{text}, networks with skips lose less accuracy in between",
          "they lose less (mean of 5 runs)",
          functools.partial(grid.over_pairs, rule=functools.partial(less_is_lost, merged=merged)),
          by="the mean barrier of accuracy is lower with them; two standard errors of the plain "
          "midpoint are level, and so are midpoints near chance")
    for merged, text in MATCHES.items()
]  # fmt: skip


def finding_of(record: Record) -> str:
    means = [f"{100 * record.rows.mean(**where, alpha=0.5):.1f}%" for where in LINES.values()]
    return "With skips midpoints have {2}, without {0}; matched {3} and {1}".format(*means)


def tables_of(record: Record) -> list[tables.Table]:
    columns = [
        tables.Column("edge models, %", {"alpha": (0.0, 1.0)}),
        tables.Column("midpoint, %", {"alpha": 0.5}),
        tables.Column("barrier, points", key="barrier"),
        tables.Column("loss barrier, nats", key="loss_barrier", show=tables.number()),
    ]
    return [tables.pivot(record.rows, LINES, columns, title=record["title"], corner="network")]


def figure_of(record: Record) -> Any:
    """Accuracy and loss against alpha."""
    panels = []
    for key, y, scale in (("accuracy", figures.ACCURACY, 100), ("loss", "cross-entropy (nats)", 1)):
        lines = [
            figures.line(record.rows, "alpha", key, name=name, scale=scale, method=k // 2,
                         dashed=where["merged"] == "direct", **where)
            for k, (name, where) in enumerate(LINES.items())
        ]  # fmt: skip
        panels.append(figures.Panel(f"test {key}", "alpha, weight of the second network", y, lines))
    return figures.of_record(record, panels, bars=grid.bars(record))


LEGEND = """Here skips stay exact: what is added to a layer's output is its input. So units of all
layers along the skips are permuted alike, which leaves matching one permutation where the plain
network has four. The paper's code holds the identities of the skips as buffers, permutes each
layer's units apart and averages what this makes of the identities, so that after matching its
networks have other skips than the ones that were trained."""
EXPERIMENT = grid.linear(
    train.RECIPES["paper-linear"], MODELS, name="residual_linear", doc=__doc__, measure=measure,
    finding=finding_of, figure=figure_of, tables=tables_of, claims=CLAIMS, legend=LEGEND,
)  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
