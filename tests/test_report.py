import copy
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from cellray.tasks import figures, plane, report
from cellray.tasks.page import page
from cellray.tasks.score import score
from cellray.train.recipe import Score
from tests.scored import made

HOSTILE = '</style><script>alert("x")</script>'


@pytest.fixture(scope="module")
def rows():
    return score(made(number=300), Score(seeds=1, bootstrap=20), lambda text: None)


def parts(rows):
    stage = {
        "name": "joint", "steps": 100, "seconds": 12.5, "cells_per_second": 800.0,
        "data_wait_share": 0.01, "loss_first": 3.0, "loss_last": 1.0,
    }  # fmt: skip
    modality = {
        "cells_in": 320, "cells_kept": 300, "cells_dropped": {"label": 20},
        "features_in": 61, "features_kept": 60, "features_dropped": {"in_too_few_cells": 1},
    }  # fmt: skip
    return {
        "run": {"recipe": "a" * 64, "store": "b" * 64, "code": "c" * 64, "seconds": 61},
        "ingest": {
            "cells_in": 320,
            "cells_kept": 300,
            "dropped": {"label": 20, "nothing_left": 0},
            "datasets": [{"name": "paired", "modalities": {"rna": modality}}],
            "failed": [],
        },
        "stages": [stage],
        "student": {"parameters": 20_000, "teacher_parameters": 100_000, "cells_per_cpu_second": 5000.0},
        "scores": rows,
        "endpoint": {"requests": 9, "failed": 0, "p50_ms": 4.2, "max_abs_difference_to_offline": 0.0},
    }


def curve(stage="joint"):
    return [{"stage": stage, "step": i, "loss": 3.0 / i, "match": 1.0} for i in range(1, 20)]


def test_the_report_holds_what_it_must(rows):
    made_ = report.assemble(**parts(rows))
    assert made_["schema"] == "cellray.report/1"
    assert set(made_) == {"schema", "run", "ingest", "stages", "student", "scores", "endpoint"}
    assert set(made_["student"]["fidelity"]) == {"cosine", "knn_overlap"}
    assert made_["student"]["recovery_of"] == "Pearson of state within label"
    assert 0 < made_["student"]["recovery"] < 1.5
    assert json.loads(json.dumps(made_, allow_nan=False)) == made_


def test_no_report_without_the_baselines(rows):
    for model in ("majority", "ridge on PCA", "RNA-only model", "random weights", "RNA depth alone"):
        fewer = [row for row in rows if row["model"] != model]
        with pytest.raises(ValueError, match=rf"stands without its baselines.*{model}"):
            report.assemble(**parts(fewer))


def test_a_baseline_that_was_not_run_needs_a_reason(rows):
    changed = copy.deepcopy(rows)
    row = next(row for row in changed if row["model"] == "majority")
    row |= {"value": None, "low": None, "high": None, "reason": "out of time"}
    report.assemble(**parts(changed))
    row["reason"] = ""
    with pytest.raises(ValueError, match="no value and no reason"):
        report.assemble(**parts(changed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["run"].pop("store"), "run lacks store"),
        (lambda r: r["ingest"].pop("dropped"), "ingest lacks dropped"),
        (lambda r: r["stages"][0].pop("loss_last"), "stage 'joint' lacks loss_last"),
        (lambda r: r["student"].pop("parameters"), "student lacks parameters"),
        (lambda r: r["endpoint"].update(p50_ms=None), "endpoint has no figures and no reason"),
        (lambda r: r["scores"].clear(), "there are no scores"),
        (lambda r: r["stages"].clear(), "there are no stages"),
        (lambda r: r["scores"][0].pop("split"), "lacks split"),
        (lambda r: r["scores"][0].update(verdict="wins"), "has the verdict 'wins'"),
        (lambda r: r["scores"][0].update(value=float("nan")), "holds NaN or infinity"),
        (lambda r: r["scores"][0].update(task="magic"), "nobody said which baselines"),
    ],
)
def test_an_incomplete_report_is_refused(rows, change, message):
    given = copy.deepcopy(parts(rows))
    change(given)
    with pytest.raises(ValueError, match=message):
        report.assemble(**given)


def test_a_report_of_another_schema_is_refused(rows):
    with pytest.raises(ValueError, match="schema 'other'"):
        report.check(report.assemble(**parts(rows)) | {"schema": "other"})


def test_an_endpoint_that_was_not_asked_says_why(rows):
    given = parts(rows)
    given["endpoint"] = dict.fromkeys(given["endpoint"]) | {"reason": "it was not started"}
    assert "Not asked: it was not started" in page(report.assemble(**given), [], [], title="t")


def test_the_table_shows_student_baselines_and_verdicts(rows):
    lines = report.table(rows).splitlines()
    assert lines[0].startswith("annotation | paired | 2 held-out donors, ")
    student = next(line for line in lines if line.startswith("> student, linear probe"))
    assert re.search(r"[01]\.\d{3} \([01]\.\d{3} to [01]\.\d{3}\) (beats|ties|loses)", student)
    assert any(line.startswith("  majority") for line in lines)
    assert any(line.startswith("> recovery of Pearson of state within label: ") for line in lines)
    assert max(map(len, lines)) < 140


def test_headlines_name_the_best_baseline(rows):
    found = {line.task: line for line in report.headlines(rows)}
    assert set(found) == {row["task"] for row in rows}
    assert found["missing modality"].metric == "Pearson of state within label"
    assert "; recovery 0." in found["missing modality"].text
    assert re.fullmatch(r"1\.000 against 0\.\d{3} of .+", found["RNA to ATAC"].text)


def test_a_score_of_minus_nothing_is_nothing():
    assert report.number(-0.0001) == "0.000"
    assert report.number(-0.5) == "-0.500"
    assert report.number(None) == "-"


class Page(HTMLParser):
    """Tags, and every attribute that could reach outside."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.links, self.open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img", "line", "circle", "path", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "circle", "path", "polyline"):
            assert self.open.pop() == tag


def test_the_page_is_one_file_and_well_formed(rows):
    panel = figures.Panel(embedding="Student", colour="label", png=b"\x89PNG", legend=(("T", "#123456", 3),))
    html = page(report.assemble(**parts(rows)), curve(), [panel], title="Demo")
    found = Page(html)
    assert found.open == []
    assert all(link.startswith("data:image/png;base64,") for link in found.links)
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html
    for heading in ("In short", "Scores beside baselines", "Embeddings", "Training", "Ingest", "Endpoint"):
        assert f"<h2>{heading}</h2>" in html
    assert "320 cells read, 300 kept, 20 dropped: label 20." in html


def compared(*kinds):
    """The student's part of a report that compares kinds."""
    costs = {"mlp": (20_000, 5000.0), "transformer": (60_000, 50.0)}
    found = [
        {
            "kind": kind,
            "parameters": costs[kind][0],
            "cells_per_cpu_second": costs[kind][1],
            "cosine": 0.8,
            "probes": {"label accuracy": 0.9},
        }
        for kind in kinds
    ]
    return parts([])["student"] | {"kind": kinds[0], "why": HOSTILE, "kinds": found}


def test_kinds_of_student_are_a_table_and_if_several_a_figure_a_score(rows):
    for kinds in (["mlp"], ["mlp", "transformer"]):
        given = parts(rows) | {"student": compared(*kinds)}
        html = page(report.assemble(**given), curve(), [], title="Demo")
        found = Page(html)
        assert found.open == []
        assert "<script" not in html
        assert "<h2>Kinds of student</h2>" in html
        assert html.count("<th>mlp</th>") == 1
        assert html.count("over cells per CPU-second") == (2 if len(kinds) > 1 else 0)
        assert '<td class="n">5,000</td><td class="n">20,000</td><td class="n">0.800</td>' in html
    assert "Kinds of student" not in page(report.assemble(**parts(rows)), curve(), [], title="Demo")


def test_the_better_and_the_cheaper_kind_is_further_up_and_to_the_right():
    a, b = compared("mlp", "transformer")["kinds"]
    svg = plane.plane([a | {"cosine": 0.9}, b], plane.COSINE)
    places = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    (x, y), (x2, y2) = [(float(x), float(y)) for x, y in places]
    assert x > x2
    assert y < y2


def test_everything_from_data_is_escaped(rows):
    changed = copy.deepcopy(rows)
    for row in changed:
        row["dataset"] = row["split"] = HOSTILE
    next(row for row in changed if row["value"] is None)["reason"] = HOSTILE
    given = parts(changed)
    given["run"]["name"] = HOSTILE
    given["stages"][0]["name"] = HOSTILE
    given["ingest"]["failed"] = [HOSTILE]
    given["ingest"]["datasets"][0]["name"] = HOSTILE
    given["ingest"]["dropped"] = {HOSTILE: 3}
    given["endpoint"]["device"] = HOSTILE
    panel = figures.Panel(embedding=HOSTILE, colour=HOSTILE, png=b"", legend=((HOSTILE, "#000000", 1),))
    html = page(report.assemble(**given), curve(HOSTILE), [panel], title=HOSTILE)
    assert "<script" not in html
    assert html.count("</style>") == 1


def test_json_and_page_are_written_whole_and_only_if_sound(rows, tmp_path):
    made_ = report.assemble(**parts(rows))
    report.write(str(tmp_path / "run"), made_, "<p>ü</p>")
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == made_
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf8") == "<p>ü</p>"
    assert len(list((tmp_path / "run").iterdir())) == 2
    with pytest.raises(ValueError, match="no scores"):
        report.write(str(tmp_path / "bad"), made_ | {"scores": []}, "")
    assert not (tmp_path / "bad").exists()


def test_panels_show_three_embeddings_in_the_same_colours():
    scored = made(number=90)
    scored.cells.loc[:4, "label"] = ""
    scored.cells.loc[5, "label"] = "$x^{"
    found = figures.panels(scored, lambda text: None, cells=60)
    assert [(p.colour, p.embedding) for p in found] == [
        (colour, name)
        for colour in ("label", "donor")
        for name in ("Joint (teacher)", "Student, RNA alone", "PCA of RNA")
    ]
    assert all(p.png.startswith(b"\x89PNG") and len(p.png) > 1000 for p in found)
    assert found[0].legend == found[1].legend
    assert sum(count for _, _, count in found[0].legend) == 60


def test_a_umap_is_the_same_every_time():
    vectors = np.random.default_rng(0).normal(size=(40, 5))
    np.testing.assert_array_equal(figures.umap(vectors), figures.umap(vectors))


def test_groups_beyond_the_colours_come_together():
    values = np.array([f"g{i}" for i in range(30) for _ in range(30 - i)] + [""] * 7)
    legend = figures._legend(values)
    assert len(legend) == len(figures.COLOURS) + 2
    assert legend[-2] == ("11 others", figures.OTHER, sum(range(1, 12)))
    assert legend[-1] == ("unknown", figures.OTHER, 7)


def test_a_missing_extra_is_named():
    code = (
        "import sys; sys.modules['umap'] = None\n"
        "import numpy as np\n"
        "from cellray.tasks import figures\n"
        "figures.umap(np.zeros((20, 3)))\n"
    )
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert "ValueError: the report needs umap: pip install cellray[report]" in done.stderr


def test_reading_a_report_imports_neither_torch_nor_matplotlib():
    code = "import sys, cellray.tasks.figures; assert not {'matplotlib', 'umap'} & set(sys.modules)"
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})
