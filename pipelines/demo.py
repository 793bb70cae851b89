"""python -m pipelines.demo [key=value …]: simulate an atlas, then the whole path. `make demo` runs it."""

import sys
from collections.abc import Sequence

from cellray.train.recipe import Recipe
from pipelines import full
from pipelines.command import Options, main

CELLS = 6000


def run(recipe: Recipe, options: Options) -> None:
    """Simulate where the recipe expects its atlas, unless it is there, then run everything."""
    from pathlib import Path

    from cellray.data.simulate import Simulation, simulate

    table = Path(recipe.atlas)
    if not table.exists() and not options.dry_run:
        simulate(str(table.parent), Simulation(cells=CELLS, seed=recipe.seed))
    full.run(recipe, options)


def demo(argv: Sequence[str]) -> int:
    """The exit code of the demo with the settings in `argv`."""
    return main(
        "Simulate an atlas and run the whole path on it.", run, ["pipelines.recipes.demo:recipe", *argv]
    )


if __name__ == "__main__":
    sys.exit(demo(sys.argv[1:]))
