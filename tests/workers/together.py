"""One of two processes that fill a grid as one; each writes down what it got.   together.py FOLDER good|alone|mutation

The test holds the lock of run 3. In the grid `good` run 1 fails in both processes, in `alone` in the second one, while the first waits for it.
"""
import datetime
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from musicssl import devices, files, records

folder, case, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])


def total(config, place):
    """The sum over both processes of the run's number; run 1 fails."""
    if config["run"] == 1 and (case == "good" or rank == 1): raise FloatingPointError("diverged")
    number = torch.tensor(float(config["run"] + rank))
    torch.distributed.all_reduce(number)
    (place / f"rank{rank}").touch()
    return {"total": number.item(), "rank": rank}, {"total": np.array([number.item()])}


def apart(config, place):
    """Needs no other process."""
    time.sleep(1)
    return {"rank": rank}, {}


def outcome(call):
    try: return call()
    except (records.RunsFailed, files.Locked, ValueError) as error: return f"{type(error).__name__}: {error}"


def filled(work, runs):
    done = records.join_in([{"run": run} for run in runs], work, folder / "records", folder / "scratch", progress=False)
    return [record and {**record.metrics, "array": [value.tolist() for value in record.arrays.values()], "processes": record.provenance["processes"]} for record in done]


records._GRACE = datetime.timedelta(seconds=2)
if case == "mutation": records._by_all = lambda group, work: work()
if case != "good": outcome(lambda: filled(total, [0, 1]))
else:
    found = {"fill": outcome(lambda: records.fill([{"run": 0}], total, folder / "records", folder / "scratch")),
             "failed": outcome(lambda: filled(total, [0, 1, 2, 3])), "rest": filled(total, [0, 2, 3]),
             "locked": outcome(lambda: records.run({"run": 3}, total, folder / "records", folder / "scratch"))}
    group = devices.launch()
    records._by_first, records._by_all = lambda group, work: work(), lambda group, work: work()
    group.barrier()
    found["every process looks after the files"] = filled(apart, [9])
    files.write_json(folder / f"{rank}.json", found)
