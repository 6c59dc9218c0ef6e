"""Look for the largest batch under a lowered limit of address space, in a process of its own; prints JSON.

Only PyTorch's own allocator is asked: convolutions on a CPU allocate in oneDNN too, which may end the process instead of raising.
"""
import json
import resource

import torch

from musicssl.devices import largest_batch

ROOM, CLIP = 400 * 2**20, 8 * 2**20
torch.set_num_threads(1)


def step(n):
    """Two tensors of a batch; what is asked for is counted, so nothing need be written into them."""
    waves = torch.empty(n * CLIP // 4)
    return torch.empty_like(waves).stride()


step(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
print(json.dumps([largest_batch(step, 1000) for _ in range(2)]))
