"""Recipes: every setting of a run as frozen dataclasses, and one way to override them.

A recipe is a function that returns a `Recipe`; a variation is `dataclasses.replace`.
`override(recipe, {"optim.lr": 1e-4})` serves the command line, a Tune trial and a RayJob alike.
"""

import dataclasses
import hashlib
import importlib
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from cellray.data.modalities import BUILT_IN, Modality
from cellray.data.qc import QC
from cellray.train import limits
from cellray.train.overrides import built, changed, leaves

T = TypeVar("T")


def _known(name: str, values: Sequence[str], words: Sequence[str]) -> None:
    odd = sorted({value for value in values if value not in words or list(values).count(value) > 1})
    if odd:
        raise ValueError(f"{name} has {', '.join(odd)}; it may have {', '.join(words)}, each once")


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A single data set, for those who have no table. Column settings are as in the atlas table."""

    name: str = "dataset"
    """Name of the data set, the first part of every cell id."""
    rna: str = ""
    """URL of the file with RNA counts."""
    atac: str = ""
    """URL of the file with ATAC counts."""
    protein: str = ""
    """URL of the file with protein counts."""
    multi: str = ""
    """URL of a MuData file (.h5mu, .zarr) that holds several modalities."""
    label: str = ""
    """obs column of the cell type."""
    batch: str = ""
    """obs column of the batch."""
    donor: str = ""
    """obs column of the donor."""
    assay: str = ""
    """obs column of the assay, or =VALUE for all cells."""
    species: str = ""
    """obs column of the species, or =VALUE for all cells."""
    tissue: str = ""
    """obs column of the tissue, or =VALUE for all cells."""
    layer: str = ""
    """Where raw counts are: "" for X, "raw" for raw.X, else the name of a layer."""
    names: str = ""
    """var column of the feature ids; "" for var_names."""


@dataclass(frozen=True, kw_only=True)
class Ingest:
    """How an atlas becomes a token store."""

    drop_labels: tuple[str, ...] = ()
    """Cells with these labels are dropped, and reported."""
    unlabelled: tuple[str, ...] = ()
    """Labels that say nothing, such as unassigned: their cells are read and trained on, without a label."""
    min_cells: int = 1
    """Features counted in fewer cells are left out of the vocabulary, and reported."""
    genes: str = ""
    """Folder or URL of gene tables (ids, symbols, orthologs), by which genes of all files find one
    name; "" for the files' own ids."""
    peaks: str = ""
    """The genomic vocabulary that peaks are mapped to by overlap: `bins:5000`, a BED file, or one a
    species as `human=URL,mouse=URL`; "" matches peaks by name."""
    unit_cells: int = 4096
    """Cells one task reads at a time."""
    shard_bytes: int = 128 << 20
    """About how large a shard becomes, in bytes."""
    readers: int = 2
    """Processes that look into the files before any count is read."""
    allow_failed_files: bool = False
    """Count it as success, and train on, when data sets could not be read. The others are ingested
    in any case."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which cells training never sees."""

    by: Literal["auto", "donor", "batch", "cell"] = "auto"
    """Unit that is held out whole; auto takes donors, else batches, else cells, where there are three."""
    fraction: float = 0.2
    """Share of the units of each data set that is held out."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """The teacher: an encoder a modality, the fusion, the decoders."""

    width: int = 64
    """Width of the encoders and of every embedding."""
    layers: int = 2
    """Transformer layers of an encoder."""
    heads: int = 4
    """Attention heads."""
    fusion_layers: int = 2
    """Transformer layers over the modality summaries."""
    encoding: Literal["value", "bins", "rank"] = "value"
    """How encoders read counts: the scaled value, its bin within the cell, or its rank there."""
    context_of: tuple[Literal["species", "assay"], ...] = ()
    """What encoders are told of a cell beside its tokens: species, assay."""
    context_hidden: float = 0.1
    """Chance, in training, that an encoder is not told, so that it can do without."""

    def __post_init__(self) -> None:
        _known("network.encoding", (self.encoding,), ("value", "bins", "rank"))
        _known("network.context_of", self.context_of, ("species", "assay"))


@dataclass(frozen=True, kw_only=True)
class StudentNetwork:
    """The students, from RNA alone to the joint embedding: a sparse MLP, a small transformer, or both."""

    hidden: int = 256
    """Width of the hidden layers of the sparse MLP."""
    blocks: int = 2
    """Residual blocks of the sparse MLP after the gather."""
    kinds: tuple[Literal["mlp", "transformer"], ...] = ("mlp",)
    """Which are trained, from the same teacher; the first is the one that counts until they are compared."""
    layers: int = 2
    """Layers of the small transformer; its context is that of the modality."""
    heads: int = 4
    """Attention heads of the small transformer."""

    def __post_init__(self) -> None:
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"student.kinds is {','.join(self.kinds)!r}; name one kind or more, each once")


Kind = Literal["unimodal", "joint", "distil"]
KINDS: tuple[Kind, ...] = ("unimodal", "joint", "distil")
"""The stages a user names, in order."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW with linear warm-up and cosine decay, anew in every stage."""

    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; biases, norms and embeddings have none."""
    warmup: float = 0.1
    """Share of a stage's steps over which the rate rises."""
    clip: float = 1.0
    """Gradients are scaled down to this norm."""
    spike: float = 20.0
    """Batches whose gradient has a norm this many times the usual one are skipped; 0 for none."""
    skips: int = 10
    """Batches that may be skipped in a row, for that or since the loss is no number; then training ends."""
    ema: float = 0.0
    """A stage comes to the mean of its weights over its steps, which moves by 1 less this much a step (and
    by more in the first ones), as with 0.999; 0 for the weights after its last step."""


@dataclass(frozen=True, kw_only=True)
class Feed:
    """What one optimiser step reads, over all workers together."""

    tokens: int = 32_768
    """Most tokens of a global batch."""
    cells: int = 256
    """Most cells of a global batch."""
    window: int = 16
    """Record batches of 1,024 cells that are mixed with each other."""
    balance: float = 1.0
    """Groups of cells weigh as their size to this power: 1 leaves all as it is, 0.5 brings rare groups
    more often, 0 makes all groups equal."""
    balance_by: tuple[str, ...] = ("dataset", "assay")
    """What groups the cells for it: columns such as dataset, assay, label."""


@dataclass(frozen=True, kw_only=True)
class Unimodal:
    """Stage 1, once a modality: masked values, detection, reconstruction through the bottleneck."""

    epochs: float = 4.0
    """Passes over the training cells."""
    mask: tuple[float, float] = (0.15, 0.4)
    """Share of the non-zero tokens that is hidden, drawn for each cell between these."""
    zeros: float = 0.25
    """Absent features asked for, as a share of the tokens."""
    queries: int = 2048
    """Most features asked of the bottleneck in a step."""
    mask_by: tuple[Literal["token", "programme", "region"], ...] = ("token",)
    """What is hidden together: nothing, the genes of a programme, neighbouring peaks. Each is of its own
    kind of feature; the others are hidden token by token."""
    programmes: str = ""
    """Path or URL of a .gmt file of gene programmes: pathways, targets of transcription factors, …"""
    region: int = 32
    """Most neighbouring peaks in a region."""
    grouped: float = 0.5
    """Share of the cells in which programmes or regions are hidden; in the others single tokens are."""
    hidden: float = 1.0
    """Weight of guessing what is hidden, values and detection, against reconstruction."""

    def __post_init__(self) -> None:
        if self.mask[0] > self.mask[1]:
            raise ValueError(f"unimodal.mask is {self.mask}; the first must be at most the second")
        _known("unimodal.mask_by", self.mask_by, ("token", "programme", "region"))


@dataclass(frozen=True, kw_only=True)
class Joint:
    """Stage 2: the joint embedding from any subset of modalities."""

    epochs: float = 4.0
    """Passes over the training cells."""
    dropout: float = 0.4
    """Chance that a present modality is hidden from the fusion; one always stays."""
    mask: float = 0.2
    """Share of the input tokens that is dropped in training."""
    match: float = 0.2
    """Weight of matching pairs against the batch."""
    temperature: float = 0.1
    """Of the matching softmax."""
    queries: int = 2048
    """Most features asked of each decoder in a step."""
    others: float = 1.0
    """Weight of decoding modalities other than RNA."""


@dataclass(frozen=True, kw_only=True)
class Distil:
    """Stage 3: the RNA-only student, and its control that never saw the teacher."""

    epochs: float = 20.0
    """Passes over the training cells."""
    mask: float = 0.3
    """Share of the student's input tokens that is hidden in training."""
    joint: float = 1.0
    """Weight of the distance to the teacher's joint vector."""
    relation: float = 1.0
    """Weight of the distance to the similarity structure of the batch."""
    impute: float = 0.2
    """Weight of the likelihood of the missing modalities' summaries."""
    decode: float = 0.3
    """Weight of decoding counts: RNA, and what is missing where it is known."""
    queries: int = 1024
    """Most features asked of each decoder in a step."""
    prior: float = 0.0
    """Against too much said of new cells by decoders that learnt from few: of the squared departures from
    the mean profile this much, divided by the cells measured in the modality, is added to the misfit of a
    cell. Not in decoding RNA, which the student sees."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What the report measures."""

    seeds: int = 3
    """Seeds of every probe and baseline."""
    bootstrap: int = 500
    """Resamples of a confidence interval."""
    targets: str = ""
    """CSV with `cell_id` and numeric columns that embeddings are probed for; "" for none."""
    features: int = 5000
    """Most features of a modality that translation is scored on, the commonest first."""
    student: Literal["auto", "mlp", "transformer"] = "auto"
    """Kind of student that is scored and exported; auto takes the cheapest of those that were trained
    whose probes score at most 2 % lower than the best kind's."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, whole."""

    atlas: str = ""
    """URL of the atlas table, a row a file."""
    dataset: DataSet = DataSet()
    """A single data set, where there is no table."""
    run: str = "runs/run"
    """Folder or URL for everything the run writes."""
    cache: str = ""
    """Folder on a local disk for what is read of a store that is not local; "" for none."""
    cache_bytes: int = 20 << 30
    """Most bytes it may take, all workers of a node together."""
    store: str = ""
    """Folder or URL of the token store, where runs share one; "" for RUN/store."""
    seed: int = 0
    """Of every random thing."""
    workers: int = 2
    """Training workers."""
    threads: int = 1
    """CPU threads of a worker."""
    gpu: bool = False
    """Train on GPUs, one a worker."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the matrix products in training; auto takes bf16 where the hardware multiplies it faster."""
    checkpoint_seconds: float = 30.0
    """Most seconds of work that a kill may cost."""
    checkpoint_keep: int = 2
    """Checkpoints of the stage under way that stay; older ones serve where newer ones are damaged."""
    track: tuple[Literal["jsonl", "tensorboard", "mlflow", "wandb"], ...] = ("jsonl", "tensorboard")
    """Where losses, rates, data wait, MFU and memory go: RUN/metrics.jsonl, event files in RUN/tensorboard,
    an MLflow server, Weights & Biases."""
    stages: tuple[Kind, ...] = KINDS
    """Stages to run now; those before them must have finished."""
    modalities: tuple[Modality, ...] = BUILT_IN
    """What may be measured; those without a file are left out."""
    ingest: Ingest = Ingest()
    qc: QC = field(default_factory=QC)
    split: Split = Split()
    feed: Feed = Feed()
    network: Network = Network()
    student: StudentNetwork = StudentNetwork()
    optim: Optim = Optim()
    unimodal: Unimodal = Unimodal()
    joint: Joint = Joint()
    distil: Distil = Distil()
    score: Score = Score()
    notes: Mapping[str, str] = field(default_factory=dict)
    """Free text kept with the run."""
    method: Literal["cellray", "reference"] = "cellray"
    """What is trained: cellray, or the published design it is compared with (RNA and ATAC only; of the
    settings it reads those that `cellray.train.reference` names)."""
    together: int = 16_384
    """Most positions, tokens and [CLS], that pass an encoder's layers in one call."""
    recompute: bool = False
    """Make the activations of such a call anew when its gradient is taken, instead of keeping those of
    all: a batch of any size in the memory of one call, the same update to the bit, a third more work."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Fuse the layers with torch.compile; auto does on a GPU, where there is a C compiler too."""
    shard: bool = False
    """Share out large modules among the workers in training (FSDP2): each holds its part of the
    parameters, gradients and optimizer state, and writes that part of a checkpoint."""
    hang_seconds: float = 600.0
    """Seconds without a step after which a worker counts as hung: it is killed, and all start again from
    the newest checkpoint. Longer than what else may take time: the first batch, compiling, writing a model;
    0 for never."""

    def __post_init__(self) -> None:
        limits.check(leaves(self))
        if self.network.width % self.network.heads:
            raise ValueError(
                f"network.width {self.network.width} is no multiple of network.heads {self.network.heads}"
            )
        if not self.stages or len(set(self.stages)) < len(self.stages):
            raise ValueError(f"stages is {','.join(self.stages)!r}; name one stage or more, each once")
        names = [m.name for m in self.modalities]
        if len(set(names)) < len(names) or "rna" not in names:
            raise ValueError(f"modalities are {names}; each once, and 'rna' among them, is needed")
        if self.method != "cellray" and (self.student.kinds != ("mlp",) or self.score.student != "auto"):
            raise ValueError(
                f"method={self.method} has one kind of student, its own: leave student.kinds and "
                "score.student as they are"
            )
        if "transformer" in self.student.kinds and self.network.width % self.student.heads:
            raise ValueError(
                f"network.width {self.network.width} is no multiple of student.heads {self.student.heads}"
            )
        if self.score.student not in ("auto", *self.student.kinds):
            raise ValueError(
                f"score.student is {self.score.student!r}, but student.kinds, which are trained, "
                f"{'is' if len(self.student.kinds) == 1 else 'are'} {','.join(self.student.kinds)}"
            )


LAUNCH = (
    "run",
    "store",
    "cache",
    "cache_bytes",
    "workers",
    "threads",
    "gpu",
    "checkpoint_seconds",
    "checkpoint_keep",
    "track",
    "stages",
    "notes",
    "together",
    "recompute",
    "compile",
    "shard",
    "hang_seconds",
)
"""Settings that decide where and how fast a run goes, not what comes out of it."""


def load(path: str) -> Recipe:
    """The recipe that the function `module:function` returns."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"{path!r} is no recipe: write module:function, as in pipelines.recipes.demo:recipe")
    try:
        function = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise ValueError(
            f"recipe {path!r}: there is no module {error.name!r}; run this where it can be imported"
        ) from None
    except AttributeError:
        raise ValueError(f"recipe {path!r}: module {module} has no function {name!r}") from None
    recipe = function()
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe {path!r} returned {type(recipe).__name__}, not a Recipe")
    return recipe


def settings(args: Sequence[str]) -> dict[str, str]:
    """`["optim.lr=1e-4"]` -> `{"optim.lr": "1e-4"}`."""
    found: dict[str, str] = {}
    for arg in args:
        key, equals, value = arg.partition("=")
        if not equals or not key:
            raise ValueError(f"{arg!r} is no setting: write key=value, as in optim.lr=1e-4")
        if key in found:
            raise ValueError(f"{key} is set twice: {found[key]!r} and {value!r}")
        found[key] = value
    return found


def override(recipe: T, changes: Mapping[str, Any]) -> T:
    """`recipe` with some settings changed; keys are dotted paths, values are typed or text.

    An item of a tuple of named things is reached by its name: `modalities.rna.context`.
    ValueError for a setting that does not exist (with those that do) or a value of another type.
    """
    return typing.cast(T, changed(recipe, [(key.split("."), value, key) for key, value in changes.items()]))


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain JSON values."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(recipe))))


def from_json(data: Mapping[str, Any]) -> Recipe:
    """The recipe that `to_json` wrote."""
    return typing.cast(Recipe, built(Recipe, data))


def fingerprint(recipe: Recipe) -> str:
    """sha256 over every setting that decides what comes out of a run."""
    facts = {key: value for key, value in to_json(recipe).items() if key not in LAUNCH}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def describe(recipe: Recipe) -> list[tuple[str, Any]]:
    """Every setting as (dotted key, value), for `--help` and error messages."""
    return list(leaves(recipe))
