"""Train the toy on one or two CPU processes.   two_processes.py FOLDER DEVICES

With two processes it is trained three times, the second and third time with a protection taken away.
"""
import sys
from pathlib import Path

import torch
from lightning_fabric import Fabric

from musicssl import train, update
from toy import Toy, batches

CONFIG = train.TrainConfig(steps=6, optimizer="sgd", lr=.1, accumulate=2, clip_norm=.5, checkpoint_every=100)


def trained(fabric, folder):
    """Half the run, then the other half as a resume."""
    toy = Toy(noise=0., dropout=0., norm=False)
    train.fit(toy, batches(16), CONFIG, folder, fabric=fabric, until=3, progress=False)
    result = train.fit(toy, batches(16), CONFIG, folder, fabric=fabric, progress=False)
    return {"weights": toy.state_dict(), "seen": toy.seen, "losses": [row["loss"] for row in result.history],
            "clips": [row["clips"] for row in result.history], "resumed": result.resumed, "gather": toy.lent, "kept": toy.gather is not None}


if __name__ == "__main__":
    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto")
    fabric.launch()
    found = {"whole": trained(fabric, folder / "whole")}
    if devices > 1:
        read, update.read_batch = update.read_batch, lambda batches, number, seed, rank, world: read(batches, number, seed, 0, world)
        found["same rows everywhere"] = trained(fabric, folder / "same")
        update.read_batch, no_sync = read, fabric.no_backward_sync
        fabric.no_backward_sync = lambda model, enabled: no_sync(model, enabled=True)
        found["never synchronised"] = trained(fabric, folder / "never")
    torch.save(found, folder / f"rank{fabric.global_rank}.pt")
