"""Records what POT and ott-jax find for transport problems, for `tests/align/test_plans.py`.

pip install ".[oracle]" && python tests/oracles/record_transport.py
"""

import json
import pathlib

import jax
import numpy as np
import ot
import ott
from closed_form import transport_problem
from ott.geometry.geometry import Geometry
from ott.problems.linear.linear_problem import LinearProblem
from ott.solvers.linear.sinkhorn import Sinkhorn

SHAPES = ((7, 7), (6, 9), (10, 4))
REGULARIZATION = (1.0, 0.3, 0.1)


def solve(n, m, equal):
    """Both libraries' answers to one problem."""
    cost, rows, columns = transport_problem(n, m)
    if equal:
        rows, columns = np.full(n, 1 / n), np.full(m, 1 / m)
    entropic = {}
    for part in REGULARIZATION:
        epsilon = part * cost.mean()
        options = {"method": "sinkhorn_log", "stopThr": 1e-10, "numItermax": 100_000}
        pot = ot.sinkhorn(rows, columns, cost, epsilon, **options)
        problem = LinearProblem(Geometry(cost, epsilon=epsilon), a=rows, b=columns)
        found = Sinkhorn(threshold=1e-10, max_iterations=100_000)(problem)
        entropic[part] = {"pot": pot.round(8).tolist(), "ott": found.matrix.round(8).tolist()}
    exact = float((ot.emd(rows, columns, cost) * cost).sum())
    return {"n": n, "m": m, "equal": equal, "exact": exact, "entropic": entropic}


def main():
    """Writes the record beside this file."""
    jax.config.update("jax_enable_x64", True)
    record = {
        "versions": {"POT": ot.__version__, "ott-jax": ott.__version__},
        "problems": [solve(n, m, equal) for n, m in SHAPES for equal in (True, False)],
    }
    path = pathlib.Path(__file__).with_name("transport.json")
    path.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
