"""`ingest.html`: the ingest report as one self-contained page. All that comes from files is escaped."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cellray.data.markup import kept_share, many, share_of, signed, text, words
from cellray.data.remarks import TOPICS, Judged, Remark, judged, percent, remarks
from cellray.data.sections import DROPPED, drawn_group, section

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
REASON = 3000
"""Letters shown of the reason why a data set could not be read."""
SHOWN = 8
"""Remarks of a topic that are seen at once; the others are folded."""


def page(report: Mapping[str, Any]) -> str:
    """The page of the report of `cellray.data.ingest.ingest`: HTML without any outside resource or script.

    What failed comes first, then what was dropped, what is worth a look, all data sets in a table,
    and each of them folded, with its features, losses and distributions.
    """
    # The pages of a store and of a run look alike.
    styles = [Path(__file__).parent.parent / "tasks" / "page.css", Path(__file__).parent / "page.css"]
    style = "".join(path.read_text() for path in styles)
    notes, groups = remarks(report), judged(report)
    noted: dict[str, list[Remark]] = {}
    for note in notes:
        noted.setdefault(note.dataset, []).append(note)
    places = {entry["name"]: f"d{number}" for number, entry in enumerate(report["datasets"])}
    sections = [
        section(entry, groups.get(entry["name"], []), noted.get(entry["name"], []), place)
        for entry, place in zip(report["datasets"], places.values(), strict=True)
    ]
    parts = [
        _header(report),
        _failed(report["failed"]),
        _tiles(report),
        _dropped(report),
        _worth(notes, places),
        _table(report, notes, places),
        f"<section><h2>Each data set</h2>{''.join(sections)}</section>" if sections else "",
        _others(groups.get("", [])),
        _reading(),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>cellray ingest report</title><style>{style}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _header(report: Mapping[str, Any]) -> str:
    every, kept = report["cells_in"], report["cells_kept"]
    failed = len(report["failed"])
    said = f"{kept:,} of {many(every, 'cell')}"
    said += f" from {many(len(report['datasets']), 'data set')} are in the store."
    said += f" {many(failed, 'data set')} could not be read." if failed else " Every one could be read."
    return (
        '<header><p class="kicker">cellray ingest</p><h1>Ingest report</h1>'
        f'<p class="lead">{said}</p></header>{_total(report)}'
    )


def _tiles(report: Mapping[str, Any]) -> str:
    every, kept, out = report["cells_in"], report["cells_kept"], sum(report["dropped"].values())
    species = sorted({species for entry in report["datasets"] for species in entry["species"]})
    features = ", ".join(f"{text(name)} {number:,}" for name, number in report["features"].items())
    tiles = [
        (f"{every:,}", "cells in"),
        (f"{kept:,}", f"cells kept, {escape(percent(kept / every))}" if every else "cells kept"),
        (f"{out:,}", "cells dropped"),
        (f"{sum(report['features'].values()):,}", f"features in the vocabulary: {features or 'none'}"),
        (f"{len(report['datasets']):,}", "data sets of " + (text(", ".join(species)) or "unknown species")),
    ]
    items = "".join(f"<div><strong>{big}</strong><span>{small}</span></div>" for big, small in tiles)
    return f'<div class="tiles">{items}</div>'


def _total(report: Mapping[str, Any]) -> str:
    """A line in red if the data sets do not add up to the whole."""
    lost = report["cells_in"] - report["cells_kept"] - sum(report["dropped"].values())
    return f'<p class="odd">{lost:,} cells are neither kept nor dropped with a reason.</p>' if lost else ""


def _failed(failed: Sequence[Mapping[str, str]]) -> str:
    if not failed:
        return ""
    lines = "".join(
        f"<li><b>{text(entry['dataset'])}</b>: {text(entry['reason'], REASON)}</li>" for entry in failed
    )
    return (
        f'<section class="hurt"><h2>{many(len(failed), "data set")} could not be read</h2>'
        "<p>Nothing of them is in the store. Mend them and ingest again: what is there already stays.</p>"
        f"<ul>{lines}</ul></section>"
    )


def _dropped(report: Mapping[str, Any]) -> str:
    """Cells in, less those dropped for each reason, are the cells kept."""
    every = report["cells_in"]
    rows = [("cells in", every, "", "")]
    ranked = sorted(report["dropped"].items(), key=lambda item: -item[1])
    rows += [(words(k), -n, share_of(n, every), text(DROPPED.get(k, ""))) for k, n in ranked if n]
    rows.append(("kept", report["cells_kept"], share_of(report["cells_kept"], every), ""))
    lines = [
        f'<tr{" class=sum" if name == "kept" else ""}><th>{name}</th><td class="n">{signed(number)}</td>'
        f'<td class="n">{share}</td><td>{meaning}</td></tr>'
        for name, number, share, meaning in rows
    ]
    return (
        '<section><h2>Cells dropped, by reason</h2><div class="scroll"><table class="narrow"><thead><tr>'
        '<th>reason</th><th class="n">cells</th><th class="n">share</th><th>which cells</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _worth(notes: Sequence[Remark], places: Mapping[str, str]) -> str:
    """Remarks by topic, the worst first."""
    blocks = []
    for topic, sentence in TOPICS.items():
        lines = [
            f'<li><a href="#{places[note.dataset]}">{text(note.dataset)}</a>: {text(note.text, 400)}</li>'
            for note in notes
            if note.topic == topic
        ]
        if not lines:
            continue
        sets = len({note.dataset for note in notes if note.topic == topic})
        rest = f"<summary>{len(lines) - SHOWN:,} more</summary><ul>{''.join(lines[SHOWN:])}</ul>"
        more = f"<details>{rest}</details>" if len(lines) > SHOWN else ""
        blocks.append(
            f'<div class="topic"><h3>{many(sets, "data set")}: {escape(sentence)}</h3>'
            f"<ul>{''.join(lines[:SHOWN])}</ul>{more}</div>"
        )
    return f"<section><h2>Worth a look</h2>{''.join(blocks) or '<p>Nothing.</p>'}</section>"


def _table(report: Mapping[str, Any], notes: Sequence[Remark], places: Mapping[str, str]) -> str:
    """All data sets, a line each."""
    if not report["datasets"]:
        return ""
    modalities = list(report["features"])
    above = "".join(f'<th class="first" colspan="2">{text(name)}</th>' for name in modalities)
    heads = [f'<th class="n" rowspan="2">{name}</th>' for name in ("cells in", "kept", "%")]
    after = ['<th rowspan="2" class="first">species</th>']
    after += [f'<th class="n" rowspan="2">{name}</th>' for name in ("donors", "batches", "labels")]
    after.append('<th class="name" rowspan="2">assays</th>')
    under = '<th class="n first">cells</th><th class="n">counts kept</th>' * len(modalities)
    noted = {note.dataset for note in notes}
    body = "".join(
        _row(entry, modalities, places[entry["name"]], entry["name"] in noted) for entry in report["datasets"]
    )
    foot = '<p class="note">● marks data sets that are worth a look, * values that some cells lack.</p>'
    return (
        '<section><h2>Data sets</h2><div class="scroll"><table class="wide"><thead><tr>'
        f'<th rowspan="2">data set</th>{"".join(heads)}{above}{"".join(after)}</tr><tr>{under}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{foot}</section>"
    )


def _row(entry: Mapping[str, Any], modalities: Iterable[str], place: str, noted: bool) -> str:
    cells = []
    for name in modalities:
        if (part := entry["modalities"].get(name)) is None:
            cells.append('<td class="n first"></td><td class="n"></td>')
            continue
        share = kept_share(part["counts_kept"], part["counts_in"])
        cells.append(f'<td class="n first">{part["cells_kept"]:,}</td><td class="n">{share}</td>')
    known = [_known(entry[what]) for what in ("donors", "batches", "labels")]
    assays = [name for name in entry["assays"] if name]
    told = ", ".join(assays[:2]) + (f" and {len(assays) - 2} more" if len(assays) > 2 else "")
    mark = '<span class="low" title="worth a look">●</span> ' if noted else ""
    return (
        f'<tr><th title="{text(entry["name"])}">{mark}<a href="#{place}">{text(entry["name"])}</a></th>'
        f'<td class="n">{entry["cells_in"]:,}</td><td class="n">{entry["cells_kept"]:,}</td>'
        f'<td class="n">{kept_share(entry["cells_kept"], entry["cells_in"])}</td>{"".join(cells)}'
        f'<td class="first">{text(", ".join(entry["species"])) or "unknown"}</td>'
        f'{"".join(known)}<td class="name">{text(told) or "–"}</td></tr>'
    )


def _known(counts: Mapping[str, int]) -> str:
    """How many values are known, with a sign if they are not known of all cells."""
    number, unknown = sum(1 for name in counts if name), counts.get("", 0)
    if not number:
        return '<td class="n">–</td>'
    if not unknown:
        return f'<td class="n">{number:,}</td>'
    return f'<td class="n" title="unknown of {many(unknown, "cell")}">{number:,}*</td>'


def _others(groups: Sequence[Judged]) -> str:
    """What was judged, but is of no data set of the report."""
    drawn = "".join(drawn_group("", own, drawn=False) for own in groups)
    return f"<section><h2>Of no data set</h2>{drawn}</section>" if drawn else ""


def _reading() -> str:
    return """<section class="reading"><h2>How to read this</h2>
<p>Every cell that is dropped has one reason, the first that applies, so the numbers add up: what came in,
less what was dropped, is what is in the store. A cell is judged by its leading modality; a modality alone
is dropped of cells where too little of it was counted, and the cell stays. Limits for outliers are those
of a data set and assay, and both still inside.</p>
<p>Histograms: the outline is the cells before quality control, without those dropped for their label,
filled are those that stay. Heights are cells in a bin, the lowest drawn larger than they are so that a
single cell is seen. Counts and features are on logarithmic axes. Dashed lines are limits: those of the
group, and those of the recipe, marked min and max; limits far from all cells are in the text alone.</p>
<p>Data sets are folded; what is open is printed.</p></section>"""
