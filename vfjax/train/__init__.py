"""Training recipes, and the loop that follows them.

The experiments merge the networks that it trains; the rest of the library does not need it.

- `recipe_for(model, dataset, preset="cpu")` returns a `Recipe`, a value to print, store or change.
- `fit(model, recipe, dataset, seed=0)` trains; `fit_seeds` trains one network for each seed.
- `evaluate(forward, variables, batches)` measures accuracy and loss of any `forward(variables, x)`,
  also that of a `vfjax.merge.Merged`.

    >>> import numpy as np
    >>> x, label = np.eye(2, dtype=np.float32), np.array([0, 1])
    >>> evaluate(lambda v, x: x @ v, 9 * np.eye(2, dtype=np.float32), [(x, label)]).accuracy
    1.0

The state of a run is a pytree whose only clock is its step counter: the order of the images and
their augmentation follow from the seed and the step, so a run that was killed and resumed ends with
exactly the numbers of one that was not.
"""

from __future__ import annotations

from vfjax._passes.evaluation import Evaluation as Evaluation
from vfjax._passes.evaluation import evaluate as evaluate
from vfjax.train._fit import Trained as Trained
from vfjax.train._fit import augment as augment
from vfjax.train._fit import fit as fit
from vfjax.train._fit import fit_seeds as fit_seeds
from vfjax.train._recipes import PRESETS as PRESETS
from vfjax.train._recipes import RECIPES as RECIPES
from vfjax.train._recipes import Recipe as Recipe
from vfjax.train._recipes import recipe_for as recipe_for

__all__ = [
    "PRESETS",
    "RECIPES",
    "Evaluation",
    "Recipe",
    "Trained",
    "augment",
    "evaluate",
    "fit",
    "fit_seeds",
    "recipe_for",
]
