import copy
import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from cellray.data.markup import line, text
from cellray.data.page import page
from cellray.data.qc import QC, Metrics, judge
from cellray.data.remarks import TOPICS, judged, percent, remarks

HOSTILE = '</style><script>alert("x")</script><img src=http://x.org/a>'
VOID = ("meta", "line", "path", "br")
GENES = {
    "columns": 2000, "resolved": 0.7, "duplicates": 7, "orthologs": 1234,
    "kinds": {"symbol": 1390, "alias": 10, "ambiguous": 21, "unknown": 579},
    "examples": {"ambiguous": ["TWIN1"], "unknown": ["NOGENE1", "NOGENE2"]},
}  # fmt: skip
PEAKS = {
    "peaks": 5000, "mapped": 3800, "features": 3111, "unmapped": {"no_overlap": 1190, "no_interval": 10},
    "examples": {"no_overlap": ["chr9:5-9"], "no_interval": ["oops"]},
}  # fmt: skip


class Page(HTMLParser):
    """The words and tags of a page, and what could reach outside. Balanced, or an assertion fails."""

    def __init__(self, html):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.links: list[str | None] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "style")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def verdict(names, cells=200, seed=0, **qc):
    """What `judge` says of `cells` cells a group, some of them odd."""
    rng = np.random.default_rng(seed)
    counts = rng.lognormal(7, 0.5, cells * len(names)).astype(np.int64)
    counts[0], counts[1] = 900_000, 3
    metrics = Metrics(
        counts=counts,
        features=np.maximum(counts // 4, 1).astype(np.int32),
        mito=(counts * rng.beta(2, 30, len(counts))).astype(np.int64),
        digest=rng.integers(0, 1 << 63, len(counts)).astype(np.uint64),
    )
    metrics.digest[5:9] = 0
    groups = np.repeat(np.arange(len(names)), cells)
    return judge(metrics, groups, names, np.zeros(len(counts), bool), QC(**qc), min_features=2)


def lost(cells):
    gone = cells[0] - cells[1]
    return {"label": 0, "outlier_counts": gone - gone // 3, "duplicate": gone // 3, "nothing_left": 0}


def modality(names=(), cells=(200, 150), counts=(90_000, 80_000), features=(2000, 1990)):
    return {
        "cells_in": cells[0], "cells_kept": cells[1],
        "cells_dropped": lost(cells),
        "features_in": features[0], "features_kept": features[1],
        "features_dropped": {"in_too_few_cells": features[0] - features[1]},
        "counts_in": counts[0], "counts_kept": counts[1],
        "counts_dropped": {
            "label": 0, "outlier_counts": counts[0] - counts[1] - 77,
            "feature_in_too_few_cells": 37, "no_feature": 40,
        },
        "tokens": 12_345, "names": list(names),
    }  # fmt: skip


def dataset(name="kidney", cells=(200, 150), **changes):
    return {
        "name": name, "cells_in": cells[0], "cells_kept": cells[1],
        "dropped": lost(cells),
        "species": ["human"], "species_from": "genes",
        "labels": {"T cell": 90, "B cell": 40, "": 20}, "label_from": "rna",
        "donors": {"d1": 100, "d2": 50}, "batches": {"": 150}, "assays": {"10x 3' v3": 150},
        "present": {"rna+atac": 120, "rna": 30},
        "modalities": {"rna": modality([GENES], cells), "atac": modality([PEAKS], (150, 120))},
    } | changes  # fmt: skip


def report(*datasets, failed=(), names=None):
    datasets = datasets or (
        dataset(),
        dataset("calm", (1000, 990), modalities={"protein": modality((), (9, 9))}),
    )
    keys = [
        name if isinstance(name, tuple) else (name.partition(", ")[0], name.partition(", ")[2])
        for name in names or [(entry["name"], "") for entry in datasets]
    ]
    found = verdict([", ".join(filter(None, key)) for key in keys])
    for group, (owner, assay) in zip(found.groups, keys, strict=True):
        group |= {"dataset": owner, "assay": assay}
    dropped: dict[str, int] = {}
    for entry in datasets:
        for reason, number in entry["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + number
    made = {
        "cells_in": sum(entry["cells_in"] for entry in datasets),
        "cells_kept": sum(entry["cells_kept"] for entry in datasets),
        "dropped": dropped,
        "features": {"rna": 12_001, "atac": 34_002, "protein": 17},
        "datasets": list(datasets),
        "quality": [{"modality": "rna", "groups": found.groups, "edges": found.edges}],
        "failed": list(failed),
    }
    return json.loads(json.dumps(made))


def test_the_page_is_one_balanced_file_without_anything_from_outside():
    html = page(report(failed=[{"dataset": "bad", "reason": "s3://b/f: no counts"}]))
    found = Page(html)
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in found.tags}
    assert all(link and link.startswith("#d") for link in found.links)
    assert "default-src 'none'" in html
    assert not re.search(r"https?:|url\(|@import", html)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_links_lead_to_data_sets():
    found = Page(page(report()))
    places = {attrs["id"] for _, attrs in found.tags if "id" in attrs}
    links = set(found.links)
    assert links == {f"#{place}" for place in places}
    assert len(places) == 2


def test_every_number_of_the_report_is_shown():
    made = report()
    found = Page(page(made)).text
    assert "1,140 of 1,200 cells from 2 data sets are in the store. Every one could be read." in found
    assert "cells in 1,200 outlier counts −41 3.4 %" in found
    assert (
        "duplicate −19 1.6 % the same counts, feature by feature, as an earlier cell kept 1,140 95.0 %"
        in found
    )
    for entry in made["datasets"]:
        assert entry["name"] in found
        for name, part in entry["modalities"].items():
            assert name in found
            for what in ("cells", "features", "counts"):
                for number in (part[f"{what}_in"], part[f"{what}_kept"]):
                    assert f"{number:,}" in found
                for number in part[f"{what}_dropped"].values():
                    assert not number or f"−{number:,}" in found
    for told in (
        "12,001",
        "34,002",
        "symbol 1,390 69.5 %",
        "ambiguous 21 1.1 % TWIN1, …",
        "NOGENE1, NOGENE2, …",
    ):
        assert told in found
    for told in ("1,234 took the id of an ortholog", "7 repeat another, summed", "2,000 genes in 1 file"):
        assert told in found
    for told in (
        "mapped 3,800",
        "no overlap 1,190 23.8 % chr9:5-9, …",
        "no interval 10 0.2 % oops, …",
        "3,111",
    ):
        assert told in found
    for told in (
        "T cell 90, B cell 40, unknown 20",
        "d1 100, d2 50",
        "rna+atac 120, rna 30",
        "10x 3' v3 150",
    ):
        assert told in found
    assert "No cell is judged by this modality" in found


def test_columns_that_do_not_add_up_are_marked():
    broken = report()
    assert "unexplained" not in Page(page(broken)).text
    assert "neither kept nor dropped" not in Page(page(broken)).text
    broken["datasets"][0]["modalities"]["rna"]["counts_kept"] -= 5
    broken["cells_kept"] -= 3
    found = Page(page(broken)).text
    assert "unexplained −5" in found
    assert "3 cells are neither kept nor dropped with a reason." in found


def test_failed_data_sets_come_first_with_their_whole_reason():
    reason = "s3://b/f.h5ad: " + "the counts are not whole numbers, " * 30 + "write the layer"
    html = page(report(failed=[{"dataset": "bad one", "reason": reason}]))
    found = Page(html)
    assert reason in found.text
    assert "1 data set could not be read" in found.text
    assert html.index("bad one") < html.index('class="tiles"') < html.index("Worth a look")
    before = html[html.index("<body>") : html.index("bad one")]
    assert "<details" not in before


def test_a_report_of_failures_alone_and_an_empty_one_are_pages():
    empty = {"cells_in": 0, "cells_kept": 0, "dropped": {}, "features": {}, "datasets": [], "quality": []}
    told = Page(page(empty | {"failed": [{"dataset": "bad", "reason": "why"}]})).text
    assert "0 of 0 cells from 0 data sets are in the store. 1 data set could not be read." in told
    assert "bad : why" in told
    assert "Nothing." in Page(page(empty | {"failed": []})).text


def test_names_from_files_are_escaped_wherever_they_stand():
    odd = dataset(HOSTILE, label_from=HOSTILE, species=[HOSTILE])
    odd |= {key: {HOSTILE: 150} for key in ("labels", "donors", "batches", "assays", "present")}
    genes = GENES | {"kinds": {"unknown": 2000}, "examples": {"unknown": [HOSTILE]}}
    peaks = PEAKS | {"unmapped": {HOSTILE: 5}, "examples": {HOSTILE: [HOSTILE]}}
    odd["dropped"] = odd["dropped"] | {HOSTILE: 3}
    odd["modalities"] = {HOSTILE: modality([genes]), "atac": modality([peaks])}
    odd["modalities"][HOSTILE]["cells_dropped"][HOSTILE] = 4
    made = report(odd, failed=[{"dataset": HOSTILE, "reason": HOSTILE}], names=[f"{HOSTILE}, {HOSTILE}"])
    made["quality"][0]["modality"] = HOSTILE
    made["features"] = {HOSTILE: 3}
    html = page(made)
    found = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in found.tags}
    assert html.count("</style>") == 1
    assert found.text.count('<script>alert("x")</script>') > 15


def test_what_cannot_be_seen_or_written_is_replaced_and_the_longest_are_cut():
    assert line("a\n\tb\u202ec\ud800\x00d") == "a b\ufffdc\ufffd\ufffdd"
    assert text("<" * 500) == "&lt;" * 159 + "…"
    html = page(report(dataset("\ud800\u202e" + "x" * 100_000)))
    assert len(html.encode()) < 60_000


@pytest.mark.parametrize(
    ("change", "topic", "told"),
    [
        ({"cells_kept": 799}, "cells", "201 of 1,000 cells, 20.1 %: outlier counts 150, duplicate 51"),
        ({"species": []}, "species", "unknown"),
        (
            {"modalities": {"protein": modality()}, "species_from": "atlas"},
            "species",
            "human, declared; 0.0 % of the names speak",
        ),
        (
            {"modalities": {"rna": modality([GENES], counts=(100, 19))}},
            "counts",
            "rna: 81 of 100 counts, 81.0 %",
        ),
        ({"modalities": {"rna": modality([GENES])}}, "genes", "rna: 600 of 2,000 genes, 30.0 %"),
        ({"modalities": {"atac": modality([PEAKS])}}, "peaks", "atac: 1,200 of 5,000 peaks, 24.0 %"),
        (
            {"modalities": {"rna": modality([GENES])}},
            "features",
            "rna: 10 of 2,000, 0.5 %: in too few cells 10",
        ),
    ],
)
def test_what_is_worth_a_look_is_told(change, topic, told):
    known = GENES | {"kinds": {"symbol": 2000}}
    plain = {"rna": modality([known], features=(2000, 2000))}
    dropped = {"outlier_counts": 150, "duplicate": 51}
    calm = dataset("calm", (1000, 800), dropped=dropped, modalities=plain)
    others = report(calm, names=["calm"])
    others["quality"] = []
    assert remarks(others) == []
    others["datasets"][0] |= change
    found = {remark.topic: remark.text for remark in remarks(others)}
    assert found[topic].startswith(told)
    html = Page(page(others)).text
    assert f"1 data set : {TOPICS[topic]}".replace(" :", ":") in html
    assert found[topic] in html


def test_cells_that_were_not_compared_are_told():
    made = report()
    assert made["quality"][0]["groups"][0]["uncompared"] == 4
    remark = next(remark for remark in remarks(made) if remark.topic == "uncompared")
    assert (remark.dataset, remark.text) == ("kidney", "4 cells, 2.7 % of those kept")
    assert "4 cells kept that cannot be told from duplicates" in Page(page(made)).text


def test_the_worst_comes_first_and_the_others_are_folded():
    many = [dataset(f"set{kept}", (1000, kept)) for kept in range(100, 700, 50)]
    html = page(report(*many))
    start = html.index("lost more than 20 % of the cells")
    part = html[start : html.index("</div>", start)]
    assert re.findall(r">(set\d+)<", part) == [f"set{kept}" for kept in range(100, 700, 50)]
    assert part.count("<li>") == 12
    assert "<summary>4 more</summary>" in part


def test_a_group_belongs_to_its_data_set():
    sets = [dataset("a"), dataset("a, b")]
    names = [("a", ""), ("a", "b"), ("a, b", ""), ("ab", "x")]
    found = {
        name: [own.group["assay"] for own in groups]
        for name, groups in judged(report(*sets, names=names)).items()
    }
    assert found == {"a": ["", "b"], "a, b": [""], "": ["x"]}
    assert "Of no data set" in Page(page(report(*sets, names=names))).text


def test_groups_of_both_editions_are_shown():
    made = report(dataset("old"), dataset("new"))
    first, second = made["quality"][0]["groups"]
    edges = made["quality"][0]["edges"]
    made["quality"] = [{"modality": "rna", "groups": [own], "edges": edges} for own in (first, second)]
    assert {name: len(own) for name, own in judged(made).items()} == {"old": 1, "new": 1}


def test_only_the_largest_groups_of_a_data_set_are_drawn():
    names = [f"kidney, assay{number}" for number in range(7)]
    html = page(report(dataset(), names=names))
    assert html.count("<svg") == 9
    assert "The largest 3 of 7 groups are drawn." in html
    assert all(f"<b>assay{number}</b>" in html for number in range(7))


def test_every_figure_has_a_text_with_its_numbers():
    made = report()
    own = made["quality"][0]["groups"][0]
    low, high = own["limits"]["counts"]
    told = [str(attrs["aria-label"]) for tag, attrs in Page(page(made)).tags if tag == "svg"]
    assert len(told) == 6
    assert "rna, not in the store" in Page(page(made)).text
    kept = own["reasons"]["kept"]
    assert told[0].startswith(
        f"counts per cell, kidney, rna: {200:,} cells before, {kept:,} after quality control"
    )
    assert told[0].endswith(f"limits: lowest {low:,}, highest {high:,}")
    assert f"counts outside {low:,} to {high:,}" in Page(page(made)).text
    assert "stroke-dasharray" in page(made)
    assert all(tag_text in page(made) for tag_text in (f"<title>{told[0]}</title>", 'role="img"'))


def test_a_share_is_never_rounded_to_all_or_nothing():
    assert [percent(share) for share in (0, 1e-9, 0.5, 1 - 1e-9, 1)] == [
        "0.0 %",
        "< 0.1 %",
        "50.0 %",
        "> 99.9 %",
        "100.0 %",
    ]


def test_hundreds_of_data_sets_make_a_page_that_a_browser_opens():
    labels = {f"label {number} of a long name": number + 1 for number in range(500)}
    genes = GENES | {"examples": {"unknown": [f"ENSG{number:011d}.12" for number in range(10)]}}
    names = [f"laboratory {number}, 10x 3' v{version}" for number in range(300) for version in range(4)]
    sets = [
        dataset(
            f"laboratory {number}",
            labels=labels,
            donors=copy.copy(labels),
            modalities={"rna": modality([genes] * 4), "atac": modality([PEAKS]), "protein": modality()},
        )
        for number in range(300)
    ]
    made = report(*sets, names=names)
    start = time.process_time()
    html = page(made)
    assert time.process_time() - start < 2
    assert len(html.encode()) < 10_000_000
    assert html.count("<svg") == 300 * 9
    assert "<details open" not in html


def test_making_a_page_imports_neither_torch_nor_ray_nor_sklearn():
    code = "import sys, cellray.data.page; assert not {'torch', 'ray', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
