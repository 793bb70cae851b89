"""The smallest thing that goes the whole way, in seconds: for tests. Its scores mean nothing."""

from cellray.train.recipe import (
    Distil,
    Feed,
    Ingest,
    Joint,
    Network,
    Recipe,
    Score,
    StudentNetwork,
    Unimodal,
)


def recipe() -> Recipe:
    return Recipe(
        run="runs/tiny",
        checkpoint_seconds=1.0,
        precision="fp32",
        ingest=Ingest(unit_cells=512, shard_bytes=256 << 10),
        feed=Feed(cells=64, tokens=16_384),
        network=Network(width=32, layers=1, heads=2, fusion_layers=1),
        student=StudentNetwork(hidden=64, blocks=1),
        unimodal=Unimodal(epochs=1.0),
        joint=Joint(epochs=1.0),
        distil=Distil(epochs=2.0),
        score=Score(bootstrap=100),
    )
