"""Are these raw counts? The check every number passes where it enters, and what it looks like if not."""

import numpy as np

MOST = 2**32 - 1
"""The largest count a token can hold (uint32)."""


def check_counts(data: np.ndarray, where: str) -> None:
    """Nothing, if `data` (any shape) is raw counts: finite whole numbers, 0 or more; floats may hold them.

    ValueError otherwise. `where` names the file and key for the message, which says what the
    numbers look like (log1p-normalised, scaled, normalised to a depth) and what to do.
    """
    if data.dtype.kind in "bu":
        if data.dtype.itemsize > 4 and data.size and int(data.max()) > MOST:
            raise _refusal(
                where, f"{int(data.max()):,}", f"a count above {MOST:,}", "not plausible as a count"
            )
        return
    if data.dtype.kind not in "if":
        raise ValueError(f"{where} holds values of type {data.dtype}, not numbers: give raw counts")
    if not data.size:
        return
    low, high = data.min(), data.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = data[~np.isfinite(data)]
        raise _refusal(where, f"{bad.flat[0]}", f"{bad.size:,} values that are NaN or infinite", "damaged")
    if low < 0:
        kind = "scaled (z-scored) or centred" if data.dtype.kind == "f" else "differences, not counts"
        raise _refusal(where, f"{low:.6g}", "negative values", kind)
    if data.dtype.kind == "f":
        odd = data != np.rint(data)
        if odd.any():
            raise _refusal(where, f"{data[odd].flat[0]:.6g}", "values that are not whole", _looks(data))
    if high > MOST:
        raise _refusal(where, f"{high:.6g}", f"a value above {MOST:,}", "not plausible as a count")


def _looks(data: np.ndarray) -> str:
    """What non-negative values that are not whole look like."""
    high = float(data.max())
    if high < 20:
        return "log-normalised (log1p)" if high > 1 else "scaled to 0 … 1"
    return "normalised to a depth (CPM, CP10k) or corrected (SoupX, scran)"


def _refusal(where: str, example: str, found: str, looks: str) -> ValueError:
    return ValueError(
        f"{where} has {found}, such as {example}: it looks {looks}. cellray needs raw counts. "
        "Name the place that holds them: layer=<name of a layer>, or layer=raw for raw.X; "
        "if the file has none, get the version with raw counts."
    )
