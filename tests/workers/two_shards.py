"""Train a network spread over two processes by `fully_shard`; write a checkpoint, and go on from one that a single process wrote."""
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from musicssl import checkpoint
from musicssl.optim import LARS

RANKS = 2
OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=.01),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=.01),
    "lars": lambda parameters: LARS(parameters, lr=.1, weight_decay=1e-3),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=.01, momentum=.9),
}


def state(name, step): return {"config": {"schedule": "constant", "optimizer": name}, "step": step}


def network(seed=0):
    """Rows that two processes cannot share evenly: 7 of them, and a single one."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.BatchNorm1d(7), nn.Linear(7, 1))


def train(net, optimizer, steps, begin=0):
    """All processes see the same batch, so the mean of their gradients is the gradient of one."""
    for step in range(begin, begin + steps):
        batch = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        net(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def spread(name, seed=0):
    mesh = distributed.init_device_mesh("cpu", (RANKS,))
    net = network(seed)
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, OPTIMIZERS[name](net.parameters())


def look(net):
    """A validation leaves the outermost slices joined together."""
    net.eval()
    with torch.no_grad(): net(torch.ones(2, 5))
    net.train()


def save(folder, net, optimizer, name, step):
    found = checkpoint.full_state(net, optimizer)
    assert bool(found[0]) == (distributed.get_rank() == 0)
    if distributed.get_rank() == 0: checkpoint.save_checkpoint(folder, *found, state(name, step))


def run(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    for name in OPTIMIZERS:
        net, optimizer = spread(name)
        train(net, optimizer, 3)
        look(net)
        save(Path(folder) / f"{name} on two", net, optimizer, name, 3)
        net, optimizer = spread(name, seed=1)
        look(net)
        weights, moments, step = checkpoint.load_checkpoint(Path(folder) / f"{name} on one" / "step-00000003", state(name, 0))
        checkpoint.restore_state(net, optimizer, weights, moments)
        shards = [value.to_local() for moment in optimizer.state.values() for value in moment.values() if hasattr(value, "to_local")]
        assert all(shard.untyped_storage().nbytes() <= shard.nbytes for shard in shards), "a slice keeps the whole tensor alive"
        train(net, optimizer, 2, step)
        save(Path(folder) / f"{name} one, then two", net, optimizer, name, 5)
    other = spread("adam", seed=2)[0]
    checkpoint.load_weights(Path(folder) / "adam on one" / "step-00000003" / "model.safetensors", other)
    assert all(not hasattr(value, "full_tensor") or value.to_local().numel() <= value.numel() for value in other.state_dict().values())
    save(Path(folder) / "weights alone", other, OPTIMIZERS["sgd"](other.parameters()), "sgd", 3)
    copy = nn.parallel.DistributedDataParallel(network(seed=1))
    optimizer = OPTIMIZERS["adam"](copy.parameters())
    checkpoint.restore_state(copy, optimizer, *checkpoint.load_checkpoint(Path(folder) / "adam on one" / "step-00000003", state("adam", 0))[:2])
    save(Path(folder) / "copies on two", copy, optimizer, "adam", 3)
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(run, args=(sys.argv[1],), nprocs=RANKS)
