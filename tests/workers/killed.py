"""Train in children that die with `kill -9`, then to the end.   killed.py FOLDER HOW MUTATION KILLS SEED

HOW: "never"; "random" (a random moment after a random number of steps, so that no machine is too fast for it); "writing" (while a checkpoint is written:
with half its weights or half its moments on disk, or with everything but the last rename; a checkpoint after every step, so that there are many).
MUTATION takes one protection away, so that the test can show that it notices: see `mutate`.
"""
import os
import random
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch

from musicssl import checkpoint, files, train, update
from toy import Toy, batches

CONFIG = train.TrainConfig(steps=48, lr=1e-2, warmup_steps=10, schedule="cosine", accumulate=2, clip_norm=1., checkpoint_every=4)
PLACES = "weights", "moments", "rename"


def mutate(mutation):
    if mutation == "plain write":
        @contextmanager
        def plain(path, size=None): yield Path(path)
        files.atomic = plain
    if mutation == "log kept":
        checkpoint.Log.__init__ = lambda log, folder, step, write=True: log.__dict__.update(
            rows=checkpoint.read_log(folder), file=open(Path(folder) / "log.jsonl", "a"))
    if mutation == "one random stream":
        stream = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        train.seed_everything = update.seed_everything = lambda *key: stream
    if mutation == "optimiser forgotten":
        torch.optim.Adam.load_state_dict = lambda self, state: None


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_writing(number, place):
    """Die in the checkpoint of this number, from 1."""
    save_file, save, replace, begun = safetensors.torch.save_file, torch.save, os.replace, []
    def weights(tensors, path, **options):
        begun.append(path)
        save_file(tensors, path, **options)
        if place == "weights" and len(begun) == number: os.truncate(path, os.path.getsize(path) // 2); die()
    def moments(state, file):
        save(state, file)
        if place == "moments" and len(begun) == number: file.truncate(file.tell() // 2); die()
    def rename(source, target):
        if place == "rename" and len(begun) == number and Path(target).name.startswith("step-"): die()
        replace(source, target)
    safetensors.torch.save_file, torch.save, os.replace = weights, moments, rename


def go(folder, every=4, death=None):
    if death: die_while_writing(*death)
    train.fit(Toy(), batches(), replace(CONFIG, checkpoint_every=every), folder, progress=False)


def in_child(folder, kill_after=None, **options):
    """The child's exit status; forked, so that twenty of them start in no time."""
    pid = os.fork()
    if pid == 0:
        try: go(folder, **options)
        except BaseException as error: print(f"{type(error).__name__}: {error}", flush=True); os._exit(1)
        os._exit(0)
    if kill_after is not None:
        steps, moment = kill_after
        until, log = time.monotonic() + 20, folder / "log.jsonl"
        length = lambda: log.stat().st_size if log.exists() else 0
        wanted = length() + 150 * steps # a row has about 150 bytes
        while length() < wanted and time.monotonic() < until and os.waitpid(pid, os.WNOHANG)[0] == 0: time.sleep(.0005)
        time.sleep(moment)
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: return 0
    return os.waitpid(pid, 0)[1]


if __name__ == "__main__":
    folder, how, mutation, kills, seed = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    torch.set_num_threads(1)
    mutate(mutation)
    draw, killed, reached = random.Random(seed), 0, set()
    while how != "never" and killed < kills:
        if how == "random": status = in_child(folder, kill_after=(draw.randint(0, 6), draw.uniform(0, .02)))
        else: status = in_child(folder, every=1, death=(draw.randint(2, 3), PLACES[killed % 3]))
        if status != signal.SIGKILL: break
        killed += 1
        reached.add(len(checkpoint.checkpoints(folder)) and checkpoint.checkpoints(folder)[-1].name)
    status = in_child(folder, every=1 if how == "writing" else 4)
    print(f"killed {killed} times, newest checkpoints then {sorted(map(str, reached))}")
    sys.exit(status != 0)
