"""Strings of which few differ, such as the donor of every cell: a code each, and what the codes stand for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cellray.data.tokens import narrow


@dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
    """Strings, read like an array of them: `texts[rows]`. A byte each up to 256 kinds, where a list takes 8.

    The same strings are always held the same way, whatever they were made from.
    """

    codes: np.ndarray
    """Index into `values` of each string, of the narrowest unsigned type [strings]."""
    values: tuple[str, ...]
    """The strings there are, sorted, each once."""

    @classmethod
    def of(cls, strings: Sequence[str] | np.ndarray) -> "Texts":
        """`strings`, none of which is missing."""
        coded = pa.array(strings, pa.large_string()).dictionary_encode()
        assert not coded.null_count, "a string is missing"
        return cls.coded(coded.indices.to_numpy(), coded.dictionary.to_pylist())

    @classmethod
    def full(cls, size: int, value: str) -> "Texts":
        """`value`, `size` times."""
        return cls(codes=np.zeros(size, np.uint8), values=(value,) if size else ())

    @classmethod
    def coded(cls, codes: np.ndarray, values: Sequence[str] | np.ndarray) -> "Texts":
        """The strings `values[codes]`; `values` are in any order, may repeat, and need not all occur."""
        some = np.zeros(len(values), bool)
        some[codes] = True
        kept = tuple(sorted({str(values[int(i)]) for i in np.flatnonzero(some)}))
        return cls(codes=_numbers(values, kept)[codes], values=kept)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: np.ndarray | slice) -> "Texts":
        return Texts.coded(self.codes[rows], self.values)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """As an array of str objects, for who needs one."""
        return np.array(self.values, object)[self.codes]

    def __iter__(self) -> Iterator[str]:
        return iter(np.asarray(self))

    def tolist(self) -> list[str]:
        return list(self)


def common(several: Sequence[Texts]) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """All strings there are, sorted, and for each of `several` the index in these of each of its values."""
    words = tuple(sorted({value for texts in several for value in texts.values}))
    return words, [_numbers(texts.values, words) for texts in several]


def _numbers(values: Sequence[str] | np.ndarray, words: Sequence[str]) -> np.ndarray:
    """Index in `words` of each of `values`, of the narrowest unsigned type; 0 for those that it lacks."""
    place = {word: number for number, word in enumerate(words)}
    return np.array([place.get(str(value), 0) for value in values], narrow(len(words)))
