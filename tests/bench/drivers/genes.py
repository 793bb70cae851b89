"""All genes as tokens, as published and at the least, and non-zero genes alone, as here: cells with a known
number of non-zero genes, forward, or forward and backward.

python -m tests.bench.drivers.genes WAY PASS LAYERS PRECISION
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
import torch.nn.functional as F

from cellray.data.modalities import RNA
from cellray.model.teacher import Teacher
from cellray.train import recipe
from cellray.train.batches import plain_tokens
from cellray.train.stages import Unimodal
from tests.bench.harness.serve import Delivery, serve
from tests.bench.training.networks import AllGenes, Shape, cheapest, published
from tests.bench.training.stores import batch

NONZERO = 1_800
CELLS = 8
"""Cells of a batch here; of the networks over all genes, one cell fills the machine."""
CONTEXTS = {"ours": 4_096, "ours, first 512": 512}
"""Most tokens that attend: more than there are, with those asked for, or as many as by default."""


def all_genes(network: AllGenes, backward: bool) -> Iterator[Delivery]:
    """One cell after the other; backward from the classes of hidden genes, 15 of 100."""
    genes = network.gene.shape[0]
    classes = torch.randint(0, 7, (1, genes), generator=torch.Generator().manual_seed(0))
    hidden = torch.arange(genes) % 7 == 0
    while True:
        if backward:
            F.cross_entropy(network(classes)[:, hidden].flatten(0, 1).float(), classes[0, hidden]).backward()
            network.zero_grad(set_to_none=True)
        else:
            with torch.inference_mode():
                network(classes)
        yield 1, genes, None


def ours(shape: Shape, context: int, backward: bool) -> Iterator[Delivery]:
    """Batches of CELLS cells; backward from all of stage 1, with what it hides, asks for and rebuilds."""
    words, cells = batch(cells=CELLS, genes=shape.genes, nonzero=NONZERO)
    counts = cells.counts["rna"]
    rna = replace(RNA, context=context)
    torch.manual_seed(0)
    teacher = Teacher(
        {"rna": (rna, shape.genes)},
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        fusion_layers=1,
    )
    teacher.start(words.vocabularies)
    vocabulary = replace(words.vocabularies["rna"], modality=rna)
    words = replace(words, vocabularies={"rna": vocabulary})
    stage = Unimodal(recipe.Unimodal(), teacher, words, "rna", seed=0, device="cpu")
    for step in range(1 << 40):
        if backward:
            losses = stage.losses(cells, step).values()
            sum((x.weight / max(x.count, 1.0) * x.sum for x in losses), torch.zeros(())).backward()
            teacher.zero_grad(set_to_none=True)
        else:
            with torch.inference_mode():
                teacher.encoder("rna")(plain_tokens(counts, rna))
        yield len(counts), len(counts.ids), None


def deliveries(way: str, shape: Shape, *, backward: bool) -> Iterator[Delivery]:
    """One pass of one way."""
    if way in CONTEXTS:
        return ours(shape, CONTEXTS[way], backward)
    torch.manual_seed(0)
    networks: dict[str, Callable[[Shape], AllGenes]] = {"published": published, "cheapest": cheapest}
    return all_genes(networks[way](shape), backward)


def precision(name: str) -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16")


def main() -> None:
    way, passes, layers, name = sys.argv[1:]
    torch.set_num_threads(1)
    with precision(name):
        found = deliveries(way, Shape(layers=int(layers)), backward=passes == "both")
        serve(lambda: found, about=f"{layers} layers, {name}")


if __name__ == "__main__":
    main()
