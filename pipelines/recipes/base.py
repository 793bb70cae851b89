"""An atlas on a cluster: GPUs, a worker each. Never run at full size on the machines the tests run on."""

from cellray.data.modalities import ATAC, PROTEIN, RNA
from cellray.train.recipe import Distil, Feed, Joint, Network, Recipe, StudentNetwork, Unimodal, override


def recipe() -> Recipe:
    base = Recipe(
        run="runs/base",
        workers=8,
        gpu=True,
        checkpoint_seconds=300.0,
        feed=Feed(cells=4096, tokens=4 << 20),
        network=Network(width=512, layers=12, heads=8, fusion_layers=4),
        student=StudentNetwork(hidden=1024, blocks=4),
        unimodal=Unimodal(epochs=2.0),
        joint=Joint(epochs=2.0),
        distil=Distil(epochs=4.0),
        modalities=(RNA, ATAC, PROTEIN),
    )
    return override(base, {"optim.lr": 3e-4, "modalities.rna.context": 2048, "modalities.atac.context": 2048})
