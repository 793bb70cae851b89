"""The part of the ingest page that is about one data set."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from cellray.data.figures import of_numbers, of_shares
from cellray.data.genes import KINDS
from cellray.data.markup import kept_share, line, many, share_of, signed, text, words
from cellray.data.remarks import TOPICS, Judged, Remark, percent, reasons

MOST = 12
"""Values shown of a list, the most frequent."""
DRAWN = 3
"""Groups of a data set and modality that are drawn, the largest; the others are told in words."""
DROPPED = {
    "label": "has one of ingest.drop_labels",
    "empty": "no count in the modality",
    "too_few_features": "fewer features than min_features of its modality",
    "too_few_counts": "fewer counts than qc.min_counts",
    "mitochondrial": "a larger share of mitochondrial counts than qc.max_mito",
    "outlier_counts": "counts further than qc.mads deviations from the others of its data set and assay",
    "outlier_features": "features further than qc.mads deviations from the others",
    "outlier_mitochondrial": "a mitochondrial share more than qc.mads deviations above the others",
    "duplicate": "the same counts, feature by feature, as an earlier cell",
    "nothing_left": "no modality with enough counts was left",
    "in_too_few_cells": "counted in fewer cells than ingest.min_cells",
    "not_in_vocabulary": "not in the vocabulary, which an earlier edition of the store fixed",
    "no_feature": "peaks without a place in the genomic vocabulary",
}
"""What a reason means, for cells, features and counts."""

_Kind = tuple[str, int, list[str]]
"""How names were found, how many, and examples."""


def section(entry: Mapping[str, Any], groups: Sequence[Judged], notes: Sequence[Remark], place: str) -> str:
    """One data set, folded."""
    badge = f'<span class="badge ties">{len(notes)} worth a look</span>' if notes else ""
    sizes = f"{entry['cells_in']:,} cells in, {entry['cells_kept']:,} kept"
    names = text(", ".join(entry["modalities"]))
    told = "<br>".join(text(f"{TOPICS[note.topic]}: {note.text}", 400) for note in notes)
    looks = f'<div class="look"><dt>worth a look</dt><dd>{told}</dd></div>' if notes else ""
    facts = [("dropped", text(reasons(entry["dropped"]), 400) or "no cell")]
    facts.append(("species", text(", ".join(entry["species"])) or "unknown"))
    facts.append(("cells with", _list(entry["present"])))
    facts += [(what, _list(entry[what])) for what in ("labels", "donors", "batches", "assays")]
    facts.append(("labels were made from", text(entry["label_from"])))
    items = "".join(f"<div><dt>{what}</dt><dd>{told}</dd></div>" for what, told in facts if told)
    parts = "".join(
        _part(entry["name"], name, part, [own for own in groups if own.modality == name])
        for name, part in entry["modalities"].items()
    )
    for own in groups:
        if own.modality not in entry["modalities"]:
            drawn = drawn_group(entry["name"], own, drawn=True)
            parts += f'<div class="part"><h3>{text(own.modality)}, not in the store</h3>{drawn}</div>'
    return (
        f'<details class="dataset"><summary><b>{text(entry["name"])}</b><span>{sizes}</span>'
        f'<span>{names}</span>{badge}</summary><div class="inside" id="{place}">'
        f'<dl class="facts">{looks}{items}</dl>{parts}</div></details>'
    )


def _list(counts: Mapping[str, int]) -> str:
    """The most frequent values with their cells; "" if none is known."""
    if not any(counts):
        return ""
    ranked = sorted(((k, n) for k, n in counts.items() if k), key=lambda item: (-item[1], item[0]))
    told = [f"{text(name, 80)} {number:,}" for name, number in ranked[:MOST]]
    if rest := ranked[MOST:]:
        told.append(f"{len(rest):,} more {sum(number for _, number in rest):,}")
    if unknown := counts.get("", 0):
        told.append(f"unknown {unknown:,}")
    return ", ".join(told)


def _part(dataset: str, modality: str, part: Mapping[str, Any], groups: Sequence[Judged]) -> str:
    """One modality of one data set: what was dropped, how features were found, and distributions."""
    ranked = sorted(groups, key=lambda own: -own.group["cells"])
    genes = any("kinds" in summary for summary in part["names"])
    drawn = "".join(
        drawn_group(dataset, own, drawn=number < DRAWN, genes=genes) for number, own in enumerate(ranked)
    )
    none = '<p class="note">No cell is judged by this modality: another one leads, and decides.</p>'
    if len(ranked) > DRAWN:
        drawn += f'<p class="note">The largest {DRAWN} of {len(ranked):,} groups are drawn.</p>'
    return (
        f'<div class="part"><h3>{text(modality)}</h3><div class="beside">{_sums(part)}'
        f"{_genes(part['names'])}{_peaks(part['names'])}</div>{drawn or none}</div>"
    )


def _sums(part: Mapping[str, Any]) -> str:
    """Cells, features and counts: in, dropped by reason, kept. Every column adds up."""
    columns = ("cells", "features", "counts")
    # Counts are dropped with a feature under another name than the feature itself.
    dropped = {
        what: {name.removeprefix("feature_"): n for name, n in part[f"{what}_dropped"].items()}
        for what in columns
    }
    for what in columns:
        lost = part[f"{what}_in"] - part[f"{what}_kept"] - sum(dropped[what].values())
        dropped[what]["unexplained"] = lost
    names = dict.fromkeys(name for what in columns for name, number in dropped[what].items() if number)
    rows = [("in", [f"{part[f'{what}_in']:,}" for what in columns], "")]
    for name in names:
        told = [signed(-dropped[what][name]) if dropped[what].get(name) else "" for what in columns]
        title = f' title="{text(DROPPED[name])}"' if name in DROPPED else ""
        rows.append((words(name), told, ' class="odd"' if name == "unexplained" else title))
    rows.append(("kept", [f"{part[f'{what}_kept']:,}" for what in columns], ' class="sum"'))
    shares = [kept_share(part[f"{what}_kept"], part[f"{what}_in"]) for what in columns]
    rows.append(("", shares, ' class="note"'))
    body = "".join(
        f"<tr{kind}><th>{name}</th>{''.join(f'<td class=n>{cell}</td>' for cell in told)}</tr>"
        for name, told, kind in rows
    )
    head = "".join(f"<th class=n>{what}</th>" for what in columns)
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _genes(names: Sequence[Mapping[str, Any]]) -> str:
    """How the genes of all files were found."""
    own = [summary for summary in names if "kinds" in summary]
    if not own:
        return ""
    columns = sum(summary["columns"] for summary in own)
    rows = [
        (kind, count, [example for summary in own for example in summary["examples"].get(kind, ())])
        for kind in KINDS
        if (count := sum(summary["kinds"].get(kind, 0) for summary in own))
    ]
    worst = min(summary["resolved"] for summary in own)
    notes = [f"{many(columns, 'gene')} in {many(len(own), 'file')}"]
    if len(own) > 1:
        notes.append(f"{percent(worst)} found in the file with fewest")
    for key, what in (("orthologs", "took the id of an ortholog"), ("duplicates", "repeat another, summed")):
        if number := sum(summary[key] for summary in own):
            notes.append(f"{number:,} {what}")
    return _found("genes by", rows, columns, "; ".join(notes), KINDS)


def _peaks(names: Sequence[Mapping[str, Any]]) -> str:
    """Where the peaks of all files went."""
    own = [summary for summary in names if "peaks" in summary]
    if not own:
        return ""
    peaks = sum(summary["peaks"] for summary in own)
    rows: list[_Kind] = [("mapped", sum(summary["mapped"] for summary in own), [])]
    for kind in dict.fromkeys(kind for summary in own for kind in summary["unmapped"]):
        examples = [e for summary in own for e in summary["examples"].get(kind, ())]
        rows.append((kind, sum(summary["unmapped"].get(kind, 0) for summary in own), examples))
    places = ", ".join(f"{summary['features']:,}" for summary in own[:MOST])
    notes = f"{many(peaks, 'peak')} in {many(len(own), 'file')}, on {places} features"
    return _found("peaks", rows, peaks, notes, {})


def _found(what: str, rows: Sequence[_Kind], every: int, notes: str, told: Mapping[str, str]) -> str:
    """Kinds of names: columns, share, and examples of those that stand for nothing known."""
    body = ""
    for kind, count, examples in rows:
        shown = [text(example, 40) for example in examples[:MOST]]
        shown += ["…"] if shown and count > len(shown) else []
        title = f' title="{text(told[kind])}"' if kind in told else ""
        body += (
            f'<tr><th{title}>{words(kind)}</th><td class="n">{count:,}</td>'
            f'<td class="n">{share_of(count, every)}</td><td class="names">{", ".join(shown)}</td></tr>'
        )
    return (
        f'<div><table><thead><tr><th>{what}</th><th class="n">columns</th><th class="n">share</th>'
        f'<th>such as</th></tr></thead><tbody>{body}</tbody></table><p class="note">{escape(notes)}</p></div>'
    )


def drawn_group(dataset: str, own: Judged, *, drawn: bool, genes: bool = False) -> str:
    """Cells that were judged together: reasons, limits, and if they are `drawn`, histograms."""
    group, limits = own.group, own.group["limits"]
    told = [f"{many(group['cells'], 'cell')} judged", text(reasons(group["reasons"]), 400)]
    for what in ("features", "counts"):
        if (least := limits[f"min_{what}"]) > 1:
            told.append(f"dropped with fewer than {least:,} {what}")
    if limits["max_mito"] < 1:
        told.append(f"dropped above a mitochondrial share of {100 * limits['max_mito']:.3g} %")
    two = [(what, limits[what]) for what in ("counts", "features") if limits[what]]
    bounds = [f"{what} outside {low:,} to {high:,}" for what, (low, high) in two]
    if limits["mito"] is not None:
        bounds.append(f"mitochondrial share above {100 * limits['mito']:.3g} %")
    judges = many(limits["judged_on"], "cell")
    held = f"outliers: {', '.join(bounds)}, by the spread" if bounds else "no outliers were looked for"
    told.append(f"{held} of {judges}" if bounds else f"{held} among {judges}")
    if group["uncompared"]:
        told.append(f"{many(group['uncompared'], 'cell')} kept that cannot be told from duplicates")
    figures = ""
    if drawn:
        where = f"{line(group['group'])}, {line(own.modality)}"
        found = [(f"{m} per cell", of_numbers(m, group, own.edges[m], where)) for m in ("counts", "features")]
        found.append(("mitochondrial share", of_shares(group, own.edges["mito"], where)))
        figures = "".join(f"<figure><figcaption>{k}</figcaption>{svg}</figure>" for k, svg in found if svg)
        if genes and not found[-1][1]:
            figures += (
                '<p class="note">The mitochondrial share is below 1 % in every cell, without a limit.</p>'
            )
        figures = f'<div class="hists">{figures}</div>'
    name = group["group"] if group["dataset"] != dataset else group["assay"]
    bold = f"<b>{text(name)}</b>: " if name else ""
    return f'<div class="judged"><p>{bold}{"; ".join(told)}</p>{figures}</div>'
