"""python -m pipelines.full RECIPE [key=value …]: from the atlas to an answering endpoint and a report."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cellray import cluster
from cellray.data import storage
from cellray.data.atlas import files
from cellray.train.progress import Progress
from cellray.train.recipe import Recipe, fingerprint
from pipelines import ingest as ingesting
from pipelines.ask import alone, ask
from pipelines.command import Options, main
from pipelines.export import export, refuse
from pipelines.pretrain import pretrain
from pipelines.score import CPUS, gather, saved, score, silent, student_facts


def run(recipe: Recipe, options: Options) -> None:
    refuse(recipe)
    with_rna(recipe)
    if options.dry_run:
        ingesting.run(recipe, options)
        return
    began = time.monotonic()
    with Progress(options.progress) as progress:
        report = full(recipe, progress)
    print(summary(recipe, report, time.monotonic() - began))


def with_rna(recipe: Recipe) -> None:
    """ValueError where no file of the atlas can hold what a student reads."""
    known = {file.modality for file in files(recipe)}
    if not known & {"", "rna"}:
        raise ValueError(
            f"a student reads RNA, and the atlas names {' and '.join(sorted(known))} alone: add the RNA, or "
            "train without a student by pipelines.ingest, and pipelines.pretrain with stages=unimodal,joint"
        )


def full(recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """The whole path; what report.json holds. What an earlier, killed run finished is not done again."""
    import ray

    from cellray.data.ingest import ingest
    from cellray.data.store import Store
    from cellray.tasks import figures
    from cellray.train.loop import room
    from cellray.train.run import Run

    run = Run(recipe)
    with cluster.connect(threads=recipe.threads):
        room(recipe, lambda text: None)  # training says again what it waits for
        alone()
        run.claim()
        ingested = ingest(recipe, run.store_url, ingesting.Steps(progress))
        ingesting.write(ingested, run.store_url)
        ingesting.complete(ingested, recipe)
        if run.store.hash != Store(run.store_url).hash:
            raise ValueError(
                f"{run.store_url} has grown since {run.url} was begun, which goes on with the cells it had: "
                f"give a new run=, with store={run.store_url}, to train on all of them"
            )
        pretrain(recipe, progress)
        scored = gather(run)
        panels = ray.remote(num_cpus=CPUS)(figures.panels).remote(scored, silent)
        score(run, scored, progress)
        export(run)
        line = progress.stage("endpoint", 1, unit="model")
        endpoint = ask(run)
        line.finish(
            f"{endpoint['requests']} requests, {endpoint['failed']} failed, p50 {endpoint['p50_ms']} ms"
        )
        line = progress.stage("report", 1, unit="page")
        whole = write_report(run, ingested, endpoint, ray.get(panels))
        line.finish()
    return whole


def write_report(
    run: Any, ingested: dict[str, Any], endpoint: dict[str, Any], panels: list[Any]
) -> dict[str, Any]:
    """RUN/report.json and RUN/report.html; returns what the former holds."""
    from cellray.tasks import page, report
    from cellray.train import checkpoint

    stages, curves = [], []
    for name in run.chain():
        facts = checkpoint.committed(run.path("stages", name)) or {}
        curves += [{"stage": name, **row} for row in facts.pop("curve")]
        stages.append(facts)
    whole = report.assemble(
        run={
            "recipe": fingerprint(run.recipe),
            "store": run.store.hash,
            "code": code_fingerprint(),
            "seed": run.recipe.seed,
        },
        ingest=ingested,
        stages=stages,
        student=student_facts(run),
        scores=saved(run),
        endpoint=endpoint,
    )
    html = page.page(whole, metrics=curves, panels=panels, title=run.recipe.run)
    report.write(run.url, whole, html)
    return whole


def code_fingerprint() -> str:
    """The commit this runs from, marked where files differ from it; else a hash of the library's files."""
    root = Path(__file__).parent.parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--match="],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    if commit:
        return commit
    import cellray

    files = sorted(Path(cellray.__file__).parent.rglob("*.py"))
    return storage.sha256(b"".join(file.read_bytes() for file in files))


def summary(recipe: Recipe, report: dict[str, Any], seconds: float) -> str:
    """The score table, a line a task, and where everything is; `pipelines.score` prints every model."""
    from cellray.tasks.report import headlines

    where = storage.absolute(recipe.run)
    student = report["student"]
    return "\n".join(
        [
            f"{'task':<24}{'data set':<14}{'metric':<32}{'verdict':<9}student against the best baseline",
            *(
                f"{h.task:<24}{h.dataset:<14}{h.metric:<32}{h.verdict:<9}{h.text}"
                for h in headlines(report["scores"])
            ),
            "",
            f"student ({student['kind']}): {student['parameters']:,} parameters, the teacher's RNA path has "
            f"{student['teacher_parameters']:,}; {student['cells_per_cpu_second']:,.0f} cells a CPU-second",
            f"endpoint: {json.dumps(report['endpoint'])}",
            f"report: {storage.join(where, 'report.html')}",
            f"bundle: {storage.join(where, 'bundle')}",
            f"{seconds / 60:.1f} minutes",
        ]
    )


if __name__ == "__main__":
    sys.exit(main("All of it: ingest, pretrain, score, export, ask the endpoint, report.", run))
