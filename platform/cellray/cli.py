"""The `cellray` command: embed, annotate, inspect, validate. The laptop verbs; no Ray needed.

Only the standard library is imported before the arguments are parsed, so that --help is quick.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from cellray.answers import Answer

SUFFIXES = {
    "embed": (".h5ad", ".parquet", ".arrow", ".npz"),
    "annotate": (".h5ad", ".parquet", ".arrow", ".csv"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 where `validate` finds something wrong, 2 for what the user has to change."""
    options = _parser().parse_args(argv)
    try:
        return int(options.run(options))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cellray", description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    for name, run, text in (
        ("embed", embed, "Embeddings of the cells of a file, with how well each cell fits the model."),
        ("annotate", annotate, "Labels of the cells of a file, with how sure the model is of each."),
    ):
        added = verb(name, run, text)
        added.add_argument(
            "file", metavar="FILE", help="an .h5ad, .h5mu or AnnData/MuData .zarr; path or URL"
        )
        added.add_argument("--bundle", required=True, metavar="URL", help="folder or URL of the model")
        added.add_argument(
            "--output", required=True, metavar="OUT", help=f"what to write: {', '.join(SUFFIXES[name])}"
        )
        add_reading(added)
        added.add_argument(
            "--chunk", type=positive, default=2048, metavar="N", help="cells read at a time (2048)"
        )
        added.add_argument("--quiet", action="store_true", help="show no progress")
    shown = verb("inspect", inspect, "What a bundle, a token store or a file of cells holds.")
    shown.add_argument("path", metavar="BUNDLE|STORE|FILE", help="path or URL")
    add_reading(shown)
    checked = verb("validate", validate, "Check every hash of a bundle or store, every count of a file.")
    checked.add_argument("path", metavar="BUNDLE|STORE|FILE", help="path or URL")
    add_reading(checked)
    return parser


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add --layer and --names, which say where in a file counts and gene ids are."""
    parser.add_argument(
        "--layer",
        default="",
        metavar="NAME",
        help="where raw counts are: a layer, or raw for raw.X; default X",
    )
    parser.add_argument(
        "--names", default="", metavar="COLUMN", help="var column of the gene ids; default var_names"
    )


def positive(text: str) -> int:
    """The whole number of 1 or more in `text`, as a type for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of 1 or more")
    return int(text)


def embed(options: argparse.Namespace) -> int:
    """Write the embeddings of all cells of a file."""
    _check_suffix(options.output, "embed")

    from cellray.answers import embedding

    return _answer("embed", options, embedding)


def annotate(options: argparse.Namespace) -> int:
    """Write the labels of all cells of a file."""
    _check_suffix(options.output, "annotate")
    from cellray.answers import annotation

    return _answer("annotate", options, annotation)


def _answer(name: str, options: argparse.Namespace, answer: "Answer") -> int:
    import time

    from cellray import bundle
    from cellray.answers import answers, open_cells
    from cellray.train.progress import Progress

    model = bundle.load(options.bundle)
    with (
        open_cells(options.file, layer=options.layer, names=options.names) as source,
        Progress("quiet" if options.quiet else "auto") as progress,
    ):
        cells = len(source.cell_names)
        line = progress.stage(name, cells, unit="cells")
        started = time.monotonic()

        def show(done: int) -> None:
            line.update(done, cells_per_second=done / max(time.monotonic() - started, 1e-9))

        said = answers(model, source, answer, 0, cells, rows=options.chunk, on_rows=show)
        line.finish()
        about = {"model": model.hash, **said.about}
        _write(options.output, source.cell_names, said.columns, about)
        progress.say(
            f"{options.output}: {cells:,} cells, {about['genes_known']:,} of {about['genes_sent']:,} genes "
            f"known, {about['counts_kept']:.0%} of the counts kept, "
            f"{(said.columns['ood'] > 0.99).mean():.1%} of the cells further out than 99 % of the training "
            "cells"
        )
    return 0


def _check_suffix(output: str, verb: str) -> None:
    if PurePosixPath(output).suffix not in SUFFIXES[verb]:
        raise ValueError(f"--output {output}: its name must end in one of {', '.join(SUFFIXES[verb])}")


def _write(output: str, cells: "np.ndarray", columns: dict[str, "np.ndarray"], about: dict[str, Any]) -> None:
    """The answers at `output`, which holds all of them or is not there."""
    import io

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cellray.data import storage

    suffix = PurePosixPath(output).suffix
    sink = io.BytesIO()
    if suffix == ".h5ad":
        storage.write_bytes(output, _h5ad(cells, columns, about))
        return
    if suffix == ".npz":
        arrays: dict[str, Any] = {"cell_id": cells.astype(str), **columns}
        np.savez(sink, **arrays)
    elif suffix == ".csv":
        import pandas as pd

        pd.DataFrame({"cell_id": cells, **columns}).to_csv(sink, index=False)
    else:
        import json

        from cellray.answers import arrow

        table = arrow({"cell_id": cells.astype(str), **columns})
        table = table.replace_schema_metadata({"cellray": json.dumps(about)})
        if suffix == ".parquet":
            pq.write_table(table, sink)
        else:
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
    storage.write_bytes(output, sink.getvalue())


def _h5ad(cells: "np.ndarray", columns: dict[str, "np.ndarray"], about: dict[str, Any]) -> bytes:
    """An AnnData without counts: obs columns, and embeddings in obsm["X_cellray"]."""
    import tempfile
    from pathlib import Path

    import anndata as ad
    import pandas as pd

    from cellray.client import PREFIX

    obs = pd.DataFrame(index=pd.Index(cells.astype(str)))
    for name, values in columns.items():
        if values.ndim == 1:
            obs[PREFIX + name] = pd.Categorical(values) if values.dtype.kind == "U" else values
    adata = ad.AnnData(obs=obs, uns={"cellray": about})
    if "embedding" in columns:
        adata.obsm["X_cellray"] = columns["embedding"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.h5ad"
        adata.write_h5ad(path)
        return path.read_bytes()


def inspect(options: argparse.Namespace) -> int:
    """Print what is at a path."""
    look = {"bundle": _inspect_bundle, "store": _inspect_store, "file": _inspect_file}
    for key, value in look[_kind(options.path)](options).items():
        print(f"{key:<12} {value}")
    return 0


def validate(options: argparse.Namespace) -> int:
    """Check all of what is at a path; 1, and the reason, where it is not whole."""
    check = {"bundle": _validate_bundle, "store": _validate_store, "file": _validate_file}
    kind = _kind(options.path)
    try:
        print(f"ok: {kind} {options.path}: {check[kind](options)}")
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _kind(path: str) -> str:
    """What stands at `path`: "bundle", "store" or "file". ValueError for a folder of no known kind."""
    from cellray.data import storage
    from cellray.data.faults import retried

    fs, inner = storage.locate(path)
    if not storage.exists(path):
        raise ValueError(f"{path} does not exist")
    for name, kind in (("manifest.json", "bundle"), ("store.json", "store")):
        if storage.exists(storage.join(path, name)):
            return kind
    if retried(path, lambda: fs.isdir(inner)) and not any(
        storage.exists(storage.join(path, name)) for name in (".zgroup", "zarr.json", ".zattrs")
    ):
        raise ValueError(
            f"{path} is a folder without manifest.json (a bundle), store.json (a token store) or zarr.json "
            "(AnnData): it is something else, or was not written to the end"
        )
    return "file"


def _inspect_bundle(options: argparse.Namespace) -> dict[str, Any]:
    from cellray import bundle

    model = bundle.load(options.path)
    parameters = sum(p.numel() for p in model.student.parameters())
    size = sum(len(data) for data in bundle.verified(options.path)[0].values())
    sizes = {name: f"{len(v):,} {name} features" for name, v in model.tokenizer.vocabularies.items()}
    shown = {
        "bundle": options.path,
        "sha256": model.hash,
        "tokenizer": model.tokenizer.hash,
        "size": f"{size / 1e6:,.1f} MB, {parameters:,} parameters",
        "embedding": f"{model.width} numbers",
        "vocabulary": ", ".join(sizes.values()),
        "labels": ", ".join(model.classes) or "none",
        "donors": ", ".join(map(str, model.about.get("donors", []))) or "none named",
    }
    for row in model.about.get("datasets", []):
        shown[f"data {row.get('name', '')}"] = ", ".join(f"{k} {v}" for k, v in row.items() if k != "name")
    for row in model.about.get("scores", []):
        named = [str(row.get(k, "")) for k in ("task", "dataset", "metric", "model")]
        shown["score " + " ".join(part for part in named if part)] = (
            f"{row.get('value')} {row.get('verdict') or ''}"
        )
    return shown


def _inspect_store(options: argparse.Namespace) -> dict[str, Any]:
    from cellray.data.store import Store

    store = Store(options.path)
    vocabularies = store.tokenizer.vocabularies
    cells = store.cells
    shown = {
        "store": options.path,
        "sha256": store.hash,
        "tokenizer": store.tokenizer.hash,
        "cells": f"{len(store):,} in {len(store.shards):,} shards",
        "size": f"{sum(shard.bytes for shard in store.shards) / 1e6:,.1f} MB",
    }
    for bit, (name, vocabulary) in enumerate(vocabularies.items()):
        present = (cells["present"].to_numpy() >> bit & 1).sum()
        tokens = cells[f"{name}.length"].to_numpy().sum()
        shown[name] = f"{len(vocabulary):,} features, {present:,} cells, {tokens:,} tokens"
    for column in ("dataset", "donor", "assay", "species", "label"):
        found = sorted(set(cells.codes(column).dictionary.to_pylist()) - {""})
        shown[column] = f"{len(found):,}: " + ", ".join(found[:8]) if found else "none"
    return shown


def _inspect_file(options: argparse.Namespace) -> dict[str, Any]:
    from cellray.answers import open_cells

    with open_cells(options.path, layer=options.layer, names=options.names) as source:
        shown = {
            "file": options.path,
            "cells": f"{len(source.cell_names):,}, such as {', '.join(source.cell_names[:3])}",
            "genes": f"{len(source.feature_names):,}, such as {', '.join(source.feature_names[:3])}",
            "obs": ", ".join(source.obs_columns) or "no columns",
        }
        try:
            source.rows(0, min(1000, len(source.cell_names)))
            shown["counts"] = f"{source.where.removeprefix(options.path + ': ')} holds raw counts"
        except ValueError as error:
            shown["counts"] = str(error).removeprefix(options.path + ": ")
    return shown


def _validate_bundle(options: argparse.Namespace) -> str:
    from cellray import bundle

    return f"every hash and the golden cells are right, sha256 {bundle.load(options.path).hash}"


def _validate_store(options: argparse.Namespace) -> str:
    from cellray.data.store import Store

    store = Store(options.path)
    for shard in range(len(store.shards)):
        store.verify(shard)
    batches = len(store.starts) - 1
    cells = sum(len(store.batch(number).rows) for number in range(batches))
    return f"every hash is right, {cells:,} cells of tokenizer {store.tokenizer.hash[:12]}"


def _validate_file(options: argparse.Namespace) -> str:
    from cellray.answers import open_cells

    with open_cells(options.path, layer=options.layer, names=options.names) as source:
        cells = len(source.cell_names)
        total = sum(
            int(source.rows(start, min(start + 2048, cells)).sum()) for start in range(0, cells, 2048)
        )
    return f"{cells:,} cells with {total:,} counts, all of them raw"


if __name__ == "__main__":
    sys.exit(main())
