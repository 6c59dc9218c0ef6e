"""Is sound ready when training wants it? Random clips, the loader, checksums and rendering, against what else one could use.

    python benchmarks/data.py [--quick] [--json] [--only P16 P17 R14 render] [--device cuda]

P16     a random 15-s clip out of 60-s tracks, on one core: our store against tar shards, litdata and seeking in sound files; as the integers
        that were stored, and as float32 in [-1, 1), a conversion that costs all of them the same
P17     how long a training step of SampleCNN waits for its batch
R14     what comparing checksums at the first read costs
render  500 clips of 15 s on 2 cores, against the 3 minutes they may take

Files are read again and again and lie in memory after the first round: what is compared is the work of the reader, not the disk. The
peers with clips cut beforehand read them in order, their best case; ours and the sound files are read at random places.
"""
import argparse
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import soundfile as sf
import torch
from lightning_fabric import Fabric

from musicssl import settings, train
from musicssl.audio import Batch
from musicssl.data import scorebox, scores
from musicssl.data.loader import Loader
from musicssl.data.store import CorruptStore, Store
from musicssl.experiments import clmr
from paired import Disagreement, Row, as_json, header, paired, row, seconds, table

UNIT = np.float32(2**-15) # one step of an int16


@dataclass(frozen=True)
class Size:
    """How much is measured."""
    rounds: int | None # None: as many as the rules ask for
    tracks: int # sound files; ScoreBox comes in tens and more
    seconds: float # length of each; a clip is a quarter
    clips: int # read in a round; from sound files, which take long, the first 16 of them
    profile: str # of `settings.ini`: network, batch and clips of the training step
    steps: int # of training in a round
    rendered: int # clips of 15 s in a round
    whole: bool # also render all 500


SIZES = {"full": Size(None, 24, 60., 256, "laptop", 4, 40, True),
         "quick": Size(3, 10, 60., 64, "smoke", 2, 10, False),
         "test": Size(1, 10, 3., 8, "test", 2, 10, False)}


def note_tables(folder: Path) -> Path:
    """A cache of our own, in which the scores need not be parsed again."""
    folder.mkdir(exist_ok=True)
    scores.load_table(settings.cache_dir())
    for notes in settings.cache_dir().glob("scorebox-*.npz"): shutil.copy(notes, folder)
    return folder


# P16: a random clip

@dataclass(frozen=True)
class Places:
    """Which clips are read: the same for everybody."""
    store: Store # of whole tracks
    folder: Path # files of the others
    at: list[tuple[int, int]] # (track, first sample)
    length: int # samples


def choose_places(folder: Path, size: Size) -> Places:
    """Music from ScoreBox, and random places in it."""
    corpus = scorebox.load(size.tracks, size.seconds, 22_050, cache=folder, progress=False)
    rng, length = np.random.default_rng(0), corpus.store.n_samples // 4
    at = [(int(rng.integers(len(corpus))), int(rng.integers(corpus.store.n_samples - length))) for _ in range(size.clips)]
    return Places(corpus.store, folder, at, length)


def from_store(places: Places, dtype: str) -> Iterator[np.ndarray]:
    """Ours: a window onto a file of numbers, copied."""
    for track, first in places.at:
        if dtype == "int16": yield places.store[track][first:first + places.length].copy()
        else: yield places.store.wave([track], first, places.length)[0].numpy()


def from_file(places: Places, kind: str, dtype: str) -> Iterator[np.ndarray]:
    """Seek in a sound file and decode."""
    for track, first in places.at[:16]: yield sf.read(places.folder / f"{track}.{kind}", places.length, first, dtype=dtype)[0]


def converted(clip: np.ndarray, dtype: str) -> np.ndarray:
    """Integers as they are, or as float32."""
    return clip if dtype == "int16" else clip * UNIT


def write_files(places: Places, kind: str) -> Callable:
    """Whole tracks as sound files."""
    for track in range(len(places.store)): sf.write(places.folder / f"{track}.{kind}", places.store[track], places.store.sample_rate)
    return partial(from_file, places, kind)


def cut_clips(places: Places) -> Iterator[np.ndarray]:
    """The clips as int16, one by one, for the peers that keep them cut."""
    for track, first in places.at: yield np.ascontiguousarray(places.store[track][first:first + places.length])


def write_tar(places: Places) -> Callable:
    """Webdataset: clips as raw int16 in tar shards of 32."""
    import webdataset
    with webdataset.ShardWriter(str(places.folder / "shard-%04d.tar"), maxcount=32, verbose=0) as shards:
        for number, clip in enumerate(cut_clips(places)): shards.write({"__key__": f"{number:06d}", "int16": clip.tobytes()})
    files = sorted(map(str, places.folder.glob("shard-*.tar")))
    def read(dtype: str) -> Iterator[np.ndarray]:
        for sample in webdataset.WebDataset(files, shardshuffle=False, empty_check=False):
            yield converted(np.frombuffer(sample["int16"], "<i2"), dtype)
    return read


def write_litdata(places: Places) -> Callable:
    """Litdata: clips as int16 arrays in chunks of 32 MB."""
    import litdata
    from litdata.streaming.writer import BinaryWriter
    writer = BinaryWriter(cache_dir=str(places.folder / "litdata"), chunk_bytes="32MB")
    for number, clip in enumerate(cut_clips(places)): writer[number] = {"int16": clip}
    writer.done()
    writer.merge()
    dataset = litdata.StreamingDataset(str(places.folder / "litdata"))
    def read(dtype: str) -> Iterator[np.ndarray]:
        for sample in dataset: yield converted(np.asarray(sample["int16"]), dtype)
    return read


PEERS = {"webdataset": (write_tar, 3.), "litdata": (write_litdata, 2.), "FLAC, seek": (partial(write_files, kind="flac"), 20.),
         "WAV, seek": (partial(write_files, kind="wav"), None), "MP3, seek": (partial(write_files, kind="mp3"), None),
         "Ogg Vorbis, seek": (partial(write_files, kind="ogg"), None)}
LOSSY = "MP3, seek", "Ogg Vorbis, seek"


def agree(places: Places, readers: dict[str, Callable], dtype: str) -> None:
    """Every reader gives the int16 that FLAC decodes to, or that divided by 32768, bit by bit; lossy files give as many samples."""
    decoded = [converted(sf.read(places.folder / f"{track}.flac", places.length, first, dtype="int16")[0], dtype) for track, first in places.at]
    for name, reader in readers.items():
        found, wanted = list(reader()), decoded[:16] if name.endswith("seek") else decoded
        if len(found) != len(wanted): raise Disagreement(f"{name}: {len(found)} clips, wanted {len(wanted)}")
        for place, clip, right in zip(places.at, found, wanted):
            if clip.shape != right.shape or clip.dtype != np.dtype(dtype) or (name not in LOSSY and not np.array_equal(clip, right)):
                raise Disagreement(f"{name}: track {place[0]} from sample {place[1]} on is not what was stored there")


def per_clip(reader: Callable[[], Iterator[np.ndarray]]) -> float:
    """Seconds for one clip of a pass; each is dropped before the next is read, so that memory is used again."""
    count = 0
    def read_on() -> None:
        nonlocal count
        for clip in reader():
            del clip
            count += 1
    return seconds(read_on) / count


@contextmanager
def no_remarks() -> Iterator[None]:
    """Libmpg123 writes a line to the process's error stream whenever it enters an MP3 in the middle."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try: yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def random_clips(folder: Path, size: Size) -> list[Row]:
    """P16."""
    places = choose_places(note_tables(folder / "P16"), size)
    readers = {"store": partial(from_store, places)}
    for name, (write, _) in PEERS.items():
        try: readers[name] = write(places)
        except ImportError as error: print(f"P16: no row for {name}: {error}", file=sys.stderr)
    bound = {dtype: {name: partial(reader, dtype=dtype) for name, reader in readers.items()} for dtype in ("int16", "float32")}
    rows = []
    with no_remarks():
        for dtype in bound: agree(places, bound[dtype], dtype)
        for dtype in bound:
            times = paired(bound[dtype], size.rounds, measure=per_clip)
            speed = {name: f"{1 / median(taken):,.0f} clips/s" for name, taken in times.items()}
            rows += [row("P16", f"{dtype}, store : {name}", times[name], times["store"], at_least=PEERS[name][1],
                         note=f"{speed['store']} : {speed[name]}") for name in readers if name != "store"]
    return rows


# P17: a training step and its batch

AHEAD = 8 # batches taken before a round begins, so that it does not live on what workers read while others were timed


@dataclass(frozen=True)
class Training:
    """SampleCNN playing CLMR's game, and the store it hears."""
    store: Store
    pairs: int # clips in a batch
    config: train.TrainConfig
    fabric: Fabric
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    def rounds(self, batches: Callable, steps: int) -> Callable[[], tuple[float, float]]:
        """Calls of some steps each, from batch to batch; a call gives the seconds it took, and those spent on waiting for batches."""
        numbers = itertools.count()
        def play() -> tuple[float, float]:
            waited = []
            def take(number: int) -> Batch: # to where it is computed
                start = time.perf_counter()
                batch = batches(number).to(self.fabric.device)
                if batch.wave.is_cuda: torch.cuda.synchronize()
                waited.append(time.perf_counter() - start)
                return batch
            for _ in range(AHEAD): take(next(numbers))
            waited.clear()
            total = seconds(lambda: [train.update(self.fabric, self.model, self.optimizer, take, self.config, next(numbers)) for _ in range(steps)])
            return total, sum(waited)
        return play


def prepare(folder: Path, size: Size, device: str) -> Training:
    """The chapter's encoder and chain at the scale of a profile, and four batches of clips."""
    recipe = settings.read("gpu" if device == "cuda" else size.profile, clmr.PAPER, clmr.Recipe)
    config = {**asdict(recipe), "seed": 0}
    objective = clmr.new_objective(config)
    corpus = scorebox.load(max(10, 4 * recipe.pairs), recipe.seconds, objective.encoder.sample_rate, cache=note_tables(folder), progress=False)
    fabric = Fabric(accelerator=device, devices=1, precision=recipe.precision)
    model, optimizer = fabric.setup(objective, torch.optim.Adam(objective.parameters(), recipe.learning_rate))
    engine = train.TrainConfig(steps=10**6, lr=recipe.learning_rate, precision=recipe.precision)
    return Training(corpus.store, recipe.pairs, engine, fabric, model, optimizer)


def same_batches(loaders: dict[str, Callable], numbers: range) -> None:
    """However a loader reads, batch k holds the same clips and the same samples."""
    for name, loader in loaders.items():
        for number in numbers:
            ours, wanted = loader(number).to("cpu"), loaders["store, 0 workers"](number)
            if list(ours.ids) != list(wanted.ids) or not torch.equal(ours.wave, wanted.wave):
                raise Disagreement(f"{name}: batch {number} is not the batch that is read without workers")


def waiting(training: Training, size: Size) -> list[Row]:
    """P17."""
    device, workers = training.fabric.device, 2 if training.fabric.device.type == "cpu" else 4
    load = partial(Loader, training.store, batch_size=training.pairs)
    loaders = {"store, 0 workers": load(), f"store, {workers} workers": load(workers=workers), "resident, 0 workers": load(resident=device)}
    same_batches(loaders, range(2))
    kept = [loaders["store, 0 workers"](number).to(device) for number in range(4)]
    candidates = {"in memory": lambda number: kept[number % 4], **loaders}
    steps = size.steps * (10 if device.type == "cuda" else 1)
    taken = paired({name: training.rounds(batches, steps) for name, batches in candidates.items()}, size.rounds, measure=lambda work: work())
    for loader in loaders.values(): loader.close()
    alone = [total - waited for total, waited in taken["in memory"]]
    step = f"step of {training.pairs} clips: {1e3 * median(alone) / steps:,.0f} ms"
    return [row("P17", f"{name}: waiting / step", [waited for _, waited in taken[name]], alone,
                at_most=None if name == "store, 0 workers" else .05, note=step) for name in loaders]


# R14: what checksums cost

def notices(store: Store, folder: Path) -> None:
    """A flipped bit must be found, else there is nothing to time."""
    copy = folder / "flipped"
    shutil.copytree(store.folder, copy)
    chunk = sorted(copy.glob("*.int16"))[0]
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    try: Store(copy).wave([0])
    except CorruptStore: return
    raise Disagreement(f"a flipped bit in {chunk.name} was not noticed")


def read_through(folder: Path, compare: bool) -> None:
    """The first time a process reads all clips."""
    store = Store(folder)
    if not compare: store._unread.clear()
    for i in range(len(store)): store.wave([i])


def checksums(training: Training, folder: Path, size: Size) -> list[Row]:
    """R14, as a share of a pass that only reads, and of a first epoch that trains."""
    notices(training.store, folder)
    store, steps = training.store.folder, size.steps * (10 if training.fabric.device.type == "cuda" else 1)
    step = training.rounds(Loader(training.store, batch_size=training.pairs, resident=training.fabric.device), steps)
    candidates = {"compared": partial(seconds, partial(read_through, store, True)), "steps": lambda: step()[0],
                  "not compared": partial(seconds, partial(read_through, store, False))}
    taken = paired(candidates, size.rounds, measure=lambda work: work())
    cost = [a - b for a, b in zip(taken["compared"], taken["not compared"])]
    epoch = [took / steps / training.pairs * len(training.store) for took in taken["steps"]]
    stored = sum(file.stat().st_size for file in store.glob("*.int16"))
    note = f"{len(training.store)} clips, {stored / 1e6:,.0f} MB, {stored / median(cost) / 1e9:.1f} GB/s"
    return [row("R14", "checksums : a first epoch that trains", cost, epoch, at_most=.05, note=note),
            row("R14", "checksums : a first pass that only reads", cost, taken["not compared"], note=note)]


# Rendering

def rendering(folder: Path, size: Size) -> list[Row]:
    """500 clips of 15 s on 2 cores, from one core's speed and, at full size, tried."""
    cache, seed = note_tables(folder / "render"), itertools.count(1)
    def render(clips: int, workers: int) -> None:
        scorebox.load(clips, 15., 22_050, seed=next(seed), cache=cache, workers=workers, progress=False)
        shutil.rmtree(cache / "scorebox")
    one = paired({"one core": lambda: render(size.rendered, 1)}, size.rounds)["one core"]
    speed = f"{size.rendered / median(one):.1f} clips/s and core, {15 * size.rendered / median(one):.0f} times real time"
    expected = [500 / 2 * took / size.rendered / 180 for took in one]
    rows = [row("render", "500 clips : 3 minutes, from one core's speed", expected, at_most=1., note=speed)]
    if size.whole:
        took = seconds(lambda: render(500, 2))
        rows.append(row("render", "500 clips : 3 minutes, tried with 2 processes", [took / 180], at_most=1., note=f"{took:.0f} s"))
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="full", help="within a minute")
    parser.add_argument("--size", choices=SIZES, default="full", help="test: to see that everything runs")
    parser.add_argument("--json", action="store_true", help="one object by target instead of the table")
    parser.add_argument("--only", nargs="+", choices=("P16", "P17", "R14", "render"), default=("P16", "P17", "R14", "render"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the training step runs")
    given = parser.parse_args(arguments)
    size, rows, only = SIZES[given.size], [], set(given.only)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("P17 and R14 are skipped: there is no GPU here", file=sys.stderr)
        only -= {"P17", "R14"}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "P16" in only: rows += random_clips(folder, size)
        if {"P17", "R14"} & only: training = prepare(folder / "P17", size, given.device)
        if "P17" in only: rows += waiting(training, size)
        if "R14" in only: rows += checksums(training, folder, size)
        if "render" in only: rows += rendering(folder, size)
    if given.json: print(as_json(rows))
    else: print(header("soundfile", "webdataset", "litdata"), table(rows), sep="\n")


if __name__ == "__main__": main()
