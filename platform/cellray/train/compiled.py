"""Loops over the tokens of a batch, compiled with numba. Beside them stand references in the tests.

Cells come as in `Counts`: `offsets` int64 [cells + 1], `ids` [tokens]. `turn` uint64 [cells] is `mix` of
the keys and the cell's row.
"""

import numpy as np

from cellray.data.jit import jit
from cellray.train.rowwise import TINY


@jit
def stir(state, key):  # type: ignore[no-untyped-def]
    """As `feed.stir`, of two uint64."""
    state = state + key + np.uint64(0x9E3779B97F4A7C15)
    state ^= state >> np.uint64(30)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    state ^= state >> np.uint64(27)
    state *= np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return state


@jit
def uniform(turn, offsets, ids):  # type: ignore[no-untyped-def]
    """`feed.fraction` of `turn` stirred by every token's feature, float64 [tokens]."""
    found = np.empty(len(ids))
    for c in range(len(turn)):
        for j in range(offsets[c], offsets[c + 1]):
            found[j] = np.float64(stir(turn[c], np.uint64(ids[j])) >> np.uint64(11)) * 2.0**-53
    return found


@jit
def draws(turn, firsts):  # type: ignore[no-untyped-def]
    """`firsts[c + 1] - firsts[c]` random uint64 for each cell, from `turn`."""
    found = np.empty(firsts[-1], np.uint64)
    for c in range(len(turn)):
        for k in range(firsts[c], firsts[c + 1]):
            found[k] = stir(stir(turn[c], np.uint64(k - firsts[c])), np.uint64(2))
    return found


@jit
def absent(offsets, ids, firsts, draw, drawn, features):  # type: ignore[no-untyped-def]
    """Features drawn for each cell, each once, without those it counts; the first of each cell, and they.

    Draw k of cell c, at `firsts[c] + k`, is the feature `drawn`, or any by `draw` where that is negative.
    """
    taken = np.zeros(features, np.bool_)
    found = np.empty(len(drawn), np.int64)
    begin = np.zeros(len(offsets), np.int64)
    n = 0
    for c in range(len(offsets) - 1):
        for j in range(offsets[c], offsets[c + 1]):
            taken[ids[j]] = True
        for k in range(firsts[c], firsts[c + 1]):
            feature = drawn[k]
            if feature < 0:
                feature = np.int64(draw[k] % np.uint64(features))
            if not taken[feature]:
                taken[feature] = True
                found[n] = feature
                n += 1
        begin[c + 1] = n
        for j in range(offsets[c], offsets[c + 1]):
            taken[ids[j]] = False
        for k in range(begin[c], n):
            taken[found[k]] = False
    return begin, found[:n]


@jit
def asked(turn, offsets, ids, hidden, begin, absent):  # type: ignore[no-untyped-def]
    """What is asked for: each cell's features that are absent, then its tokens that are `hidden`.

    Returns the first of each cell, and of each the cell, the feature, the token, -1 for an absent
    feature, and 53 random bits.
    """
    most = len(absent) + len(ids)
    cell, feature = np.empty(most, np.int64), np.empty(most, np.int64)
    token, bits = np.empty(most, np.int64), np.empty(most, np.uint64)
    firsts = np.zeros(len(offsets), np.int64)
    n = 0
    for c in range(len(turn)):
        for k in range(begin[c], begin[c + 1]):
            feature[n], token[n] = absent[k], -1
            n += 1
        for j in range(offsets[c], offsets[c + 1]):
            if hidden[j]:
                feature[n], token[n] = ids[j], j
                n += 1
        firsts[c + 1] = n
        for k in range(firsts[c], n):
            cell[k] = c
            bits[k] = stir(stir(turn[c], np.uint64(feature[k])), np.uint64(3)) >> np.uint64(11)
    return firsts, cell[:n], feature[:n], token[:n], bits[:n]


@jit
def arranged(offsets, ids, hidden, read, truth, firsts, feature, token, context):  # type: ignore[no-untyped-def]
    """The tokens of each cell: half a context of those asked for, those that are seen, the others asked for.

    `feature` and `token` as from `asked`, those of a cell in random order. `read` float32 [tokens] is
    what a token's value is read as, `truth` what it is. Returns ids, values, which are asked for, the first
    of each cell; and places within the context that are asked for, with the truth there.
    """
    most = len(feature) + len(ids)
    places, values = np.empty(most, np.int64), np.empty(most, np.float32)
    wanted, begin = np.empty(most, np.bool_), np.zeros(len(offsets), np.int64)
    at, true = np.empty(len(feature), np.int64), np.empty(len(feature), np.float32)
    n = m = 0
    for c in range(len(offsets) - 1):
        middle = min(firsts[c] + context // 2, firsts[c + 1])
        for part in range(2):
            for k in range(firsts[c] if part == 0 else middle, middle if part == 0 else firsts[c + 1]):
                j = token[k]
                if n - begin[c] < context:
                    at[m], true[m] = n, truth[j] if j >= 0 else np.float32(0)
                    m += 1
                places[n], values[n], wanted[n] = feature[k], read[j] if j >= 0 else np.float32(0), True
                n += 1
            if part == 0:
                for j in range(offsets[c], offsets[c + 1]):
                    if not hidden[j]:
                        places[n], values[n], wanted[n] = ids[j], read[j], False
                        n += 1
        begin[c + 1] = n
    return places[:n], values[:n], wanted[:n], begin, at[:m], true[:m]


@jit
def numbered(state, many):  # type: ignore[no-untyped-def]
    """`feed.stir` of one state by 0, 1, …, uint64 [many]."""
    found = np.empty(many, np.uint64)
    for i in range(many):
        found[i] = stir(state, np.uint64(i))
    return found


@jit
def dense(offsets, ids, counts, place, width):  # type: ignore[no-untyped-def]
    """Counts [cells, width], float32: those of feature f at `place[f]`, unless that is negative."""
    found = np.zeros((len(offsets) - 1, width), np.float32)
    for c in range(len(offsets) - 1):
        for j in range(offsets[c], offsets[c + 1]):
            at = place[ids[j]]
            if at >= 0:
                found[c, at] = counts[j]
    return found


@jit
def settled_rows(weight, mean, square, last, owed, rows, now, betas, eps):  # type: ignore[no-untyped-def]
    """As `rowwise.settled_rows`, in place. All [features, width] but `last` and `owed`."""
    for k in range(len(rows)):
        r = rows[k]
        age = now - last[r]
        if age == 0:
            continue
        large, small = np.float32(owed[last[r], 0]), np.float32(owed[last[r], 1])
        first, second = np.float32(betas[0] ** age), np.float32(betas[1] ** age)
        both, rest = large * small, np.float32(eps) * large + np.float32(TINY)
        own_weight, own_mean, own_square = weight[r], mean[r], square[r]
        for c in range(weight.shape[1]):
            own_weight[c] -= own_mean[c] * both / (np.sqrt(own_square[c]) * small + rest)
            own_mean[c] *= first
            own_square[c] *= second
        last[r] = now


@jit
def moved_rows(weight, mean, square, last, owed, rows, now, gradient, betas, rate, eps):  # type: ignore[no-untyped-def]
    """As `rowwise.moved_rows`, in place; `gradient` float32 [rows, width]."""
    first, second = np.float32(1 - betas[0]), np.float32(1 - betas[1])
    decay, size, least = np.float32(betas[1]), np.float32(rate), np.float32(eps)
    for k in range(len(rows)):
        r = rows[k]
        own_weight, own_mean, own_square, own = weight[r], mean[r], square[r], gradient[k]
        for c in range(weight.shape[1]):
            own_mean[c] += first * (own[c] - own_mean[c])
            own_square[c] = decay * own_square[c] + second * own[c] * own[c]
            own_weight[c] -= size * own_mean[c] / (np.sqrt(own_square[c]) + least)
        last[r] = now
