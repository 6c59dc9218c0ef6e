"""A tiny objective with every kind of randomness and state: generator, dropout, batch normalisation, Adam."""
import numpy as np
import torch
from torch import nn

from musicssl.data.loader import Loader
from musicssl.train import seed_everything

WAVES = torch.sin(torch.arange(64)[:, None] * torch.linspace(.01, .3, 32)[None])
LABELS = np.linspace(-1, 1, 64)[:, None]


class Toy(nn.Module):
    """Says where in the list a wave stands. `noise=0, dropout=0, norm=False` leaves a plain mean over clips."""

    def __init__(self, noise=.1, dropout=.3, norm=True, width=16, seed=0):
        super().__init__()
        seed_everything("weights", seed)
        self.noise, self.gather, self.seen = noise, None, []
        self.layers = nn.Sequential(nn.Linear(32, width), nn.BatchNorm1d(width) if norm else nn.Identity(), nn.ReLU(),
                                    nn.Dropout(dropout), nn.Linear(width, 1))

    def forward(self, batch):
        self.seen += list(map(int, batch.ids))
        self.lent = self.gather is not None
        noisy = batch.wave + self.noise * torch.randn(batch.wave.shape, generator=batch.generator)
        error = self.layers(noisy) - batch.labels
        return {"loss": error.square().mean(), "absolute": error.detach().abs().mean()}


def batches(size=8, seed=0, **options):
    return Loader(WAVES, batch_size=size, seed=seed, labels=LABELS, **options)
