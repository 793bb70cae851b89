"""`make demo`: about 6,000 simulated cells in minutes on two cores."""

from dataclasses import replace

from cellray.train.recipe import Feed, Ingest, Recipe
from pipelines.recipes import small


def recipe() -> Recipe:
    base = small.recipe()
    return replace(
        base,
        atlas="runs/demo/atlas/atlas.csv",
        run="runs/demo",
        ingest=Ingest(unit_cells=1024, shard_bytes=1 << 20),
        feed=Feed(cells=64, tokens=32_768),
        network=replace(base.network, width=64, layers=2, heads=2),
        student=replace(base.student, hidden=128),
        modalities=tuple(replace(m, context=128) for m in base.modalities),
        unimodal=replace(base.unimodal, epochs=1.0),
        joint=replace(base.joint, epochs=2.0),
        distil=replace(base.distil, epochs=12.0),
        score=replace(base.score, targets="runs/demo/atlas/truth.csv"),
    )
