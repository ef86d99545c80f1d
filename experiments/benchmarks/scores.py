"""What scores of weights cost: magnitude and Wanda on ResNet50, WoodFisher on ResNet20.

    python experiments/benchmarks/scores.py

Magnitude and Wanda (on 8 random images of 224 x 224), masks included, prune the 25 million
parameters of a ResNet50; the aim is 30 seconds each, compilation included. WoodFisher inverts the
Fisher matrix of 400 gradients of the full ResNet20, each layer a block, in a process of its own,
whose memory is its largest resident size; the aim is 2 minutes and 2 GB. Then its time and memory
against the number of gradients and the size of blocks, which the figure shows.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _frame

import vfjax
from vfjax import models, plot, prune

SECONDS, MINUTES, GIGABYTES = 30, 2, 2
COUNTS, BLOCKS = (50, 100, 200, 400), (100, 300, 1000, 3000, None)


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the benchmark; returns the path of the record."""
    p = _frame.parser(__doc__)
    p.add_argument("--child", metavar="JSON", help="one WoodFisher run: used by the benchmark")
    args = p.parse_args(argv)
    if args.child:
        print(json.dumps(woodfisher_run(**json.loads(args.child))))
        return Path()
    rows = large_rows(args)
    model = {"name": "digits-conv"} if args.quick else {"name": "resnet20"}
    counts = (8,) if args.quick else COUNTS
    blocks = (None,) if args.quick else BLOCKS
    by_count = [in_process(**model, count=count, block=None) for count in counts]
    by_block = [in_process(**model, count=counts[-1], block=block) for block in blocks[:-1]]
    by_block.append(by_count[-1])
    worst = by_count[-1]
    rows.append(
        {
            "what": f"WoodFisher, {model['name']}, {counts[-1]} gradients, whole layers, "
            f"{worst['bytes'] / 1e9:.2f} GB",
            **worst,
            "target": f"<= {60 * MINUTES} s, {GIGABYTES} GB",
            "met": worst["seconds"] <= 60 * MINUTES and worst["bytes"] <= GIGABYTES * 1e9,
        }
    )
    for found in (*by_count[:-1], *by_block[:-1]):
        block = "whole layers" if found["block"] is None else f"blocks of {found['block']}"
        what = f"WoodFisher, {found['count']} gradients, {block}, {found['bytes'] / 1e9:.2f} GB"
        rows.append({"what": what, **found})
    path = _frame.finish("scores", args, "scores of weights", rows)
    plot.save(figure_of(by_count, by_block), path.with_suffix(".png"))
    return path


def large_rows(args: Any) -> list[dict[str, Any]]:
    """Magnitude and Wanda on a large network."""
    if not args.quick:
        # A cache would hide what compiling takes.
        jax.config.update("jax_enable_compilation_cache", False)
    name, shape = ("digits-conv", (8, 8, 8, 1)) if args.quick else ("resnet50", (8, 224, 224, 3))
    model = models.create(name)
    x = jax.random.normal(jax.random.key(0), shape)
    tree = jax.jit(model.init)(jax.random.key(1), x)
    net = vfjax.trace(models.apply_fn(model), tree, x)
    scores: dict[str, Callable[[], prune.Scores]] = {
        "magnitude": lambda: prune.magnitude(net, tree),
        "Wanda": lambda: prune.wanda(net, tree, [x]),
    }
    rows = []
    for method, score in scores.items():
        scope = "row" if method == "Wanda" else "global"

        def run(score: Callable[[], prune.Scores] = score, scope: str = scope) -> Any:
            mask = prune.masks(score(), 0.8, scope=scope)
            return jax.block_until_ready(prune.apply(tree, mask))

        # The first call compiles, as a user's does.
        first, *later = (seconds_of(run) for _ in range(1 + max(args.repeats, 1)))
        what = f"{method}, {name}, {net.parameters / 1e6:.1f} M parameters"
        verdict = {"target": f"<= {SECONDS} s", "met": first <= SECONDS}
        rows.append({"what": f"{what}, compilation included", "seconds": first, **verdict})
        rows.append({"what": f"{what}, compiled", "seconds": statistics.median(later)})
    return rows


def seconds_of(run: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def woodfisher_run(name: str, count: int, block: int | None) -> dict[str, Any]:
    """One run in this process: its seconds and the largest memory it had."""
    model = models.create(name)
    # A cache would hide what compiling takes.
    jax.config.update("jax_enable_compilation_cache", False)
    shape = (count, 8, 8, 1) if name.startswith("digits") else (count, 32, 32, 3)
    x = jax.random.normal(jax.random.key(0), shape)
    label = jax.random.randint(jax.random.key(2), (count,), 0, 10)
    tree = jax.jit(model.init)(jax.random.key(1), x[:1])
    net = vfjax.trace(models.apply_fn(model), tree, x[:1])

    start = time.perf_counter()
    inverse = prune.inverse_fisher(
        net, tree, [(x, label)], count=count, block_size=block, max_memory=GIGABYTES * 10**9
    )
    found = inverse.scores
    jax.block_until_ready(inverse.prune(tree, prune.masks(found, 0.8)))
    seconds = time.perf_counter() - start
    return {
        "count": count,
        "block": block,
        "largest_block": min(block or 2**31, max(rows.size for rows in found.rows.values())),
        "seconds": seconds,
        "bytes": largest_memory(),
    }


def largest_memory() -> int:
    """The largest resident size that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux hands ru_maxrss on from the parent of a process; this is the process's own.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def in_process(**options: Any) -> dict[str, Any]:
    """The same in a process of its own, so that memory is that of this run."""
    command = [sys.executable, __file__, "--child", json.dumps(options)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def figure_of(by_count: Sequence[dict[str, Any]], by_block: Sequence[dict[str, Any]]) -> Any:
    """Seconds and gigabytes against gradients, and against the size of blocks."""
    sides = (
        ("gradients, whole layers", [found["count"] for found in by_count], by_count),
        (
            f"weights of the largest block, {by_block[0]['count']} gradients",
            [found["largest_block"] for found in by_block],
            by_block,
        ),
    )
    units = (("seconds", "seconds", 1.0), ("largest memory", "GB", 1e-9))
    return plot.panels(
        [
            plot.Panel(
                title,
                label,
                unit,
                {title: plot.Curve(x, [f[key] * scale for f in runs], colour=colour)},
                log_x=True,
                y_limits=(0, 1.1 * max(f[key] * scale for f in runs)),
            )
            for label, x, runs in sides
            for colour, ((title, unit, scale), key) in enumerate(
                zip(units, ("seconds", "bytes"), strict=True)
            )
        ],
        title="WoodFisher: scores, masks and update",
        columns=2,
    )


if __name__ == "__main__":
    main()
