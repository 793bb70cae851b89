"""What is known of every cell of a store, read by column."""

from collections.abc import Callable, Iterator, Sequence

import pandas as pd
import pyarrow as pa

from cellray.data.shards import ABOUT

Scan = Callable[[Sequence[str]], Iterator[pa.Table]]
"""Names of columns -> tables of them, one a shard, in store order."""


class Cells:
    """What is known of every cell, in store order. Read like a `pyarrow.Table`: `cells["label"]`.

    A column is read, from all shards, when it is first asked for, with its tokens left where they are.
    Numbers and coded strings are kept (4 to 8 bytes a cell), cell ids are not. Strings come plain, ""
    where unknown; `codes` gives them as they are kept.
    """

    def __init__(self, names: Sequence[str], rows: int, scan: Scan) -> None:
        self.column_names = list(names)
        self.num_rows = rows
        self._scan = scan
        self._held: dict[str, pa.Array] = {}

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        return self.select([name])[name]

    def select(self, names: Sequence[str]) -> pa.Table:
        """Some columns. Naming them together reads the shards once."""
        found = self._read(names)
        plain = [found[n].cast(pa.string()) if n in ABOUT else found[n] for n in names]
        return pa.table(plain, names=list(names))

    def codes(self, name: str) -> pa.DictionaryArray:
        """A column of strings (one of ABOUT) as codes and the strings they stand for."""
        found = self._read([name])[name].combine_chunks()
        return found.chunk(0) if isinstance(found, pa.ChunkedArray) else found

    def to_pandas(self) -> pd.DataFrame:
        return self.select(self.column_names).to_pandas()

    def _read(self, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
        unknown = [name for name in names if name not in self.column_names]
        if unknown:
            raise KeyError(f"cells have no column {unknown[0]!r}; they have {self.column_names}")
        missing = [name for name in dict.fromkeys(names) if name not in self._held]
        found = dict(self._held)
        if missing:
            tables = [table.select(missing) for table in self._scan(missing)]
            whole = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
            found |= {name: whole[name] for name in missing}
            self._held |= {name: whole[name] for name in missing if name != "cell_id"}
        return found
