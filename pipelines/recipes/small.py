"""Ten thousand cells on a laptop, in less than half an hour on two cores.

Encoders attend to the 32 highest-ranked features of a cell, and gather all of them into [CLS].
On SNARE-seq more passes over the cells in this way gave a better teacher than fewer passes with a
context of 512. That was one run each on a busy machine: a choice, not a measured comparison.
"""

from dataclasses import replace

from cellray.data.modalities import BUILT_IN
from cellray.train.recipe import Distil, Feed, Joint, Network, Recipe, StudentNetwork, Unimodal


def recipe() -> Recipe:
    return Recipe(
        run="runs/small",
        modalities=tuple(replace(modality, context=32) for modality in BUILT_IN),
        feed=Feed(cells=64, tokens=65_536),
        network=Network(width=128, layers=2, heads=4, fusion_layers=2),
        student=StudentNetwork(hidden=256, blocks=2),
        unimodal=Unimodal(epochs=12.0),
        joint=Joint(epochs=16.0),
        distil=Distil(epochs=24.0),
    )
