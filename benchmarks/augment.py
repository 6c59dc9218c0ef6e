"""Is the chain of augmentations quick enough not to be noticed? Ours, on whole batches, against what one would otherwise install.

    python benchmarks/augment.py [--quick] [--json] [--only P1 P2 P3 P4] [--device cuda]

P1  CLMR's whole chain, per view, on one core, against torchaudio-augmentations with sox
P2  the same without pitch shift and reverb
P3  the whole chain on a GPU (--device cuda) against 16 cores running the peer, and its share of a training step
P4  pitch shift by another number of cents for every clip, on one core, against sox, torchaudio, torch-audiomentations and audiomentations

The peers are nobody's dependencies. Into an environment of one's own:

    pip install --no-deps torchaudio-augmentations==0.2.4 julius==0.2.7
    pip install --no-deps torch-audiomentations torch-pitch-shift primePy audiomentations numpy-minmax numpy-rms python-stretch
    apt-get install libsox-dev                                 # or any way to libsox and its header
    git clone https://github.com/facebookresearch/WavAugment && cd WavAugment && git checkout 357b2f9 && python setup.py develop

Later commits of WavAugment call a part of torchaudio that is no longer there. A peer that is missing has no row, and what it last gave is said.
Each draws its own views from the same 29-s clips; what the steps compute is compared before anything is timed.
"""
import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType

import torch
from torch import Tensor

from musicssl import compat
from musicssl.audio import Batch
from musicssl.augment.base import Compose, RandomCrop, draw_seeds
from musicssl.augment.clmr import clmr_code_v2, clmr_views
from musicssl.augment.linear import Delay, Filter, Reverb
from musicssl.augment.pitch import PitchShift
from musicssl.encoders.samplecnn import SampleCNN
from musicssl.objectives.clmr import CLMR
from paired import Disagreement, Row, as_json, header, paired, row, table

RATE, VIEW, CLIP = 22_050, 59_049, 29 * 22_050
# What a missing peer leaves unsaid.
LAST = {"sox": "2026-11-21, the chain with it took 1.4 times as long as ours (P1) and its pitch shift as long (P4)",
        "torchaudio-augmentations": "2026-11-21, it took 2.1 times as long as ours in P2",
        "torch-audiomentations": "2026-11-21, it took 22 times as long as ours in P4", "audiomentations": "2026-11-21, it took 2.8 times as long as ours in P4"}


@dataclass(frozen=True)
class Size:
    """How much is measured."""
    rounds: int | None # None: as many as the rules ask for
    clips: int # in a round of P1 and P2, two views of each
    pitches: int # clips in a round of P4
    pairs: int # in a batch of P3


SIZES = {"full": Size(None, 24, 8, 256), "quick": Size(3, 8, 4, 256), "test": Size(1, 2, 1, 8)}


def missing(package: str, error: Exception) -> None:
    print(f"no rows for {package}: {error}; when last measured, {LAST[package]}", file=sys.stderr)


def official() -> tuple[ModuleType | None, bool]:
    """The package of CLMR's official code, and whether it has sox. It says `import augment`, WavAugment's name and also that of this file."""
    paths, here = sys.path[:], Path(__file__).resolve().parent
    sys.path[:] = [path for path in paths if Path(path).resolve() != here]
    compat.torchaudio()
    try: import augment
    except ImportError as error:
        missing("sox", error)
        augment = sys.modules["augment"] = ModuleType("augment")
    try: import torchaudio_augmentations
    except ImportError as error: return missing("torchaudio-augmentations", error), False
    finally: sys.path[:] = paths
    return torchaudio_augmentations, hasattr(augment, "EffectChain")


# The chains, with the numbers of version 2 of the official code

def ours(whole: bool) -> Compose:
    """Crop, polarity, noise, gain, filter, delay; and if whole, pitch and reverb."""
    return Compose(clmr_code_v2(VIEW, RATE).transforms[:8 if whole else 6])


def theirs(package: ModuleType, whole: bool) -> Callable:
    """The same chain of torchaudio-augmentations, for one clip (1, T)."""
    maybe = lambda step, p: package.RandomApply([step], p=p)
    steps = [package.RandomResizedCrop(VIEW), maybe(package.PolarityInversion(), .8), maybe(package.Noise(), .01), maybe(package.Gain(), .3),
             maybe(package.HighLowPass(sample_rate=RATE), .8), maybe(package.Delay(sample_rate=RATE), .3)]
    if whole: steps += [maybe(package.PitchShift(n_samples=VIEW, sample_rate=RATE), .6), maybe(package.Reverb(sample_rate=RATE), .6)]
    return package.ComposeMany(steps, num_augmented_samples=2)


def each(work: Callable[[Tensor], object], wave: Tensor) -> list:
    """A peer that takes one clip."""
    return [work(wave[i:i + 1]) for i in range(len(wave))]


# Agreement

def agree(what: str, found: Tensor, expected: Tensor, most: float) -> None:
    """Sample by sample, as a share of the loudest sample expected."""
    worst = float((found - expected).abs().max() / expected.abs().max())
    if not worst <= most: raise Disagreement(f"{what}: {worst:.1e} of the peak away, wanted at most {most:.0e}")


def same_steps(package: ModuleType, sox: bool) -> None:
    """Filter, delay and reverb, the settings being equal."""
    import julius
    wave = noise(4, VIEW)
    for high, cutoffs in ((True, (200., 451.3, 900., 1200.)), (False, (2200., 2900.9, 3300., 4000.))):
        passes = julius.highpass_filter if high else julius.lowpass_filter
        params = {"highpass": torch.full((4,), high), "cutoff_hz": torch.tensor(cutoffs).double()}
        expected = torch.cat([passes(wave[i:i + 1], cutoff / RATE) for i, cutoff in enumerate(cutoffs)])
        agree(f"{'high' if high else 'low'}-pass", Filter(sample_rate=RATE).transform(wave, params), expected, 1e-5)
    for ms in (200, 250, 450):
        echo = package.Delay(sample_rate=RATE, min_delay=ms, max_delay=ms + 1)
        agree("delay", Delay(sample_rate=RATE).transform(wave, {"delay_ms": torch.full((4,), float(ms)).double()}), echo(wave), 1e-6)
    if not sox: return
    import augment
    names, rooms = ("reverberance", "damping", "room_size"), torch.tensor([[0, 0, 0], [50, 50, 50], [99, 10, 99], [80, 99, 20]])
    chains = [augment.EffectChain().reverb(*room).channels(1) for room in rooms.tolist()]
    mono = {"src_info": {"rate": RATE}, "target_info": {"channels": 1, "rate": RATE}}
    expected = torch.cat([chain.apply(wave[i:i + 1], **mono) for i, chain in enumerate(chains)])
    agree("reverb", Reverb(sample_rate=RATE).transform(wave, dict(zip(names, rooms.T.double()))), expected, 1e-4)


def in_tune() -> None:
    """Tones land within a cent of where they should, and the clip stays as long as it was."""
    cents, n = torch.tensor([-700, -300, 0, 100, 300, 700]), 1 << 19
    tone = torch.sin(2 * math.pi * 440 / RATE * torch.arange(VIEW))[None].repeat(len(cents), 1)
    found = PitchShift().transform(tone, {"cents": cents})
    if found.shape != tone.shape: raise Disagreement(f"pitch: {found.shape[1]} samples, wanted {VIEW}")
    peak = torch.fft.rfft(found[:, 8192:40960] * torch.hann_window(32768), n).abs().argmax(dim=1)
    away = (1200 * torch.log2(peak * RATE / n / 440) - cents).abs().max()
    if not away <= 1: raise Disagreement(f"pitch: a tone is {away:.2f} cents away, wanted at most 1")


def noise(clips: int, samples: int) -> Tensor:
    """Clips of noise, (clips, T)."""
    return .1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(0))


# Rows

def chain(id: str, package: ModuleType, whole: bool, size: Size) -> list[Row]:
    """P1 and P2."""
    wave, own = noise(size.clips, CLIP), ours(whole)
    generator = torch.Generator().manual_seed(0)
    times = paired({"ours": lambda: clmr_views(wave, own, generator), "theirs": partial(each, theirs(package, whole), wave)}, size.rounds)
    speed = lambda name: f"{1e3 * median(times[name]) / 2 / size.clips:.2f}"
    name = f"{'whole chain' if whole else 'chain without pitch and reverb'}: torchaudio-augmentations{' with sox' if whole else ''} : ours"
    ratios = [a / b for a, b in zip(times["theirs"], times["ours"])]
    found = [row(id, name, ratios, at_least=1.5 if whole else 1.2, note=f"{speed('theirs')} and {speed('ours')} ms a view")]
    return found if whole else [*found, row(id, "the same, worst round", [min(ratios)], at_least=1.)]


def shift_peers(package: ModuleType | None, sox: bool, wave: Tensor) -> dict[str, tuple[Callable, float | None]]:
    """By name what shifts the pitch of all clips, and how many times as long as ours it should take."""
    by_300 = lambda wave: compat.torchaudio().functional.pitch_shift(wave, RATE, 300, bins_per_octave=1200)
    peers = {"torchaudio, one shift for all": (partial(by_300, wave), 2.5), "torchaudio, clip by clip": (partial(each, by_300, wave), 5.)}
    if sox: peers["sox"] = partial(each, package.PitchShift(n_samples=VIEW, sample_rate=RATE).process, wave), 1.
    try:
        from torch_audiomentations import PitchShift as Batched
        peers["torch-audiomentations"] = partial(Batched(-7, 7, p=1., sample_rate=RATE, output_type="dict"), wave[:, None]), 5.
    except ImportError as error: missing("torch-audiomentations", error)
    try:
        from audiomentations import PitchShift as Single
        single = Single(-7, 7, p=1.)
        peers["audiomentations"] = partial(each, lambda clip: single(clip[0].numpy(), sample_rate=RATE), wave), None
    except ImportError as error: missing("audiomentations", error)
    return peers


def pitch(package: ModuleType | None, sox: bool, size: Size) -> list[Row]:
    """P4."""
    in_tune()
    wave, shift, generator = noise(size.pitches, VIEW), PitchShift(), torch.Generator().manual_seed(0)
    peers = shift_peers(package, sox, wave)
    times = paired({"ours": lambda: shift(wave, generator), **{name: work for name, (work, _) in peers.items()}}, size.rounds)
    speed = lambda name: f"{1e3 * median(times[name]) / len(wave):.1f}"
    return [row("P4", f"pitch: {name} : ours", times[name], times["ours"], at_least=target, note=f"{speed(name)} and {speed('ours')} ms a clip")
            for name, (_, target) in peers.items()]


def training_step(wave: Tensor) -> Callable[[], None]:
    """A step of CLMR in bf16 whose views are only cropped."""
    objective, generator = CLMR(SampleCNN.preset("paper"), RandomCrop(VIEW)).to(wave.device), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(objective.parameters(), fused=True)
    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16): loss = objective(Batch(wave=wave, generator=generator))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def on_gpu(package: ModuleType | None, sox: bool, size: Size) -> list[Row]:
    """P3."""
    in_tune()
    wave, few, generator, own = noise(size.pairs, CLIP).cuda(), noise(8, CLIP), torch.Generator().manual_seed(0), ours(whole=True)
    _, drawn = own.augment(wave, draw_seeds(size.pairs, generator))
    alike = [name for name, value in drawn.items() if value.is_floating_point() and len(value.unique()) < 2]
    if alike: raise Disagreement(f"{alike[0]}: the same for all rows")
    candidates = {"ours": lambda: clmr_views(wave, own, generator), "step": training_step(wave)}
    if package: candidates["theirs"] = partial(each, theirs(package, whole=sox), few)
    times = paired(candidates, size.rounds)
    pairs = f"{size.pairs / median(times['ours']):,.0f} pairs/s"
    rows = [row("P3", "whole chain : a step in bf16", times["ours"], times["step"], at_most=.3, note=pairs)]
    if not package: return rows
    of_16, own_pair = [taken / len(few) / 16 for taken in times["theirs"]], [taken / size.pairs for taken in times["ours"]]
    name = f"whole chain: 16 cores of torchaudio-augmentations{'' if sox else ', which leaves out pitch and reverb,'} : ours"
    return [row("P3", name, of_16, own_pair, at_least=10., note=f"{1 / median(of_16):,.0f} and {pairs}, the cores by arithmetic"), *rows]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="full", help="within a minute")
    parser.add_argument("--size", choices=SIZES, help="test: to see that everything runs")
    parser.add_argument("--json", action="store_true", help="one object by target instead of the table")
    parser.add_argument("--only", nargs="+", choices=("P1", "P2", "P3", "P4"), help="default: P1, P2 and P4 on the CPU, P3 on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: P3")
    given = parser.parse_args(arguments)
    only, size, rows = given.only or (["P3"] if given.device == "cuda" else ["P1", "P2", "P4"]), SIZES[given.size], []
    torch.set_num_threads(1)
    if "P3" in only and not (given.device == "cuda" and torch.cuda.is_available()): only = [id for id in only if id != "P3"]
    if "P3" not in only: print("P3: skipped, it needs a GPU and --device cuda", file=sys.stderr)
    package, sox = official()
    if package: same_steps(package, sox)
    if "P1" in only and sox:
        in_tune()
        rows += chain("P1", package, True, size)
    if "P2" in only and package: rows += chain("P2", package, False, size)
    if "P3" in only: rows += on_gpu(package, sox, size)
    if "P4" in only: rows += pitch(package, sox, size)
    if given.json: print(as_json(rows))
    else: print(header("torchaudio-augmentations", "julius", "augment", "torch-audiomentations", "audiomentations"), table(rows), sep="\n")


if __name__ == "__main__": main()
