"""The sums that a checksum is made of, in one pass over memory."""

import numpy as np

from cellray.data.jit import jit, still


@jit
def _sums(table, rows, columns):  # type: ignore[no-untyped-def]
    for i in range(table.shape[0]):
        total = np.uint64(0)
        for j in range(table.shape[1]):
            total += table[i, j]
            columns[j] += table[i, j]
        rows[i] = total


def one_pass(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`shards.both_sums` compiled: half its time, as memory is read once. Other threads go on meanwhile."""
    rows, columns = np.empty(table.shape[0], np.uint64), np.zeros(table.shape[1], np.uint64)
    _sums(*still(table), rows, columns)
    return rows, columns
