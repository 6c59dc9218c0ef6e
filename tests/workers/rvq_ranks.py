"""One of two processes whose quantiser, or codec, learns from a batch they share."""
from pathlib import Path

import torch

from musicssl.audio import Batch
from musicssl.augment import draw_seeds
from musicssl.devices import gathered, launch, share
from musicssl.teachers.rvq import ResidualVQ

RANKS, STEPS = 2, 4


def vectors(number: int) -> Batch:
    "Eight rows of twelve vectors in five dimensions, as waves of sixty samples; they drift, so that rows die."
    draw = torch.Generator().manual_seed(number)
    return Batch(wave=torch.randn(8, 60, generator=draw).double() + number, seeds=draw_seeds(8, draw))


def learn(mine, gather=None) -> dict:
    "What a quantiser becomes; `mine` cuts this process's rows out of a batch."
    quantiser = ResidualVQ(5, n_codes=6, n_codebooks=3, decay=.5, revive_below=.4, dropout=True).double()
    for number in range(STEPS):
        batch = mine(vectors(number))
        heard = quantiser(batch.wave.view(-1, 12, 5), batch.seeds, gather)
    return {"state": quantiser.state_dict(), "codes": heard.codes, "quantised": heard.quantised, "commitment": heard.commitment}


def codec():
    from musicssl.teachers.codec import RVQVAE
    torch.manual_seed(0)
    return RVQVAE.preset("tiny", channels=16, n_codes=8, fft_sizes=(256, 512))


def sounds() -> Batch:
    draw = torch.Generator().manual_seed(0)
    return Batch(wave=.1 * torch.randn(8, 3200, generator=draw), seeds=draw_seeds(8, draw))


def run(rank: int, folder: Path) -> dict:
    fabric = launch()
    def mine(batch: Batch) -> Batch: return share(batch, rank, RANKS)

    found = {"together": learn(mine, gathered(fabric)), "each for itself": learn(mine)}
    model = codec()
    model.gather = gathered(fabric)
    model(mine(sounds())) # the codebooks start
    wrapped = fabric.setup_module(model) # which adds the gradients up as long as it lives
    fabric.backward(wrapped(mine(sounds()))["loss"])
    found["gradient"] = {name: p.grad for name, p in model.named_parameters()}
    found["codebooks"] = model.quantiser.codebooks
    return found
