"""Cells with known structure for the tests of scoring: types, a hidden state, three modalities."""

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellray.data.modalities import BUILT_IN
from cellray.tasks.inputs import Scored

WIDTH = 8


def made(*, number=700, donors=5, unit="donor", seed=0, **changes):
    """A `Scored` of one paired data set "paired"; a truth that the student knows and RNA hides.

    The state is in ATAC and protein only. The student's embedding holds types and state, the
    RNA-only one types alone, the teacher's both with less noise.
    """
    rng = np.random.default_rng(seed)
    kind, state = rng.integers(0, 3, number), rng.normal(size=number)
    design = np.column_stack([kind == 0, kind == 1, kind == 2, state]).astype(float)

    def rates(features, scale, without_state):
        effect = rng.normal(size=(4, features)) * scale
        effect[3] *= not without_state
        return design @ effect

    counts = {
        "rna": sp.csr_matrix(rng.poisson(np.exp(rates(60, 0.8, True)))),
        "atac": sp.csr_matrix((rng.random((number, 40)) < 1 / (1 + np.exp(1 - rates(40, 1.0, False)))) * 1),
        "protein": sp.csr_matrix(rng.poisson(np.exp(2 + rates(10, 0.6, False)))),
    }
    noise = [rng.normal(size=(number, WIDTH)) for _ in range(4)]
    axes = rng.normal(size=(4, WIDTH))
    blind = design * [1, 1, 1, 0]
    logits = {m: c.toarray().mean(axis=0) for m, c in counts.items()}
    good = {m: np.log(c.toarray() + 0.5) for m, c in counts.items()}
    donor = np.array([f"d{i}" for i in rng.integers(0, donors, number)])
    frame = pd.DataFrame(
        {
            "cell_id": [f"paired:c{i}" for i in range(number)],
            "dataset": "paired",
            "donor": donor,
            "batch": "",
            "label": np.array(["B", "T", "NK"])[kind],
            "test": np.isin(donor, ["d0", "d1"]) if unit == "donor" else rng.random(number) < 0.3,
        }
    )
    facts: dict[str, Any] = {
        "cells": frame,
        "units": {"paired": unit},
        "modalities": BUILT_IN,
        "counts": counts,
        "totals": {m: np.asarray(c.sum(axis=1)).ravel() for m, c in counts.items()},
        "present": {m: np.ones(number, bool) for m in counts},
        "embeddings": {
            "student": (design @ axes + 0.5 * noise[0]).astype(np.float32),
            "teacher": (design @ axes + 0.2 * noise[1]).astype(np.float32),
            "rna_only": (blind @ axes + 0.5 * noise[2]).astype(np.float32),
            "random": noise[3].astype(np.float32),
        },
        "translate": {
            "student": lambda m, rows, features, level: good[m][np.ix_(rows, features)],
            "random": lambda m, rows, features, level: np.tile(logits[m][features], (len(rows), 1)),
        },
        "targets": pd.DataFrame({"cell_id": frame["cell_id"], "state": state}),
    }
    return Scored(**(facts | changes))
