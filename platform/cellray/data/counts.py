"""Are these raw counts? The check every number passes where it enters, and what it looks like if not."""

import itertools
from collections.abc import Iterator

import numpy as np

MOST = 2**32 - 1
"""The largest count a token can hold (uint32)."""
BLOCK = 1 << 16
"""Numbers looked at together: what is made of them on the way stays in the processor's cache."""
LOOKED = 200
"""Cells from which to guess what numbers are that are no counts."""


def check_counts(data: np.ndarray, where: str, starts: np.ndarray | None = None) -> None:
    """Nothing, if `data` (any shape) is raw counts: finite whole numbers, 0 or more; floats may hold them.

    ValueError otherwise. `where` names the file and key for the message, which says what the
    numbers look like (log1p-normalised, scaled, CPM …), whether counts can be had back, and what to
    do. It tells more where cells are known: rows of `data` [cells, features], or `starts`, offsets
    into flat `data`, [cells + 1].
    """
    counts_of(data, where, starts)


def counts_of(data: np.ndarray, where: str, starts: np.ndarray | None = None) -> np.ndarray:
    """`data` as uint32 of the same shape if it is raw counts; ValueError as `check_counts`.

    No copy is made of 32-bit integers.
    """
    found = _as_counts(data)
    if found is None:
        raise _refusal_of(data, where, starts)
    return found


def _as_counts(data: np.ndarray) -> np.ndarray | None:
    """`data` as uint32, None if some number is no count."""
    kind, size = data.dtype.kind, data.dtype.itemsize
    if kind == "b" or (kind == "u" and size <= 4):
        return data.astype(np.uint32, copy=False)
    if kind == "f":
        return _from_floats(data)
    if kind not in "iu":
        return None
    if not data.size:
        return data.astype(np.uint32)
    if kind == "i" and size == 4 and data.dtype.isnative:
        # A negative number is a large one without its sign: one look instead of two.
        found = data.view(np.uint32)
        return found if int(found.max()) < 2**31 else None
    if int(data.min()) < 0 or int(data.max()) > MOST:
        return None
    return data.astype(np.uint32)


def _from_floats(data: np.ndarray) -> np.ndarray | None:
    flat = data.reshape(-1)
    found = np.empty(flat.shape, np.uint32)
    # What is NaN, infinite or too large becomes some other number, which is not equal to it.
    with np.errstate(invalid="ignore", over="ignore"):
        for first in range(0, len(flat), BLOCK):
            part = flat[first : first + BLOCK]
            whole = part.astype(np.int32)
            if int(whole.view(np.uint32).max()) < 2**31 and (whole.astype(part.dtype) == part).all():
                found[first : first + BLOCK] = whole.view(np.uint32)
                continue
            # Counts of 2**31 and more, if any.
            wide = part.astype(np.float64)
            if not ((wide >= 0) & (wide <= MOST) & (wide == np.rint(wide))).all():
                return None
            found[first : first + BLOCK] = wide.astype(np.uint32)
    return found.reshape(data.shape)


def _refusal_of(data: np.ndarray, where: str, starts: np.ndarray | None) -> ValueError:
    """Why `data`, which holds something else than counts, is refused."""
    if data.dtype.kind not in "iuf":
        return ValueError(f"{where} holds values of type {data.dtype}, not numbers: give raw counts")
    if data.dtype.kind == "f":
        odd = ~np.isfinite(data)
        if odd.any():
            found = f"{int(odd.sum()):,} values that are NaN or infinite"
            return _refusal(where, f"{data[odd].flat[0]}", found, "damaged")
    low, high = data.min(), data.max()
    if low < 0:
        kind = "scaled (z-scored), centred or CLR" if data.dtype.kind == "f" else "differences, not counts"
        return _refusal(where, f"{low:.6g}", "negative values", kind)
    if data.dtype.kind == "f":
        odd = data != np.rint(data)
        if odd.any():
            looks, back = _looks(data, starts)
            return _refusal(where, f"{data[odd].flat[0]:.6g}", "values that are not whole", looks, back)
    shown = f"{int(high):,}" if data.dtype.kind == "u" else f"{high:.6g}"
    return _refusal(where, shown, f"a count above {MOST:,}", "not plausible as a count")


def _refusal(where: str, example: str, found: str, looks: str, back: str = "") -> ValueError:
    return ValueError(
        f"{where} has {found}, such as {example}: it looks {looks}. cellray needs raw counts. "
        "Name the place that holds them: layer=<name of a layer>, or layer=raw for raw.X; "
        f"if the file has none, {back or 'get the version with raw counts'}."
    )


def _looks(data: np.ndarray, starts: np.ndarray | None) -> tuple[str, str]:
    """What values of which some are not whole look like, and how to have counts back, "" if they are lost."""
    cells = list(_cells(data, starts))
    if _multiples(cells):
        return f"normalised to a depth ({_depth(cells)})", _BACK.format(spelt="X")
    high = float(data.max())
    for says, undo, spelt in UNDONE if high < HIGHEST_LOG else ():
        plain = [undo(cell) for cell in cells]
        scale = _multiples(plain)
        if scale == "counts":
            return says.format("counts, to no depth"), f"np.rint({spelt}) has them back"
        if scale:
            return says.format(_depth(plain)), _BACK.format(spelt=spelt)
    if high <= 1:
        return "scaled to 0 … 1", ""
    whole = float((data[data > 0] == np.rint(data[data > 0])).mean())
    if whole > 0.5:
        return f"estimated or corrected: {whole:.0%} are whole (salmon, kallisto, RSEM, SoupX)", ""
    sums = np.array([cell.sum(dtype=np.float64) for cell in cells])
    if len(sums) and np.allclose(sums, 1e6, rtol=1e-3):
        return "normalised to length and depth (TPM)", ""
    if high < HIGHEST_LOG:
        return "log-normalised (log1p), or another logarithm", ""
    return "normalised to a depth (CPM, CP10k) or corrected (SoupX, scran)", ""


UNDONE = (
    ("log-normalised (log1p of {})", np.expm1, "np.expm1(X)"),
    ("log-normalised (log2(x + 1) of {})", lambda x: np.exp2(x) - 1, "np.exp2(X) - 1"),
    ("log-normalised (log10(x + 1) of {})", lambda x: 10.0**x - 1, "10 ** X - 1"),
    ("transformed (square root of {})", np.square, "X ** 2"),
)
"""What is done to counts, and how it is undone."""
HIGHEST_LOG = 25
"""No logarithm of counts is above: log2 of counts per million stays below 20."""
_BACK = (
    "counts can be had back, for in each cell all values are multiples of one: "
    "{spelt} over a cell's smallest value above 0, or times its total over the depth, rounded; "
    "store that as a layer once you have checked it"
)


def _cells(data: np.ndarray, starts: np.ndarray | None) -> Iterator[np.ndarray]:
    """Values above 0 of some cells that have several, float64; none where cells are not known."""
    if data.ndim == 2:
        starts = np.arange(0, data.size + 1, max(1, data.shape[1]))
    if starts is None:
        return
    flat = data.reshape(-1)
    found = 0
    for first, last in itertools.pairwise(starts.tolist()):
        cell = flat[first:last]
        cell = cell[cell > 0].astype(np.float64)
        if len(np.unique(cell)) < 2:
            continue
        yield cell
        found += 1
        if found == LOOKED:
            return


def _multiples(cells: list[np.ndarray]) -> str:
    """Whether the values of each cell are whole multiples of one: "counts" if that is 1, "yes", or "".

    Single precision leaves a relative error of some 1e-6 after a logarithm is undone, so what is
    within 1e-3 of a whole number below 500 is one; by chance three such values in ten are not.
    """
    if not cells:
        return ""
    if any(not np.isfinite(cell).all() or cell.min() <= 0 for cell in cells):
        return ""
    if all(_whole(cell) for cell in cells):
        return "counts"
    # A cell without a single count of 1 has another unit than its smallest value.
    fits = [_whole(cell / cell.min()) for cell in cells]
    return "yes" if np.mean(fits) >= 0.9 and sum(len(cell) for cell in cells) >= 10 else ""


def _whole(values: np.ndarray) -> bool:
    near = np.abs(values - np.rint(values))
    return bool((near <= np.minimum(1e-3 + 1e-5 * values, 0.05)).all())


def _depth(cells: list[np.ndarray]) -> str:
    """What cells were normalised to, by their sums."""
    sums = np.array([cell.sum() for cell in cells])
    for depth, name in ((1e4, "CP10k, counts per 10,000"), (1e6, "CPM, counts per million")):
        if np.allclose(sums, depth, rtol=1e-3):
            return name
    if len(sums) > 1 and np.allclose(sums, sums[0], rtol=1e-3):
        return f"counts per {sums[0]:,.6g}"
    return "counts times a factor for each cell"
