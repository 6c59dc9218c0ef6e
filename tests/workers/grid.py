"""Work for grids of runs, and a process that fills one.   grid.py FOLDER RUNS SECONDS"""
import sys
import time
from pathlib import Path

import numpy as np

from musicssl import records


def slow(config, place):
    """Leaves a line per start and per end, so that a test can count them."""
    with open(place.parent / "diary.txt", "a") as diary: diary.write(f"start {config['run']}\n")
    time.sleep(config["seconds"])
    with open(place.parent / "diary.txt", "a") as diary: diary.write(f"end {config['run']}\n")
    return {"run": config["run"]}, {"square": np.array([config["run"] ** 2])}


def grid(runs, seconds=.1):
    return [{"run": run, "seconds": seconds} for run in range(runs)]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    records.fill(grid(int(sys.argv[2]), float(sys.argv[3])), "grid:slow", folder / "records", folder / "scratch", workers=1)
