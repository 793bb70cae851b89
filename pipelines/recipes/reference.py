"""The published design on the cells of the demo: what ours is measured against, at equal width and depth.

    python -m pipelines.simulate runs/demo/atlas
    python -m pipelines.ingest   pipelines.recipes.reference:recipe
    python -m pipelines.pretrain pipelines.recipes.reference:recipe
    python -m pipelines.score    pipelines.recipes.reference:recipe

It shares the demo's store, whose cells it splits alike. See `cellray.model.reference`.
"""

from dataclasses import replace

from cellray.train.recipe import Recipe
from pipelines.recipes import demo


def recipe() -> Recipe:
    base = demo.recipe()
    return replace(
        base,
        method="reference",
        store="runs/demo/store",
        run="runs/reference",
        joint=replace(base.joint, match=1.0),
    )
