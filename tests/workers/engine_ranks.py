"""What the loop does on two CPU processes beyond averaging gradients.   engine_ranks.py FOLDER

Shards a network (FSDP), accumulates for CLMR, meets a locked folder, and is called away.
"""
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import nn

from musicssl import devices, files, train
from musicssl.audio import Batch
from musicssl.augment import clmr_chain
from musicssl.encoders.samplecnn import SampleCNN
from musicssl.objectives.clmr import CLMR
from toy import Toy, batches

SHARDED = train.TrainConfig(steps=6, optimizer="adamw", lr=1e-2, clip_norm=.5, accumulate=2, checkpoint_every=3)
SONGS = train.TrainConfig(steps=3, optimizer="sgd", lr=.05, accumulate=2, checkpoint_every=100)
WAVES = torch.randn(8, 2000, generator=torch.Generator().manual_seed(5)) / 10


def clmr():
    torch.manual_seed(0)
    network = SampleCNN.preset("toy")
    return CLMR(network, clmr_chain(n_samples=network.n_samples, sample_rate=8000), projection_dim=16)


def songs(number):
    return Batch(wave=WAVES.roll(number, 0), ids=list(range(8)))


def toy(): return Toy(noise=0., dropout=0., norm=False)


def trained(objective, read, config, folder, fabric, **options):
    result = train.fit(objective, read, config, folder, fabric=fabric, progress=False, **options)
    return {"loss": [row["loss"] for row in result.history], "grad_norm": [row["grad_norm"] for row in result.history], "resumed": result.resumed}


def refusal(call):
    try: call()
    except BaseException as error: return f"{type(error).__name__}: {error}"
    return ""


class CalledAway(Toy):
    """In the third step one of the two processes gets a signal."""
    def forward(self, batch):
        if len(self.seen) == 2 * 8 and os.environ["RANK"] == "1": os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(batch)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    found, fabric = {}, devices.launch()
    objective = clmr()
    found["clmr"] = {**trained(objective, songs, SONGS, folder / "clmr", fabric), "weights": objective.state_dict()}
    synchronise, devices.synchronise_batch_norm = devices.synchronise_batch_norm, lambda module: module
    found["statistics apart"] = trained(clmr(), songs, SONGS, folder / "apart", fabric)
    devices.synchronise_batch_norm = synchronise
    (folder / "taken").mkdir(exist_ok=True)
    held = files.lock(folder / "taken" / ".lock") if fabric.is_global_zero else None
    if held: held.__enter__()
    fabric.barrier()
    found["locked"] = refusal(lambda: trained(toy(), batches(16), SHARDED, folder / "taken", fabric))
    if held: held.__exit__(None, None, None)
    found["called away"] = refusal(lambda: trained(CalledAway(noise=0., dropout=0., norm=False), batches(16), replace(SHARDED, accumulate=1), folder / "away", fabric))
    spread = devices.launch(strategy="fsdp")
    first, second = toy(), toy()
    trained(first, batches(16), SHARDED, folder / "sharded", spread, until=3)
    found["sharded"] = trained(second, batches(16), SHARDED, folder / "sharded", spread)
    found["pieces"] = [tuple(p.to_local().shape) for p in second.parameters()]
    torch.save(found, folder / f"rank{fabric.global_rank}.pt")
