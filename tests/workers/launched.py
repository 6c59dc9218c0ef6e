"""What `launch` makes of this process: one file for each, in the folder that is given.   launched.py FOLDER"""
import os
import sys
from pathlib import Path

import torch

from musicssl import devices, files

os.environ["CUDA_VISIBLE_DEVICES"] = ""
fabric = devices.launch()
again = devices.launch() # the connection there is serves a second time
total = fabric.all_reduce(torch.tensor(10 ** fabric.global_rank), reduce_op="sum")
files.write_json(Path(sys.argv[1]) / f"{fabric.global_rank}.json", {
    "rank": fabric.global_rank, "world": fabric.world_size, "local": fabric.local_rank, "device": str(fabric.device), "again": again.global_rank,
    "strategy": type(fabric.strategy).__name__, "backend": torch.distributed.get_backend(), "total": int(total)})
fabric.barrier()
torch.distributed.destroy_process_group()
