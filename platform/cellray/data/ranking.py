"""Tokens back into rank order, where the assay is unknown or there are several: by the pooled means."""

import numpy as np

from cellray.data.tokens import POOLED, Counts, Tokenizer


def pooled_weight(tokenizer: Tokenizer, modality: str) -> np.ndarray:
    """1 / non-zero mean of each feature over all assays together, float32 [features]."""
    weight: np.ndarray = tokenizer.weights(modality, [POOLED])[0][0]
    return weight


def by_rank(counts: Counts, weight: np.ndarray) -> Counts:
    """The same cells, the tokens of each by falling count x `weight` [features], ties in id order.

    The product is taken in float32, as in `Tokenizer.rank`: tokens of a store with a single assay,
    which are in that order, come back as they are.
    """
    score = counts.counts.astype(np.float32) * weight[counts.ids]
    cells = np.repeat(np.arange(len(counts)), counts.lengths)
    falls = (score[1:] < score[:-1]) | ((score[1:] == score[:-1]) & (counts.ids[1:] > counts.ids[:-1]))
    if (falls | (cells[1:] > cells[:-1])).all():
        return counts
    order = np.lexsort((counts.ids, -score, cells))
    return Counts(counts.offsets, counts.ids[order], counts.counts[order], counts.total)
