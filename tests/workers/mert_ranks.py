"""One of two processes that share a MERT batch of which they hide different numbers of frames; and the small parts that tests are made of."""
from pathlib import Path

import torch
from torch import nn

from musicssl.audio import Batch
from musicssl.augment import draw_seeds
from musicssl.devices import gathered, launch, share
from musicssl.objectives.mert import MERTPretext

RANKS, RATE, HOP, BINS = 2, 24_000, 320, 12
NOTES = {"n_bins": BINS, "bins_per_octave": 12, "f_min": 440., "seconds": .5}


class Front(nn.Module):
    "Frames as MERT's convolutions have them: 400 samples every 320."
    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(400, 10, bias=False)

    def forward(self, wave): return self.enter(wave.unfold(1, 400, HOP))


class Small(nn.Module):
    "An encoder that mixes each frame with its neighbours and the mean of its row, without dropout and without layers left out."
    sample_rate, hop, dim = RATE, HOP, 12

    def __init__(self):
        super().__init__()
        self.front, self.enter, self.layer, self.hidden = Front(), nn.Linear(10, 12), nn.Linear(36, 12), nn.Parameter(torch.rand(12))

    def encode(self, features, masked=None):
        x = self.enter(features)
        if masked is not None: x = torch.where(masked[..., None], self.hidden, x)
        near = (x.roll(1, 1) + x.roll(-1, 1)) / 2
        return torch.stack([x, self.layer(torch.cat([x, near, x.mean(1, keepdim=True).expand_as(x)], -1)).tanh()], 1)


class Teacher(nn.Module):
    "Two codebooks: how loud a hop is, and on which side of zero it begins; one frame more than the encoder has."
    sample_rate, hop, sizes = RATE, HOP, (5, 2)

    def forward(self, wave):
        hops = wave.unfold(1, HOP, HOP)
        return torch.stack([(4 * hops.square().mean(2)).long().clamp_max(4), (hops[..., 0] > 0).long()], 2)


class Notes(nn.Module):
    "A picture of the wave in the wave's own precision: (B, 12, N)."
    sample_rate, hop, n_bins = RATE, HOP, BINS

    def forward(self, wave): return wave.unfold(1, HOP, HOP)[..., ::27].abs().mT


def objective(**options) -> MERTPretext:
    torch.manual_seed(0)
    made = MERTPretext(Small(), **{"teacher": Teacher(), "cqt": NOTES, "code_dim": 6, **options}).double()
    if made.teachers.cqt is not None: made.teachers.cqt = Notes()
    return made


def batch(rows: int = 8, frames: int = 25, seed: int = 6) -> Batch: # with this seed the second process hides twelve frames fewer
    draw = torch.Generator().manual_seed(seed)
    loudness = torch.rand(rows, 1, generator=draw).double()
    return Batch(wave=loudness * torch.randn(rows, HOP * (frames + 1), generator=draw).double(), seeds=draw_seeds(rows, draw))


def step(fabric, model, some: Batch) -> dict:
    parts = model(some)
    fabric.backward(parts["loss"])
    return {"parts": {name: value.detach() for name, value in parts.items()}, "gradient": [p.grad for p in model.parameters() if p.requires_grad]}


KINDS = {"all": {}, "one codebook": {"random_codebook": True}, "levelled": {"equal_counts": True}}


def options_of(kind: str) -> dict: return {"equal_counts": False, "mask_share": .4, **KINDS[kind]}


def run(rank: int, folder: Path) -> dict:
    fabric, found = launch(), {}
    for kind in KINDS:
        for gather in (gathered(fabric), None):
            model = objective(gather=gather, **options_of(kind))
            found[kind if gather else f"{kind}, a mean of means"] = step(fabric, fabric.setup_module(model), share(batch(), rank, RANKS))
    return found
