"""A small model with random weights, its cells, and its bundle: for tests of what answers with one."""

import numpy as np
import scipy.sparse as sp
import torch

from cellray.data.modalities import ATAC, RNA
from cellray.data.tokens import POOLED, Counts, Tokenizer, Vocabulary
from cellray.embedder import Embedder, tokens_from
from cellray.model.student import build
from tests.attentive import attentive

GENES = tuple(f"ENSG{i:011d}" for i in range(120))
SYMBOLS = tuple(f"GENE{i}" for i in range(120))
PEAKS = tuple(f"chr1:{i * 1000}-{i * 1000 + 500}" for i in range(30))


def counts(cells=100, *, seed=0):
    """Raw counts [cells, genes] of two kinds of cell, float32; odd rows are of the second kind."""
    rng = np.random.default_rng(seed)
    rates = np.random.default_rng(9).gamma(0.4, 4.0, size=(2, len(GENES))) + 0.1
    depth = rng.lognormal(0, 0.5, size=(cells, 1))
    drawn = rng.poisson(depth * rates[np.arange(cells) % 2])
    return sp.csr_matrix(drawn.astype(np.float32))


def vocabulary(modality, ids, symbols, matrix):
    sums = np.asarray(matrix.sum(axis=0)).ravel().astype(np.int64)
    nonzero = np.asarray((matrix > 0).sum(axis=0)).ravel().astype(np.int64)
    first = np.arange(len(ids)) % 3
    return Vocabulary(
        modality,
        ids,
        symbols,
        {POOLED: sums, "10x": sums + first},
        {POOLED: nonzero, "10x": nonzero},
        {POOLED: matrix.shape[0], "10x": matrix.shape[0]},
    )


def tokenizer():
    peaks = sp.random(50, len(PEAKS), 0.3, format="csr", random_state=0)
    return Tokenizer(
        {
            "rna": vocabulary(RNA, GENES, SYMBOLS, counts(200, seed=1)),
            "atac": vocabulary(ATAC, PEAKS, ("",) * len(PEAKS), peaks.sign()),
        }
    )


def tokens(cells=100, *, seed=0) -> Counts:
    return tokens_from(tokenizer(), counts(cells, seed=seed), GENES)[0]


SIZES = {
    "mlp": {"width": 16, "hidden": 24, "blocks": 2},
    "transformer": {"width": 16, "layers": 2, "heads": 2, "context": 60},
}


def embedder(*, labelled=True, kind="mlp"):
    words = tokenizer()
    modalities = {name: (v.modality, len(v)) for name, v in words.vocabularies.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = attentive(build(kind, modalities, SIZES[kind]))
        student.start(words.vocabularies)
    labels = ["neuron", "glia"] * 100 if labelled else [""] * 200
    about = {
        "name": "tiny",
        "datasets": [{"name": "a", "cells": 200, "donors": ["d1", "d2"], "species": "human"}],
        "donors": ["d1"],
        "scores": [{"task": "annotation", "model": "student", "value": 0.91234, "verdict": "ties"}],
        "run": {"recipe": "ab" * 32},
    }
    return Embedder.fit(student, words, tokens(200, seed=1), labels, about=about)
