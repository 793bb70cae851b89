"""Small networks as baselines: a plain MLP and a denoising autoencoder. About ten seconds each on a CPU."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

HIDDEN = 256
WIDTH = 128
BATCH = 128
EPOCHS = 20
PATIENCE = 3
"""Epochs without a gain on the cells left out of the draw, after which an MLP stops."""
STEPS = 500
"""Optimiser steps of the autoencoder, within 10 to 40 epochs: more make it worse on held-out cells."""
MASKED = 0.3
"""Share of the autoencoder's input that is hidden."""

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LOSSES: dict[str, Loss] = {
    "label": F.cross_entropy,
    "detection": F.binary_cross_entropy_with_logits,
    "value": F.mse_loss,
}


def mlp(
    known: np.ndarray,
    wanted: np.ndarray,
    drawn: np.ndarray,
    test: np.ndarray,
    *,
    outputs: int,
    loss: str,
    seed: int,
) -> np.ndarray:
    """Outputs of an MLP for the test cells, float32 [cells, outputs].

    `loss` says what `wanted` holds for the training cells: "label" codes (logits come back),
    "detection" 0/1 (logits) or "value" (values). It learns from the `drawn` positions; the other
    training cells decide after which epoch it was best, a tenth of the drawn ones where there are no
    others. One hidden layer, dropout, AdamW.
    """
    left = np.setdiff1d(np.arange(len(known)), drawn)
    if not len(left):
        mixed = np.random.default_rng(seed).permutation(drawn)
        left, drawn = np.split(mixed, [max(1, len(mixed) // 10)])
    middle, scale = known.mean(axis=0), known.std(axis=0) + 0.1
    inputs = torch.from_numpy(((known - middle) / scale).astype(np.float32))
    targets = torch.from_numpy(wanted)
    asked = torch.from_numpy(((test - middle) / scale).astype(np.float32))
    learn = torch.from_numpy(drawn)
    watch = torch.from_numpy(left)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Dropout(0.2),
            nn.Linear(known.shape[1], HIDDEN),
            nn.GELU(),
            nn.Dropout(0.2),
            nn.Linear(HIDDEN, outputs),
        )
        _start_at_mean(model[-1], wanted, loss)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        best, answer, epoch, best_epoch = np.inf, np.empty(0), 0, 0
        while epoch < EPOCHS and epoch - best_epoch < PATIENCE:
            epoch += 1
            _epoch(model, optimizer, learn, lambda rows: LOSSES[loss](model(inputs[rows]), targets[rows]))
            model.eval()
            with torch.no_grad():
                error = float(LOSSES[loss](model(inputs[watch]), targets[watch]))
                if error < best:
                    best, answer, best_epoch = error, model(asked).numpy(), epoch
        return answer


def _start_at_mean(last: nn.Module, wanted: np.ndarray, loss: str) -> None:
    """Rare peaks need thousands of steps to learn their own frequency from zero."""
    assert isinstance(last, nn.Linear)
    if loss == "detection":
        share = np.clip(wanted.mean(axis=0, dtype=np.float64), 1e-4, 1 - 1e-4)
        nn.init.zeros_(last.weight)
        last.bias.data = torch.from_numpy(np.log(share / (1 - share)).astype(np.float32))


class Autoencoder(nn.Module):
    """log1p(CP10k) -> WIDTH numbers -> negative-binomial counts."""

    def __init__(self, genes: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(genes, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH), nn.LayerNorm(WIDTH)
        )
        self.decoder = nn.Linear(WIDTH, genes)
        self.dispersion = nn.Parameter(torch.zeros(genes))

    def loss(self, log: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Negative log likelihood a gene, without the terms that depend on the counts alone."""
        shown = log * (torch.rand_like(log) >= MASKED) / (1 - MASKED)
        rates = torch.log_softmax(self.decoder(self.encoder(shown)), dim=1)
        log_mean = rates + counts.sum(dim=1, keepdim=True).clamp(min=1).log()
        r = self.dispersion.exp()
        total = ((r + counts) * torch.logaddexp(log_mean, self.dispersion) - r * self.dispersion).sum()
        cell, gene = counts.nonzero(as_tuple=True)
        seen, own = counts[cell, gene], r[gene]
        gain = seen * log_mean[cell, gene] + torch.lgamma(seen + own) - torch.lgamma(own)
        return (total - gain.sum()) / counts.numel()


def autoencoder(
    train: tuple[np.ndarray, np.ndarray], others: tuple[np.ndarray, ...], *, seed: int
) -> list[np.ndarray]:
    """Embeddings of each of `others`, float32 [cells, WIDTH], learnt without labels.

    `train` is log1p(CP10k) and raw counts of the same cells, `others` log1p(CP10k).
    """
    log, counts = (torch.from_numpy(part) for part in train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Autoencoder(log.shape[1])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        for _ in range(int(np.clip(STEPS * BATCH // len(log), 10, 40))):
            _epoch(model, optimizer, torch.arange(len(log)), lambda rows: model.loss(log[rows], counts[rows]))
        model.eval()
        with torch.no_grad():
            return [model.encoder(torch.from_numpy(part)).numpy() for part in others]


def _epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    cells: torch.Tensor,
    loss: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """One pass over `cells` in random order, BATCH at a time."""
    model.train()
    order = cells[torch.randperm(len(cells))]
    for rows in torch.tensor_split(order, max(1, len(cells) // BATCH)):
        optimizer.zero_grad(set_to_none=True)
        loss(rows).backward()
        optimizer.step()
