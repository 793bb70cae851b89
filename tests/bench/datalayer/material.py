"""Files and stores that are measured, made once and kept."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cellray.data.store import Store
from tests.bench.datalayer import formats
from tests.bench.datalayer.synthetic import Cells, Peaks, gene_names, peak_names, write_h5ad
from tests.bench.harness.rounds import ROOT, Driver
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
    cpus: int = 2
    """Logical CPUs of the Ray that ingests."""
    say: Callable[[str], None] = print
    dismissed: list[Driver] = field(default_factory=list)
    """Rays that are on their way to their end."""

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
            assert self.ray  # which starts while we write
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
        atac = Peaks(cells=cells, peaks=peaks, drawn=1_000 if self.quick else 3_000)
        rna = self.files(cells)

        def write(folder: Path) -> None:
            rows = np.arange(cells)
            label = self.spec(cells).label(rows)
            write_h5ad(folder / "atac.h5ad", atac.blocks(0, cells), peak_names(peaks), rows, label)
            assert len(rna) == 1
            (folder / "rna.h5ad").symlink_to(os.path.relpath(rna[0], folder))
            lines = ["dataset,modality,url,label,species", "a,rna,rna.h5ad,label,=human"]
            lines.append("a,atac,atac.h5ad,label,=human")
            (folder / "atlas.csv").write_text("\n".join(lines) + "\n")

        return self._made(f"peaks-{peaks}-{cells}-{atac.drawn}", write) / "atlas.csv"

    def store(self, atlas: Path) -> Path:
        """The token store of an atlas, by our ingest."""
        return self.stores([atlas])[0]

    def stores(self, atlases: Sequence[Path]) -> list[Path]:
        """The token stores of several."""
        folders = [self.folder / "cache" / f"store-{atlas.parent.name}-{self.version}" for atlas in atlases]
        missing = [pair for pair in zip(atlases, folders, strict=True) if not pair[1].exists()]
        for atlas in atlases if missing else ():
            for old in (self.folder / "cache").glob(f"*store-{atlas.parent.name}-*"):
                if not old.name.endswith(self.version):
                    shutil.rmtree(old)
        if missing:
            self.say(f"… ingesting {', '.join(folder.name for _, folder in missing)}")
            parts = [folder.with_name(f".{folder.name}.part") for _, folder in missing]
            for (atlas, folder), part in zip(missing, parts, strict=True):
                self.ingest(atlas, part / "store")
                part.rename(folder)
        return [folder / "store" for folder in folders]

    def ingest(
        self, atlas: Path, store: Path, *, tasks: int = 2, settings: dict[str, int] | None = None
    ) -> dict[str, Any]:
        """Ingest `atlas` into `store`, `tasks` at a time; what it cost."""
        command = {"atlas": str(atlas), "store": str(store), "tasks": tasks, "settings": settings or {}}
        self.ray.ready()
        return self.ray.ask(json.dumps(command))

    @cached_property
    def ray(self) -> Driver:
        """The Ray that ingests, on its way up; the same for all ingests until `close`."""
        driver = Driver("ingest", "tests.bench.drivers.ingest", [str(self.cpus)], pinned=False)
        driver.launch()
        return driver

    def dismiss(self) -> None:
        """Let that Ray end, if there is one; another starts where it is needed."""
        if driver := self.__dict__.pop("ray", None):
            driver.dismiss()
            self.dismissed.append(driver)

    def close(self) -> None:
        """Let that Ray end, if there is one, and wait for it."""
        self.dismiss()
        while self.dismissed:
            self.dismissed.pop().close()

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
