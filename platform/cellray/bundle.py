"""The bundle: a student as a folder of plain files that is checked whole before it answers.

BUNDLE/manifest.json        schema, and sha256 and bytes of every other file; written last
BUNDLE/config.json          kind and sizes of the network, classes, tokenizer hash, what it was made from
BUNDLE/student.safetensors  weights of the student
BUNDLE/heads.safetensors    label head and reference statistics
BUNDLE/vocabulary.arrow     the tokenizer
BUNDLE/golden.arrow         some cells and their embeddings, to try the loaded model on
BUNDLE/card.md              for people: data, donors, scores beside baselines, limits
"""

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem

from cellray import __version__, heads
from cellray.data import arrow, storage
from cellray.data.tokens import Counts, Tokenizer, narrow
from cellray.embedder import INPUT, Embedder
from cellray.model.student import Student, build

SCHEMA = 1
MANIFEST = "manifest.json"
FILES = (
    "card.md",
    "config.json",
    "golden.arrow",
    "heads.safetensors",
    "student.safetensors",
    "vocabulary.arrow",
)
GOLDEN = 10
"""Golden cells, at the most."""
LARGEST = {"layers": 1000, "blocks": 1000}
"""Sizes in config.json that say how often a part is made, at the most; weights would tell only later."""
TOLERANCE = 1e-5
"""By how much a golden embedding may differ, absolute and relative: other processors round differently."""


def write(url: str, embedder: Embedder, *, golden: Counts) -> str:
    """Write `embedder` as a bundle at `url`; its hash, the sha256 of the manifest.

    `golden` are RNA tokens of some cells; the first GOLDEN go in, with their embeddings. A bundle
    that stands there is replaced; ValueError if something else does. Files come before the
    manifest, and a local folder appears whole, by a rename.
    """
    files = _contents(embedder, golden)
    listed = {name: {"bytes": len(data), "sha256": storage.sha256(data)} for name, data in files.items()}
    manifest = _json({"cellray": __version__, "files": listed, "schema": SCHEMA})
    fs, path = storage.locate(url)
    if isinstance(fs, LocalFileSystem):
        _write_folder(Path(path), files | {MANIFEST: manifest})
    else:
        storage.remove_file(storage.join(url, MANIFEST))
        for name, data in files.items():
            storage.write_bytes(storage.join(url, name), data)
        storage.write_bytes(storage.join(url, MANIFEST), manifest)
    return storage.sha256(manifest)


def load(url: str) -> Embedder:
    """The student at `url`, after every check: hashes, tokenizer, golden cells.

    ValueError, naming the file, for a bundle that is missing, incomplete, changed or of another kind.
    """
    files, digest = verified(url)
    where = f"bundle {url}"
    config = json.loads(files["config.json"])
    tokenizer = Tokenizer.from_arrow(arrow.decode(files["vocabulary.arrow"]))
    if tokenizer.hash != config["tokenizer"]:
        raise ValueError(
            f"{where}: vocabulary.arrow has tokenizer hash {tokenizer.hash[:12]}, config.json says "
            f"{config['tokenizer'][:12]}: the files belong to different models; export again"
        )
    try:
        student = _student(files["student.safetensors"], tokenizer, dict(config["network"]))
        head, reference = heads.from_tensors(
            safetensors.torch.load(files["heads.safetensors"]), config["classes"]
        )
    except (RuntimeError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{where}: weights and config.json do not fit together: {error}") from error
    embedder = Embedder(student, tokenizer, reference, head, config["about"], digest)
    _try_golden(embedder, arrow.decode(files["golden.arrow"]), where)
    return embedder


def verified(url: str) -> tuple[dict[str, bytes], str]:
    """The bytes of every file of the bundle at `url`, as its manifest has them, and the bundle's hash."""
    path = storage.join(url, MANIFEST)
    try:
        raw = storage.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"no bundle at {url}: {path} does not exist. Give the folder that `python -m pipelines.export` "
            "wrote; if the export was interrupted, run it again."
        ) from None
    try:
        manifest = json.loads(raw)
        schema, listed = manifest["schema"], dict(manifest["files"])
        wanted = {name: str(entry["sha256"]) for name, entry in listed.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no manifest of a bundle: {error!r}; fetch the bundle again") from None
    if schema != SCHEMA:
        raise ValueError(
            f"{path} has schema {schema!r}, this cellray ({__version__}) reads {SCHEMA}: "
            f"use the release that wrote it ({manifest.get('cellray', 'unknown')}), or export again"
        )
    if odd := sorted(set(wanted) ^ set(FILES)):
        raise ValueError(
            f"{path} lists other files than a bundle has ({', '.join(map(repr, odd[:5]))}): "
            "it was changed, or is of another release; fetch it again"
        )
    return {name: _checked(storage.join(url, name), wanted[name]) for name in FILES}, storage.sha256(raw)


def card(about: Mapping[str, Any], *, width: int, genes: int, classes: int) -> str:
    """The model card as Markdown.

    `about` may hold `datasets` (name, cells, donors, assays, species, tissues), `donors`
    (seen in training), `scores` (rows as in report.json), `kinds` (of student, as in report.json),
    `chosen` (why this one) and `run` (fingerprints).
    """
    lines = [f"# {about.get('name', 'cellray student')}", ""]
    lines += [
        f"RNA counts ({genes:,} genes) to a joint embedding ({width} numbers); {classes:,} labels.",
        "",
    ]
    lines += ["## Data", "", *_markdown(about.get("datasets", [])), ""]
    donors = about.get("donors", [])
    lines += [f"Donors seen in training: {', '.join(map(str, donors)) or 'none were named'}.", ""]
    lines += ["## Scores on held-out cells, beside baselines", "", *_markdown(about.get("scores", [])), ""]
    if kinds := [{**kind, **kind.get("probes", {})} for kind in about.get("kinds", [])]:
        shown = [{name: value for name, value in kind.items() if name != "probes"} for kind in kinds]
        lines += ["## Kinds of student", "", *_markdown(shown), "", about.get("chosen", ""), ""]
    lines += [
        "## Limits",
        "",
        "- Input is raw counts of RNA with gene ids; normalised counts are refused.",
        "- Labels are those of the training data only. A cell of another type gets the nearest one: "
        "look at its confidence and out-of-distribution score.",
        "- Species, assays and tissues other than those above were never seen.",
        "- For research; not for diagnosis.",
        "",
        "## Made from",
        "",
        *(f"- {key}: `{value}`" for key, value in sorted(about.get("run", {}).items())),
    ]
    return "\n".join(lines) + "\n"


def _contents(embedder: Embedder, golden: Counts) -> dict[str, bytes]:
    """Every file but the manifest. The same embedder gives the same bytes."""
    if not len(golden):
        raise ValueError("a bundle needs at least one golden cell to be tried on when it is loaded")
    rna = embedder.tokenizer.vocabularies[INPUT]
    config = {
        "about": dict(embedder.about),
        "classes": list(embedder.classes),
        "network": {"kind": embedder.student.kind, **embedder.student.sizes},
        "tokenizer": embedder.tokenizer.hash,
    }
    text = card(embedder.about, width=embedder.width, genes=len(rna), classes=len(embedder.classes))
    tensors = heads.to_tensors(embedder.head, embedder.reference)
    return {
        "card.md": text.encode(),
        "config.json": _json(config),
        "golden.arrow": arrow.encode(_golden(embedder, golden)),
        "heads.safetensors": safetensors.torch.save(tensors),
        "student.safetensors": safetensors.torch.save(embedder.student.state_dict()),
        "vocabulary.arrow": arrow.encode(embedder.tokenizer.to_arrow()),
    }


def _golden(embedder: Embedder, golden: Counts) -> pa.Table:
    cells = golden.take(np.arange(min(GOLDEN, len(golden))))
    vectors = embedder.embed(cells).vectors
    offsets = pa.array(cells.offsets.astype(np.int32))
    return pa.table(
        {
            "ids": pa.ListArray.from_arrays(offsets, pa.array(cells.ids)),
            "counts": pa.ListArray.from_arrays(offsets, pa.array(cells.counts.astype(np.uint32))),
            "total": pa.array(cells.total, pa.int64()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), embedder.width),
        }
    )


def _try_golden(embedder: Embedder, table: pa.Table, where: str) -> None:
    """ValueError unless the golden cells get the embeddings they had when the bundle was written."""
    ids, counts = table["ids"].combine_chunks(), table["counts"].combine_chunks()
    genes = len(embedder.tokenizer.vocabularies[INPUT])
    cells = Counts(
        ids.offsets.to_numpy().astype(np.int64),
        ids.values.to_numpy().astype(narrow(genes)),
        counts.values.to_numpy(),
        table["total"].to_numpy(),
    )
    wanted = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(cells), -1)
    found = embedder.embed(cells).vectors
    if not np.allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE):
        off = float(np.abs(found - wanted).max())
        raise ValueError(
            f"{where}: its golden cells come out different by up to {off:.3g}: this machine or this release "
            "computes another model than was exported. Export again with this release."
        )


def _student(data: bytes, tokenizer: Tokenizer, network: dict[str, Any]) -> Student:
    """The student whose kind and sizes are `network`; before there were kinds, it was a sparse MLP."""
    modalities = {name: (v.modality, len(v)) for name, v in tokenizer.vocabularies.items()}
    kind = network.pop("kind", "mlp")
    for name, size in network.items():
        if type(size) is not int or not 1 <= size <= LARGEST.get(name, 1 << 20):
            raise ValueError(f"{name} of the network is {size!r}")
    with torch.device("meta"):
        student = build(kind, modalities, network)
    student.load_state_dict(safetensors.torch.load(data), strict=True, assign=True)
    return student


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """`folder` with exactly these files: whole, or as it was."""
    replaced = folder.exists()
    if replaced and not (folder / MANIFEST).exists():
        raise ValueError(f"{folder} exists and is no bundle; name a folder that does not exist yet")
    new, old = (folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.{end}") for end in ("part", "old"))
    try:
        for name, data in files.items():
            storage.write_bytes(str(new / name), data)
        if replaced:
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            if replaced:
                os.rename(old, folder)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _checked(path: str, sha256: str) -> bytes:
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        raise ValueError(f"{path}, listed in {MANIFEST}, does not exist; fetch the bundle again") from None
    found = storage.sha256(data)
    if found != sha256:
        raise ValueError(
            f"{path} has sha256 {found[:16]}…, {MANIFEST} says {sha256[:16]}…: the file was changed or is "
            "incomplete; fetch the bundle again"
        )
    return data


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def _markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as a Markdown table."""
    if not rows:
        return ["Not recorded."]
    columns = list(rows[0])

    def cell(value: Any) -> str:
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")

    return [
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
        *("| " + " | ".join(cell(row.get(c, "")) for c in columns) + " |" for row in rows),
    ]
