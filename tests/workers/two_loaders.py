"""Two gloo processes train on what a loader gives them, pausing half-way, and write down what they heard.   two_loaders.py FOLDER

The second time each process reads the first one's rows.
"""
import json
import sys
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import nn

from faulty import clips
from musicssl import train, update
from musicssl.data.loader import Loader

CONFIG = train.TrainConfig(steps=12, lr=.1, optimizer="sgd", checkpoint_every=6)


class Listener(nn.Module):
    """Hears, writes down, learns next to nothing."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(())), []

    def forward(self, batch):
        self.seen += [[clip, *map(float, wave[:3])] for clip, wave in zip(batch.ids.tolist(), batch.wave)]
        return {"loss": (self.weight - batch.wave.mean()).square()}


def heard(fabric, folder, workers):
    """The first half with some workers, the second, resumed, with others."""
    listener = Listener()
    for until, processes in ((6, workers[0]), (12, workers[1])):
        loader = Loader(clips(), batch_size=8, crop=300, workers=processes)
        train.fit(listener, loader, CONFIG, folder, fabric=fabric, until=until, progress=False)
        loader.close()
    return listener.seen


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    found = {"whole": heard(fabric, folder / "whole", (0, 1))}
    read = update.read_batch
    update.read_batch = lambda batches, number, seed, rank, world: read(batches, number, seed, 0, world)
    found["rank ignored"] = heard(fabric, folder / "same", (0, 0))
    (folder / f"rank{fabric.global_rank}.json").write_text(json.dumps(found))
