"""From the figures of every seed to the rows of the table: claims, and what they are measured against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.bench.harness.report import Row

Figures = Mapping[str, float]
GAIN = 10.0
"""Per cent that the error of hidden values is to lie under that of the per-gene mean."""
DETECTED = 0.75
RECOVERED = 0.5
LEFT = 0.1
"""Share of the student's gain that may be left when pairs are shuffled: no more than noise."""


@dataclass(frozen=True)
class Results:
    """Figures of every design, one mapping a seed."""

    ours: Sequence[Figures]
    shuffled: Sequence[Figures]
    reference: Sequence[Figures]
    """Empty where it was not trained; `why_not` says why."""
    others: Figures
    """Baselines and ceilings, which know no seed."""
    why_not: str = ""
    cpu: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Design -> CPU-seconds of training of each seed."""


def rows(r: Results) -> list[Row]:
    return [*stage_one(r), *translation(r), *state(r), *control(r), *against_reference(r), *effort(r)]


def over(
    values: Sequence[float],
    what: str,
    unit: str,
    *,
    goal: float | None = None,
    at_most: bool = False,
    baseline: str = "",
    note: str = "",
) -> Row:
    """The mean over the seeds; their range is in the note."""
    spread = f"{min(values):.3g} to {max(values):.3g} over {len(values)} seed{'s' * (len(values) > 1)}"
    return Row(
        what=what,
        value=sum(values) / len(values),
        unit=unit,
        goal=goal,
        at_most=at_most,
        baseline=baseline,
        note=f"{spread}; {note}" if note else spread,
    )


def each(figures: Sequence[Figures], name: str) -> list[float]:
    return [f[name] for f in figures]


def given(value: float, what: str, unit: str, note: str = "") -> Row:
    return Row(what=what, value=value, unit=unit, note=note or "the same for every seed")


def stage_one(r: Results) -> list[Row]:
    """Masked values and detection."""
    found = []
    for modality, simple, goals in (("rna", "per-gene", True), ("protein", "per-protein", False)):
        key = f"value of {modality}/"
        for name, said in (
            ("per-feature mean", f"{simple} mean of non-zero values"),
            ("per-feature mean and depth", f"{simple} mean with a slope for depth"),
            ("the simulator's rates", "one who knows the simulator's rates"),
        ):
            if key + name not in r.ours[0]:
                continue
            less = [100 * (1 - f[f"{key}model"] / f[key + name]) for f in r.ours]
            square = sum(each(r.ours, f"{key}model")) / len(r.ours), r.ours[0][key + name]
            plain = [f[f"absolute {key}model"] / f[f"absolute {key}{name}"] for f in r.ours]
            note = (
                f"squared error {square[0]:.4f} against {square[1]:.4f}; "
                f"absolute error {100 - 100 * sum(plain) / len(plain):.1f} % under"
            )
            goal = GAIN if goals and name == "per-feature mean" else None
            what = f"stage 1, {modality}: error of hidden values, under"
            found.append(over(less, what, "%", goal=goal, baseline=said, note=note))
    for modality in ("rna", "atac"):
        key = f"detection of {modality}/"
        if f"{key}model" not in r.ours[0]:
            continue
        beside = [f"{name} {r.ours[0][key + name]:.3f}" for name in _OTHERS if key + name in r.ours[0]]
        what = f"stage 1, {modality}: detection"
        goal = DETECTED if modality == "rna" else None
        found.append(over(each(r.ours, f"{key}model"), what, "AUROC", goal=goal, baseline=", ".join(beside)))
    return found


_OTHERS = ("per-feature frequency", "the simulator's rates")


def translation(r: Results) -> list[Row]:
    """RNA to ATAC within cell type."""
    key = "RNA to ATAC/"
    simple = {name.removeprefix(key): v for name, v in r.others.items() if name.startswith(key)}
    wanted = ("type mean", "ridge on PCA", "kNN on PCA")
    best = max(wanted, key=lambda name: simple[name])
    unit = "correlation"
    found = [
        over(
            each(r.ours, f"{key}{model}"),
            f"stage {stage}, RNA to ATAC within type: {model}",
            unit,
            goal=round(simple[best], 4),
            baseline=f"{best}, the best of {', '.join(wanted)}",
        )
        for stage, model in ((2, "joint"), (3, "student"))
    ]
    found += [given(value, f"RNA to ATAC within type: {name}", unit) for name, value in simple.items()]
    return found + [over(each(r.shuffled, f"{key}joint"), "the same, pairs shuffled: joint", unit)]


def state(r: Results) -> list[Row]:
    """Linear probes of the hidden state and the type."""
    found = []
    for cohort, words in (("pairs", "RNA + ATAC"), ("cite", "RNA + protein")):
        key = f"state of {cohort}/"
        at = f"state, {words}"
        for model in _NAMES:
            within = each(r.ours, f"state within type of {cohort}/{model}")
            note = f"correlation within type {sum(within) / len(within):.3f}"
            found.append(over(each(r.ours, key + model), f"{at}: {_NAMES[model]}", "R2", note=note))
        for upper, lower in (("teacher", "student"), ("student", "control")):
            gap = _differences(r.ours, key + upper, key + lower)
            found.append(over(gap, f"{at}: {upper} - {lower}", "R2", goal=0.0, baseline=_NAMES[lower]))
        shares = [_share(f, key) for f in r.ours]
        top = [
            (r.others[f"{key}all there is to know of RNA"] - f[f"{key}control"])
            / (f[f"{key}teacher"] - f[f"{key}control"])
            for f in r.ours
        ]
        note = f"all that RNA tells would be {sum(top) / len(top):.2f}"
        goal = RECOVERED if cohort == "pairs" else None  # elsewhere by how little the teacher knows
        found.append(
            over(shares, f"{at}: recovery", "share", goal=goal, baseline=_NAMES["control"], note=note)
        )
        for name, value in r.others.items():
            if name.startswith(key):
                found.append(given(value, f"{at}: {name.removeprefix(key)}", "R2", _CEILING))
        for model in _NAMES:
            values = each(r.ours, f"label of {cohort}/{model}")
            found.append(over(values, f"type, {words}: {_NAMES[model]}", "accuracy"))
        for name, value in r.others.items():
            if name.startswith(f"label of {cohort}/"):
                found.append(given(value, f"type, {words}: {name.partition('/')[2]}", "accuracy"))
    return found


_NAMES = {
    "teacher": "teacher, every modality",
    "teacher of RNA": "teacher, RNA alone",
    "student": "student",
    "control": "RNA-only model",
    "random": "random weights",
}
_CEILING = "taught the state of the training cells, or knows the simulator: a ceiling, no baseline"


def control(r: Results) -> list[Row]:
    """What is left of the gain when pairs are shuffled within type."""
    found = []
    for cohort, words in (("pairs", "RNA + ATAC"), ("cite", "RNA + protein")):
        key = f"state of {cohort}/"
        at = f"state, {words}, pairs shuffled"
        for model in ("teacher", "student"):
            found.append(over(each(r.shuffled, key + model), f"{at}: {_NAMES[model]}", "R2"))
        left = [
            (wrong[f"{key}student"] - right[f"{key}control"])
            / (right[f"{key}student"] - right[f"{key}control"])
            for right, wrong in zip(r.ours, r.shuffled, strict=True)
        ]
        what = f"{at}: share of the gain that is left"
        base = "the student's gain over the RNA-only model with true pairs"
        goal = LEFT if cohort == "pairs" else None
        found.append(over(left, what, "share", goal=goal, at_most=True, baseline=base))
    return found


def against_reference(r: Results) -> list[Row]:
    """Ours less the published design at equal compute, probe by probe."""
    if not r.reference:
        return [Row(what="ours - reference", value=None, unit="", goal=0.0, note=f"not run: {r.why_not}")]
    unit = {"state": "R2", "label": "accuracy", "RNA to ATAC": "correlation"}
    found = []
    for probe, model, words in (
        ("state of pairs", "teacher", "state, every modality"),
        ("state of pairs", "student", "state, RNA alone"),
        ("label of pairs", "teacher", "type, every modality"),
        ("label of pairs", "student", "type, RNA alone"),
        ("RNA to ATAC", "joint", "RNA to ATAC within type, joint"),
        ("RNA to ATAC", "student", "RNA to ATAC within type, student"),
    ):
        name = f"{probe}/{model}"
        gap = [a[name] - b[name] for a, b in zip(r.ours, r.reference, strict=True)]
        its = each(r.reference, name)
        note = f"reference {sum(its) / len(its):.3f}, {min(its):.3f} to {max(its):.3f}"
        found.append(
            over(
                gap,
                f"ours - reference: {words}",
                unit[probe.partition(" of ")[0]],
                goal=0.0,
                baseline="the published design, as much CPU time",
                note=note,
            )
        )
    return found


def effort(r: Results) -> list[Row]:
    note = "all stages but the control"
    return [
        over(values, f"training: {design}", "CPU-s", note=note) for design, values in r.cpu.items() if values
    ]


def _differences(figures: Sequence[Figures], upper: str, lower: str) -> list[float]:
    return [f[upper] - f[lower] for f in figures]


def _share(f: Figures, key: str) -> float:
    """Recovery: what the student wins back of what RNA alone lacks."""
    return (f[f"{key}student"] - f[f"{key}control"]) / (f[f"{key}teacher"] - f[f"{key}control"])
