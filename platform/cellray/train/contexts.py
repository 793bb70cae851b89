"""What encoders are told of a cell beside its tokens: species and assay, as numbers in frozen lists."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cellray.data.cells import Cells
from cellray.data.tokens import narrow
from cellray.train.feed import uniform

UNKNOWN = 0
"""The number of "", and of every name that is not in the list."""


def names_of(cells: Cells, columns: Sequence[str], train: np.ndarray) -> dict[str, tuple[str, ...]]:
    """Column -> its names among the cells where `train`, bool [cells], is true, sorted, without "".

    Those of held-out cells alone are left out: their vectors would never have been trained.
    """
    found = {}
    for column in columns:
        codes = cells.codes(column)
        used = np.unique(np.asarray(codes.indices.to_numpy())[train])
        words = codes.dictionary.to_pylist()
        found[column] = tuple(sorted({words[i] for i in used.tolist()} - {""}))
        if not found[column]:
            raise ValueError(
                f"network.context_of has {column}, which is known of no training cell: name its column in "
                "the atlas and ingest again, or leave it out"
            )
    return found


class Contexts:
    """The numbers of the cells of a store in lists of names, which may come from another store."""

    def __init__(self, cells: Cells, names: Mapping[str, tuple[str, ...]], *, hide: float = 0.0) -> None:
        """`names` as `names_of` makes them; `hide` is the chance, in training, that one is unknown."""
        self.names, self.hide = dict(names), hide
        self.codes = np.zeros((len(cells), len(self.names)), narrow(1 + max(map(len, self.names.values()))))
        for at, (column, known) in enumerate(self.names.items()):
            number = {name: i for i, name in enumerate(known, UNKNOWN + 1)}
            codes = cells.codes(column)
            table = np.array([number.get(word, UNKNOWN) for word in codes.dictionary.to_pylist()], np.int64)
            self.codes[:, at] = table[codes.indices.to_numpy()]

    def of(self, rows: np.ndarray, *, device: str = "cpu") -> Tensor:
        """Numbers of the cells at `rows`, int64 [cells, columns]."""
        return torch.from_numpy(self.codes[rows].astype(np.int64)).to(device)

    def drawn(self, rows: np.ndarray, *keys: int, device: str = "cpu") -> Tensor:
        """The same with some of them unknown, each with chance `hide`, so that unknown is trained too."""
        hidden = uniform(*keys, 7, rows[:, None], np.arange(len(self.names))) < self.hide
        codes = np.where(hidden, UNKNOWN, self.codes[rows].astype(np.int64))
        return torch.from_numpy(codes).to(device)
