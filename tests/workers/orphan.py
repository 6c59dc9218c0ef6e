"""Start a loader's workers, say who they are, and wait to be killed."""
import time

from faulty import clips
from musicssl.data.loader import Loader

if __name__ == "__main__":
    loader = Loader(clips(), batch_size=8, workers=2)
    loader(0)
    print(*(worker.process.pid for worker in loader._reader.workers), flush=True)
    time.sleep(100)
