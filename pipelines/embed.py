"""Embeddings of whole files, by any number of workers: `python -m pipelines.embed BUNDLE OUTPUT FILE…`.

OUTPUT/parts/00000-000000000-KEY.parquet   some thousand cells of one file: embedding, label, how far out
OUTPUT/manifest.json                       model, files and parts with their sha256; written last

A part depends on the model and its cells alone, and its KEY on the content of both. A run that is
killed and started again does the parts that are missing.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cellray import cluster
from cellray.cli import add_reading, positive
from cellray.data import storage
from cellray.train.progress import Progress
from pipelines.command import add_progress, exit_code, progress_mode
from pipelines.ingest import table

if TYPE_CHECKING:
    from cellray.embedder import Embedder
    from pipelines.parts import File, Job

ROWS = 16_384
"""Cells of a part: some seconds of work."""
EPILOG = """\
FILE is an .h5ad, an .h5mu, a .zarr of AnnData or MuData, or the .csv table of an atlas, whose RNA is
embedded; its rows say their own layer and names, and its cells are called DATASET:CELL as in a token
store. Everything may be a path or a URL. `pandas.read_parquet("OUTPUT/parts")` reads the result."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one line on the error stream for what the user has to change."""
    args = parser().parse_args(argv)
    return exit_code(lambda: run(args))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m pipelines.embed",
        description="Embed all cells of some files, with as many workers as you like.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "bundle", metavar="BUNDLE", help="folder or URL of the model, as all workers can read it"
    )
    made.add_argument("output", metavar="OUTPUT", help="folder or URL to write")
    made.add_argument("files", metavar="FILE", nargs="+", help="files of cells, or atlas tables")
    add_reading(made)
    made.add_argument("--workers", type=positive, metavar="N", help="processes (default: one a CPU)")
    made.add_argument(
        "--rows", type=positive, default=ROWS, metavar="N", help=f"cells of a part, about ({ROWS})"
    )
    made.add_argument("--dry-run", action="store_true", help="say what would be done; do nothing")
    add_progress(made)
    return made


def run(args: argparse.Namespace) -> None:
    """Embed what is missing of the files, or only say what that is."""
    from cellray import bundle
    from pipelines.parts import Job, plan

    model = bundle.load(args.bundle)
    files = survey(model, args)
    job = Job(
        bundle=storage.absolute(args.bundle),
        model=model.hash,
        output=storage.absolute(args.output),
        files=files,
        parts=plan(model.hash, files),
    )
    there = present(job)
    if args.dry_run:
        print(foreseen(job, there))
        return
    if len(there) < len(job.parts) or not storage.exists(job.path("manifest.json")):
        with cluster.connect(cpus=args.workers or os.cpu_count()), Progress(progress_mode(args)) as progress:
            facts = embed(job, there, args.workers, progress)
        commit(job, facts)
    print(summary(json.loads(storage.read_bytes(job.path("manifest.json")))))
    print(f"\nembeddings: {storage.join(args.output, 'parts')}")


def survey(model: "Embedder", args: argparse.Namespace) -> "list[File]":
    """The files, each opened and tried. ValueError names one that cannot be embedded."""
    from cellray.answers import check, open_cells
    from cellray.data.lineage import identity
    from pipelines.parts import File

    files: list[File] = []
    for own in named(args, tuple(model.tokenizer.vocabularies)):
        if any((file.url, file.dataset) == (own["url"], own["dataset"]) for file in files):
            raise ValueError(f"{own['given']} is named twice")
        with open_cells(own["url"], layer=own["layer"], names=own["names"]) as source:
            check(model, source)
            cells, rows = len(source.cell_names), source.step(args.rows)
        files.append(File(**own, cells=cells, rows=rows, identity=identity(own["url"])))
    return files


def named(args: argparse.Namespace, modalities: Sequence[str]) -> Iterator[dict[str, str]]:
    """`given`, `url`, `dataset`, `layer` and `names` of every file that the command line means."""
    from cellray.data.atlas import read_atlas
    from cellray.data.modalities import BUILT_IN
    from cellray.embedder import INPUT

    known = tuple(dict.fromkeys([*(m.name for m in BUILT_IN), *modalities]))
    for word in args.files:
        if not word.endswith(".csv"):
            place = {"given": word, "url": storage.absolute(word), "dataset": ""}
            yield {**place, "layer": args.layer, "names": args.names}
            continue
        rows = [row for row in read_atlas(word, known) if row.modality in ("", INPUT)]
        if not rows:
            raise ValueError(f"atlas table {word} has no RNA, which is what the model reads")
        for row in rows:
            yield {key: getattr(row, key) for key in ("given", "url", "dataset", "layer", "names")}


def present(job: "Job") -> set[str]:
    """Names of the parts that are there. ValueError if OUTPUT holds something else."""
    names = {part.name for part in job.parts}
    path = job.path("manifest.json")
    if storage.exists(path):
        manifest = json.loads(storage.read_bytes(path))
        if {part["name"] for part in manifest.get("parts", [])} != names:
            raise ValueError(f"{path} is of {difference(manifest, job)}: choose another OUTPUT, or remove it")
    found = listed(job)
    for name in sorted(found - names):
        if name.partition(".")[0] + ".parquet" not in names:  # else it is what a killed writer left
            raise ValueError(
                f"{job.path('parts', name)} is of another model or file, or of another --rows: "
                "choose another OUTPUT, or remove it"
            )
    return found & names


def listed(job: "Job") -> set[str]:
    """Names of the files in OUTPUT/parts."""
    return set(storage.names(job.path("parts")))


def difference(manifest: dict[str, Any], job: "Job") -> str:
    """In which way OUTPUT was made otherwise."""
    if manifest.get("model") != job.model:
        return f"another model, {str(manifest.get('model'))[:12]} and not {job.model[:12]}"
    before = {(file["file"], file["dataset"]): file for file in manifest.get("files", [])}
    for file in job.files:
        held = before.pop((file.given, file.dataset), None)
        if held is None:
            return f"other files, without {file.given}"
        if differs := [key for key, value in file.about.items() if held.get(key) != value]:
            return f"{file.given} with another {differs[0]}"
    return f"more files, with {next(iter(before))[0]}" if before else "parts of another size (--rows)"


def foreseen(job: "Job", there: set[str]) -> str:
    """What there is to do."""
    rows = [["file", "cells", "parts", "done"]]
    for number, file in enumerate(job.files):
        done = [part.name in there for part in job.parts if part.file == number]
        rows.append([file.given, f"{file.cells:,}", f"{len(done):,}", f"{sum(done):,}"])
    cells = sum(file.cells for file in job.files)
    return "\n".join([*table(rows), "", f"{cells:,} cells; nothing was written"])


def embed(job: "Job", there: set[str], workers: int | None, progress: Progress) -> list[dict[str, Any]]:
    """Facts of every part, once all are there. Needs a Ray that is connected."""
    facts: list[dict[str, Any]] = [{} for _ in job.parts]
    sizes = [0 if part.name in there else part.stop - part.start for part in job.parts]
    total = sum(file.cells for file in job.files)
    before, done, began = total - sum(sizes), 0, time.monotonic()
    line = progress.stage("embed", total, done=before, unit="cells")
    for row in outcomes(job, workers):
        if row["error"]:
            raise ValueError(row["error"])
        facts[row["item"]] = json.loads(row["facts"])
        done += sizes[row["item"]]
        line.update(before + done, cells_per_second=done / max(time.monotonic() - began, 1e-9))
    line.finish()
    return facts


def outcomes(job: "Job", workers: int | None) -> Iterator[dict[str, Any]]:
    """What a Worker says of each part: `item`, `facts` and `error`, as they get done, in any order."""
    import ray
    from ray.data import ActorPoolStrategy, from_items

    from cellray.data.work import hush
    from pipelines.parts import Worker

    hush()
    count = len(job.parts)
    size = min(workers or max(1, int(ray.cluster_resources()["CPU"])), count)
    done = from_items(list(range(count)), override_num_blocks=count).map_batches(
        Worker, batch_size=1, num_cpus=1, compute=ActorPoolStrategy(size=size), fn_constructor_args=(job,)
    )
    yield from done.iter_rows()


def commit(job: "Job", facts: Sequence[dict[str, Any]]) -> None:
    """Write the manifest, and clear away what killed writers left."""
    from pipelines.parts import SCHEMA

    for name in listed(job) - {part.name for part in job.parts}:
        storage.remove_file(job.path("parts", name))
    files, parts = [], []
    for number, file in enumerate(job.files):
        own = [fact for part, fact in zip(job.parts, facts, strict=True) if part.file == number]
        genes = {key: own[0][key] for key in ("genes_sent", "genes_known", "first_unknown")}
        counts = sum(fact["counts"] for fact in own)
        kept = sum(fact["counts"] * fact["counts_kept"] for fact in own) / max(counts, 1)
        files.append({**file.about, **genes, "counts": counts, "counts_kept": kept})
    for part, fact in zip(job.parts, facts, strict=True):
        parts.append({**vars(part), "bytes": fact["bytes"], "sha256": fact["sha256"]})
    manifest = {"schema": SCHEMA, "model": job.model, "files": files, "parts": parts}
    path = job.path("manifest.json")
    data = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    if not storage.write_once(path, data) and storage.read_bytes(path) != data:
        raise ValueError(
            f"{path} has other hashes than the parts that were missing came out with: a machine or release "
            f"that rounds otherwise made it. Remove {job.output} and embed again."
        )


def summary(manifest: dict[str, Any]) -> str:
    """What became of every file."""
    rows = [["file", "cells", "genes", "known", "counts kept"]]
    for file in manifest["files"]:
        sizes = (f"{file[key]:,}" for key in ("cells", "genes_sent", "genes_known"))
        rows.append([file["file"], *sizes, f"{file['counts_kept']:.1%}"])
    return "\n".join(table(rows))


if __name__ == "__main__":
    sys.exit(main())
