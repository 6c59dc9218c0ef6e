"""Sources that misbehave at one clip, importable by the loader's worker processes."""
import os
import signal
import time

import numpy as np

from musicssl.data.loader import Arrays

BAD = 21 # the clip at which it happens


def clips(n: int = 48) -> np.ndarray:
    """Noise with the clip's number in its first sample."""
    made = np.random.default_rng(0).integers(-9000, 9000, (n, 400), dtype=np.int16)
    made[:, 0] = np.arange(n)
    return made


class Faulty(Arrays):
    """Noise. Where it reads clip `BAD`, it does what its method `fault` does."""

    def __init__(self): super().__init__(clips())

    def __getitem__(self, i):
        if i == BAD: self.fault()
        return super().__getitem__(i)


class Killed(Faulty):
    def fault(self): os.kill(os.getpid(), signal.SIGKILL)


class Hanging(Faulty):
    def fault(self): time.sleep(1000)


class Stopped(Faulty):
    """The whole process stands still, not only the thread that reads."""
    def fault(self): os.kill(os.getpid(), signal.SIGSTOP)


class Raising(Faulty):
    def fault(self): raise LookupError("the disk says no")


class Slow(Faulty):
    """Early batches take longer than late ones, so that workers overtake each other."""
    def __getitem__(self, i):
        time.sleep(.004 * (i % 5))
        return Arrays.__getitem__(self, i)
