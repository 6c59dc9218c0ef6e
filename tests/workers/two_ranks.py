"""One of two processes that share a CLMR batch; imported afresh by each spawned process."""
import os
from collections.abc import Callable
from functools import partial

import torch
from lightning_fabric import Fabric
from torch import nn

from musicssl.audio import Batch
from musicssl.augment import clmr_chain, clmr_views, draw_seeds
from musicssl.encoders.base import Embedding
from musicssl.encoders.samplecnn import SampleCNN
from musicssl.objectives.clmr import CLMR, nt_xent

SONGS, RANKS = 4, 2


class Frames(nn.Module):
    "A small encoder whose normalisation looks at one frame only."
    sample_rate, hop, dim, n_samples = 8000, 64, 24, 512

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 24))

    def forward(self, wave):
        frames = self.net(wave.unfold(-1, self.hop, self.hop))
        return Embedding(layers=frames[:, None], clip=frames.mean(1))


class JoinedFirst(CLMR):
    "The published mistake: both views in one tensor before gathering."

    def forward(self, batch):
        views = clmr_views(batch.wave, self.chain, batch.generator)
        joined = torch.cat([self.head(self.encoder(view).clip) for view in views])
        return {"loss": nt_xent(*self.gather(joined).flatten(0, -2).chunk(2), self.temperature)}


def local_slice(gather: Callable, rank: int, z: torch.Tensor) -> torch.Tensor:
    "The other published mistake: of all that was gathered, only this rank's rows carry a gradient."
    everyone = gather(z.detach()).clone()
    everyone[rank] = z
    return everyone


def objective(encoder: str, kind: type = CLMR) -> CLMR:
    torch.manual_seed(0)
    network = Frames() if encoder == "frames" else SampleCNN.preset("toy")
    clmr = kind(network, clmr_chain(n_samples=network.n_samples), projection_dim=16).train()
    if encoder == "samplecnn, norms at rest":
        for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm1d)): norm.eval()
    return clmr


def batch(rank: int = 0, ranks: int = 1) -> Batch:
    "The rows of one rank, with a generator moved on to the seeds of those rows."
    wave = torch.randn(SONGS * RANKS, 2000, generator=torch.Generator().manual_seed(5)) / 10
    rows = SONGS * RANKS // ranks
    generator = torch.Generator().manual_seed(6)
    draw_seeds(rank * rows, generator)
    return Batch(wave=wave[rank * rows:(rank + 1) * rows], generator=generator)


def step(model: nn.Module, batch: Batch, backward: Callable) -> dict:
    loss = model(batch)["loss"]
    if loss.requires_grad: backward(loss)
    return {"loss": loss.item(), "gradient": [p.grad for p in model.parameters()]}


def refusal(call: Callable) -> str:
    try: call()
    except Exception as error: return str(error)
    return ""


def run(rank: int, port: int, out: str) -> None:
    "Every case in turn, in one process group; rank 0 writes what it found."
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(RANKS))
    fabric = Fabric(accelerator="cpu", devices=RANKS, strategy="ddp")
    fabric.launch()
    summing, plain = partial(fabric.all_gather, sync_grads=True), partial(fabric.all_gather, sync_grads=False)
    cases = {
        **{encoder: (encoder, CLMR, summing) for encoder in ("frames", "samplecnn, norms at rest", "samplecnn")},
        "sync_grads=False": ("frames", CLMR, plain),
        "local slice": ("frames", CLMR, partial(local_slice, plain, rank)),
        "joined first": ("frames", JoinedFirst, summing),
        "no gather": ("frames", CLMR, None),
    }
    found = {}
    for name, (encoder, kind, gather) in cases.items():
        clmr = objective(encoder, kind)
        clmr.gather = gather
        found[name] = step(fabric.setup_module(clmr), batch(rank, RANKS), fabric.backward)
    found["SyncBatchNorm"] = refusal(lambda: nn.SyncBatchNorm(4).train()(torch.randn(8, 4, 16)))
    if rank == 0: torch.save(found, out)
    fabric.barrier()
    torch.distributed.destroy_process_group()
