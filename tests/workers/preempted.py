"""Train the toy until somebody sends a signal.   preempted.py FOLDER [MUTATION]   ("deaf": without listening to signals)"""
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from musicssl import train
from toy import Toy, batches

CONFIG = train.TrainConfig(steps=4000, lr=1e-2, checkpoint_every=4000)


@contextmanager
def deaf(act): yield


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2:] == ["deaf"]: train.when_asked_to_end = deaf
    train.fit(Toy(), batches(), CONFIG, Path(sys.argv[1]), progress=False)
