"""`make demo`: about 6,000 simulated cells in minutes on two cores."""

from dataclasses import replace

from cellray.train.recipe import Ingest, Recipe
from pipelines.recipes import small


def recipe() -> Recipe:
    base = small.recipe()
    return replace(
        base,
        atlas="runs/demo/atlas/atlas.csv",
        run="runs/demo",
        ingest=Ingest(unit_cells=1024, shard_bytes=1 << 20),
        network=replace(base.network, width=64, heads=2),
        student=replace(base.student, hidden=128, blocks=2),
        unimodal=replace(base.unimodal, epochs=8.0),
        joint=replace(base.joint, epochs=10.0, match=0.2, others=1.0),
        distil=replace(base.distil, epochs=12.0),
        score=replace(base.score, targets="runs/demo/atlas/truth.csv"),
    )
