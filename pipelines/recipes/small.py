"""Ten thousand cells on a laptop: half an hour on two cores."""

from cellray.train.recipe import Distil, Feed, Joint, Network, Recipe, StudentNetwork, Unimodal


def recipe() -> Recipe:
    return Recipe(
        run="runs/small",
        feed=Feed(cells=64, tokens=16_384),
        network=Network(width=128, layers=2, heads=4, fusion_layers=2),
        student=StudentNetwork(hidden=256, blocks=2),
        unimodal=Unimodal(epochs=4.0),
        joint=Joint(epochs=6.0),
        distil=Distil(epochs=20.0),
    )
