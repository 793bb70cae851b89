"""What numbers the settings of a recipe may be. Other settings say what they may be by their types."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

SHARE = (0.0, 1.0)
MASKED = (0.0, 0.95)
WEIGHT = (0.0, 1e6)
EPOCHS = (1e-6, 1e6)
QUERIES = (1, 1 << 30)
LAYERS = (0, 1000)

LIMITS: Mapping[str, tuple[float, float]] = {
    "cache_bytes": (0, 1 << 60),
    "seed": (0, (1 << 63) - 1),
    "workers": (1, 4096),
    "threads": (1, 1024),
    "checkpoint_seconds": (0.0, 1e9),
    "checkpoint_keep": (1, 1000),
    "together": (1, 1 << 30),
    "hang_seconds": (0.0, 1e6),
    "ingest.min_cells": (0, 1 << 40),
    "ingest.unit_cells": (1, 1 << 20),
    "ingest.shard_bytes": (1, 1 << 31),
    "ingest.readers": (1, 256),
    "split.fraction": (0.01, 0.9),
    "feed.tokens": (1, 1 << 40),
    "feed.cells": (2, 1 << 20),
    "feed.window": (1, 1 << 20),
    "feed.balance": SHARE,
    "network.width": (1, 1 << 16),
    "network.layers": LAYERS,
    "network.heads": (1, 1024),
    "network.fusion_layers": LAYERS,
    "network.context_hidden": SHARE,
    "student.hidden": (1, 1 << 16),
    "student.blocks": LAYERS,
    "student.layers": (1, 1000),
    "student.heads": (1, 1024),
    "optim.lr": (1e-8, 1.0),
    "optim.weight_decay": (0.0, 1e3),
    "optim.warmup": (0.0, 0.9),
    "optim.clip": (1e-8, math.inf),
    "optim.spike": (0.0, 1e9),
    "optim.skips": (0, 1 << 20),
    "optim.ema": (0.0, 0.999999),
    "unimodal.epochs": EPOCHS,
    "unimodal.mask": MASKED,
    "unimodal.zeros": (0.0, 1e3),
    "unimodal.queries": QUERIES,
    "unimodal.region": (2, 1 << 20),
    "unimodal.grouped": SHARE,
    "unimodal.hidden": WEIGHT,
    "joint.epochs": EPOCHS,
    "joint.dropout": SHARE,
    "joint.mask": MASKED,
    "joint.match": WEIGHT,
    "joint.temperature": (1e-4, 1e3),
    "joint.queries": QUERIES,
    "joint.others": WEIGHT,
    "distil.epochs": EPOCHS,
    "distil.mask": MASKED,
    "distil.joint": WEIGHT,
    "distil.relation": WEIGHT,
    "distil.impute": WEIGHT,
    "distil.decode": WEIGHT,
    "distil.queries": QUERIES,
    "distil.prior": (0.0, 1e9),
    "score.seeds": (1, 100),
    "score.bootstrap": (1, 1 << 20),
    "score.features": (1, 1 << 30),
}
"""Dotted key -> least and most, both allowed. Numbers of `qc` and of modalities say it themselves."""


def check(settings: Iterable[tuple[str, Any]]) -> None:
    """ValueError for a number, or one of a tuple, that is not within its limits."""
    for key, value in settings:
        if key in LIMITS:
            low, high = LIMITS[key]
            for number in value if isinstance(value, tuple) else (value,):
                if not low <= number <= high:
                    raise ValueError(f"{key} is {number}; it must lie between {low} and {high}")
