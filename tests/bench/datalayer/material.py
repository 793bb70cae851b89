"""Files and stores that are measured, made once and kept."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cellray.data.store import Store
from tests.bench.datalayer import formats
from tests.bench.datalayer.synthetic import Cells, Peaks, gene_names, peak_names, write_h5ad
from tests.bench.harness.rounds import ONE_THREAD, ROOT
from tests.bench.harness.serve import MARK
from tests.bench.harness.venvs import Environment, python_of

SOURCE = ROOT / "platform" / "cellray" / "data"
"""What decides the bytes of a store: kept stores are made again when a file of it changes."""


@dataclass(frozen=True)
class Material:
    """What is below one folder. Each method returns the path of something, made if it is not there."""

    folder: Path
    cells: int
    """Cells of the largest store."""
    quick: bool
    say: Callable[[str], None] = print

    @cached_property
    def version(self) -> str:
        """Of the code that writes stores."""
        digest = hashlib.sha256()
        for path in sorted(SOURCE.glob("*.py")):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:8]

    def spec(self, cells: int) -> Cells:
        return Cells(cells=cells)

    def atlas(self, cells: int) -> Path:
        """Table of an atlas of .h5ad files with RNA."""
        spec = self.spec(cells)
        names = gene_names(spec.genes)

        def write(folder: Path) -> None:
            lines = ["dataset,modality,url,label,species"]
            for number, (first, last) in enumerate(spec.files):
                rows = np.arange(first, last)
                path = folder / f"part{number}.h5ad"
                write_h5ad(path, spec.blocks(first, last), names, rows, spec.label(rows))
                lines.append(f"part{number},rna,{path.name},label,=human")
            (folder / "atlas.csv").write_text("\n".join(lines) + "\n")

        return self._made(f"h5ad-{cells}", write) / "atlas.csv"

    def files(self, cells: int) -> list[Path]:
        """The .h5ad files of that atlas."""
        return sorted(self.atlas(cells).parent.glob("*.h5ad"))

    def peaks_atlas(self, peaks: int, cells: int) -> Path:
        """Table of an atlas with RNA and ATAC of the same cells; as many tokens whatever `peaks`."""
        rna, atac = self.spec(cells), Peaks(cells=cells, peaks=peaks, drawn=1_000 if self.quick else 3_000)

        def write(folder: Path) -> None:
            rows = np.arange(cells)
            label = rna.label(rows)
            write_h5ad(folder / "rna.h5ad", rna.blocks(0, cells), gene_names(rna.genes), rows, label)
            write_h5ad(folder / "atac.h5ad", atac.blocks(0, cells), peak_names(peaks), rows, label)
            lines = ["dataset,modality,url,label,species", "a,rna,rna.h5ad,label,=human"]
            lines.append("a,atac,atac.h5ad,label,=human")
            (folder / "atlas.csv").write_text("\n".join(lines) + "\n")

        return self._made(f"peaks-{peaks}-{cells}-{atac.drawn}", write) / "atlas.csv"

    def store(self, atlas: Path) -> Path:
        """The token store of an atlas, by our ingest."""
        return self.stores([atlas])[0]

    def stores(self, atlases: Sequence[Path]) -> list[Path]:
        """The token stores of several, in one Ray."""
        folders = [self.folder / "cache" / f"store-{atlas.parent.name}-{self.version}" for atlas in atlases]
        missing = [pair for pair in zip(atlases, folders, strict=True) if not pair[1].exists()]
        for atlas in atlases if missing else ():
            for old in (self.folder / "cache").glob(f"*store-{atlas.parent.name}-*"):
                if not old.name.endswith(self.version):
                    shutil.rmtree(old)
        if missing:
            self.say(f"… ingesting {', '.join(folder.name for _, folder in missing)}")
            parts = [folder.with_name(f".{folder.name}.part") for _, folder in missing]
            self.ingest([(atlas, p / "store") for (atlas, _), p in zip(missing, parts, strict=True)], cpus=2)
            for (_, folder), part in zip(missing, parts, strict=True):
                part.rename(folder)
        return [folder / "store" for folder in folders]

    def ingest(self, pairs: Sequence[tuple[Path, Path]], *, cpus: int) -> list[dict[str, Any]]:
        """Ingest atlas into store, for each pair, in a Ray of `cpus` logical CPUs; what each cost."""
        path = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
        environment = os.environ | ONE_THREAD | {"PYTHONPATH": path, MARK: uuid.uuid4().hex}
        command = [sys.executable, "-m", "tests.bench.drivers.ingest", str(cpus)]
        done = subprocess.run(
            [*command, *(str(path) for pair in pairs for path in pair)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            check=True,
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    def converted(self, name: str, write: Callable[[Store, Path], None]) -> Path:
        """The largest store in the format that `write` writes."""
        store = self.store(self.atlas(self.cells))
        return self._made(f"{name}-{store.parent.name}", lambda folder: write(Store(str(store)), folder))

    def collection(self, python: str) -> Path:
        """annbatch's own format."""
        files = [str(path) for path in self.files(self.cells)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "platform")])

        def write(folder: Path) -> None:
            command = [
                python,
                "-m",
                "tests.bench.drivers.annbatch",
                "make",
                str(folder / "cells.zarr"),
                *files,
            ]
            subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, check=True)

        return self._made(f"annbatch-{self.cells}", write) / "cells.zarr"

    def python(self, environment: Environment) -> str | None:
        """The interpreter of a competitor, None if it is not there and this is no time to make it."""
        return python_of(environment, self.folder / "venvs", make=not self.quick)

    def _made(self, name: str, write: Callable[[Path], object]) -> Path:
        folder = self.folder / "cache" / name
        if not folder.exists():
            self.say(f"… making {folder}")
        return formats.made(folder, write)
