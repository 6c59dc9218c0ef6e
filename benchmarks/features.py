"""Are pictures of sound cheap enough to be computed in a training step? Ours against what one would otherwise import.

    python benchmarks/features.py [--quick] [--json] [--only P5 P6 P7] [--device cuda]

P5  MERT's constant-Q target (336 bins, 75 frames/s) on one core: ours against both transforms of nnAudio, and librosa
P6  the same on a GPU (--device cuda): its share of MERT-95M's step, and its memory against the transform MERT uses
P7  log-mel and chroma of a batch on one core: ours against librosa, nnAudio and torchaudio

Everybody gets the same clips, a chorale of ScoreBox, tones and noise, and must agree before anything is timed. librosa knows no batches and takes
clip by clip. P6 meets two steps: one that is counted, 331 GFLOP a clip at the rate of a large bf16 product on the same GPU, which no step can be
faster than, and one that is run, in bf16, codes ready, of which the target is a part.
"""
import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from musicssl import compat
from musicssl.audio import Batch
from musicssl.data import scorebox
from musicssl.features.cqt import CQT, quality
from musicssl.features.mel import LogMel
from musicssl.features.spectral import ChromaSTFT
from musicssl.objectives.mert import MERTPretext
from paired import Disagreement, Row, as_json, header, paired, row, table

STEP = 331e9 # FLOP of a training step of MERT-95M, per clip of 5 s
RATE, HOP = 24_000, 320
SETTING = {"hop_length": HOP, "fmin": 32.7, "n_bins": 336, "bins_per_octave": 48, "pad_mode": "constant"}
# What a missing peer leaves unsaid.
LAST = {"nnAudio": "2026-11-21, it took 150 times (CQT1992v2) and 8 times (CQT2010v2) as long as ours in P5, and 4 times in P7"}


@dataclass(frozen=True)
class Size:
    """How much is measured."""
    rounds: int | None # None: as many as the rules ask for
    seconds: float # of a clip
    cqt_clips: int # in a round of P5
    clips: int # in a round of P7
    gpu_clips: int # in a call of P6
    mert: tuple[str, int] # preset, and clips in the step that P6 runs


SIZES = {"full": Size(None, 5., 2, 8, 64, ("95M", 64)), "quick": Size(3, 5., 1, 4, 16, ("95M", 16)), "test": Size(1, 1., 1, 2, 2, ("tiny", 2))}


def sounds(clips: int, seconds: float = 2.) -> torch.Tensor:
    """(clips, T): a chorale, forty tones that come and go, and noise, again and again."""
    rng, t = np.random.default_rng(0), np.arange(5 * RATE) / RATE
    tones = sum(np.sin(2 * np.pi * 440 * 2**(step / 12) * t + rng.uniform(0, 6)) * np.exp(-(t - rng.uniform(0, 5))**2 / .3)
                for step in rng.integers(-36, 24, 40))
    chorale = scorebox.load(10, 5., RATE, progress=False).wave([9])[0]
    kinds = chorale, torch.from_numpy(tones / np.abs(tones).max()).float(), torch.from_numpy(.1 * rng.standard_normal(len(t))).float()
    return torch.stack([kinds[number % 3][:round(seconds * RATE)] for number in range(clips)])


def agree(what: str, found: torch.Tensor, expected: torch.Tensor, most: float) -> None:
    """Clip by clip, the norm of the difference over the norm of what is expected."""
    found, expected = torch.as_tensor(found).cpu(), torch.as_tensor(expected).cpu()
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
    if not worst <= most: raise Disagreement(f"{what}: relative L2 {worst:.1e}, wanted at most {most:.0e}")


def peer(package: str, build: Callable) -> Callable | None:
    """What `build` imports and makes, or nothing where the package is missing."""
    try: return build()
    except ImportError as error:
        print(f"no rows for {package}: {error}; when last measured, {LAST[package]}", file=sys.stderr)
        return None


def each_clip(work: Callable, wave: torch.Tensor) -> torch.Tensor:
    """A function of librosa, for a batch."""
    return torch.from_numpy(np.stack([work(y=clip) for clip in wave.numpy()]))


def nnaudio_cqt(name: str) -> torch.nn.Module:
    import nnAudio.features.cqt
    return getattr(nnAudio.features.cqt, name)(sr=RATE, verbose=False, **SETTING)


def librosa_cqt(y: np.ndarray) -> np.ndarray:
    import librosa
    return np.abs(librosa.cqt(y, sr=RATE, tuning=0, **SETTING))


def compare(id: str, ours: str, works: dict[str, Callable], targets: dict[str, float], sound: float, rounds: int | None) -> list[Row]:
    """Rows of the others' times over ours."""
    times = paired(works, rounds)
    speed = lambda name: f"{sound / median(times[name]):,.0f}"
    return [row(id, f"{ours}: {name} : ours", taken, times["ours"], at_least=targets.get(name),
                note=f"{speed('ours')} and {speed(name)} s of sound per s") for name, taken in times.items() if name != "ours"]


def constant_q(size: Size) -> list[Row]:
    """P5."""
    wave, mert = sounds(size.cqt_clips, size.seconds), CQT.preset("mert")
    modules = peer("nnAudio", lambda: {name: nnaudio_cqt(name) for name in ("CQT1992v2", "CQT2010v2")}) or {}
    every = sounds(3)
    for name, module in modules.items(): agree(f"nnAudio {name}", mert(every), module(every), 2e-3 if name == "CQT1992v2" else 1e-2)
    agree("librosa", CQT.preset("mert", q=quality(48, both_sides=True))(every), each_clip(librosa_cqt, every), 1e-2)
    works = {"ours": partial(mert, wave), **{f"nnAudio {name}": partial(module, wave) for name, module in modules.items()},
             "librosa": partial(each_clip, librosa_cqt, wave)}
    return compare("P5", "MERT's target", works, {"nnAudio CQT1992v2": 12., "nnAudio CQT2010v2": 1.2}, size.seconds * len(wave), size.rounds)


def decibels(power: torch.Tensor) -> torch.Tensor:
    """As `LogMel` has it, for peers which give power."""
    level = 10 * power.clamp_min(1e-10).log10()
    return level.maximum(level.amax((-2, -1), keepdim=True) - 80)


MEL, CHROMA = {"n_fft": 1024, "hop_length": 240, "n_mels": 128}, {"n_fft": 2048, "hop_length": 320}


def librosa_mel(y: np.ndarray) -> np.ndarray:
    import librosa
    return librosa.power_to_db(librosa.feature.melspectrogram(y=y, sr=RATE, **MEL))


def librosa_chroma(y: np.ndarray) -> np.ndarray:
    import librosa
    return librosa.feature.chroma_stft(y=y, sr=RATE, tuning=0, **CHROMA)


def nnaudio_mel() -> Callable:
    from nnAudio.features.mel import MelSpectrogram
    module = MelSpectrogram(sr=RATE, pad_mode="constant", verbose=False, **MEL)
    return lambda wave: decibels(module(wave))


def torchaudio_mel() -> Callable:
    module = compat.torchaudio().transforms.MelSpectrogram(RATE, pad_mode="constant", norm="slaney", mel_scale="slaney", **MEL)
    return lambda wave: decibels(module(wave))


def mel_and_chroma(size: Size) -> list[Row]:
    """P7."""
    wave, log_mel, chroma = sounds(size.clips, size.seconds), LogMel(RATE, *MEL.values()), ChromaSTFT(RATE, *CHROMA.values())
    peers = {"librosa": (partial(each_clip, librosa_mel), 1e-5), "torchaudio": (torchaudio_mel(), 1e-5)}
    if other := peer("nnAudio", nnaudio_mel): peers["nnAudio"] = other, 1e-3
    for name, (work, most) in peers.items(): agree(f"log-mel of {name}", log_mel(wave), work(wave), most)
    agree("chroma of librosa", chroma(wave), each_clip(librosa_chroma, wave), 1e-5)
    works = {"ours": partial(log_mel, wave), **{name: partial(work, wave) for name, (work, _) in peers.items()}}
    rows = compare("P7", "log-mel", works, {"librosa": 1.5, "nnAudio": 3., "torchaudio": .95}, size.seconds * len(wave), size.rounds)
    works = {"ours": partial(chroma, wave), "librosa": partial(each_clip, librosa_chroma, wave)}
    return rows + compare("P7", "chroma", works, {"librosa": 1.5}, size.seconds * len(wave), size.rounds)


def peak_memory(module: torch.nn.Module, wave: torch.Tensor) -> int:
    """Bytes for the module's constants and everything between wave and answer."""
    module.to("cpu")
    before = torch.cuda.memory_allocated()
    module.to(wave.device)
    torch.cuda.reset_peak_memory_stats()
    module(wave)
    return torch.cuda.max_memory_allocated() - before


@torch.enable_grad()
def in_the_step(size: Size, device: str) -> Row:
    """MERT's step in bf16, forward, backward, Adam, and what it asks of the musical teacher, alone."""
    preset, clips = size.mert
    torch.manual_seed(0)
    objective = MERTPretext.preset(preset).to(device)
    samples, drawn = objective.encoder.n_samples, torch.Generator().manual_seed(0)
    codes = torch.randint(1024, (clips, samples // HOP, 8), generator=drawn)
    batch = Batch(wave=.1 * torch.randn(clips, samples, generator=drawn), codes=codes, seeds=torch.arange(clips)).to(device)
    ask, adam = partial(torch.no_grad()(objective.teachers.cqt), batch.wave), torch.optim.Adam(objective.parameters(), 1e-4)
    within = objective.listen(batch).spectrum.mT
    agree("the target in the step and alone", within, ask()[..., :within.shape[2]], 1e-6)
    def step() -> None:
        with torch.autocast(device, torch.bfloat16): loss = objective(batch)["loss"]
        loss.backward()
        adam.step()
        adam.zero_grad()
    times = paired({"step": step, "ours": ask}, size.rounds)
    each = lambda name: f"{1e6 * median(times[name]) / clips:,.1f}"
    return row("P6", f"ours : the step, run, {preset} on {device}, {clips} clips", times["ours"], times["step"], at_most=.02,
               note=f"{each('ours')} of {each('step')} µs a clip")


def on_gpu(size: Size) -> list[Row]:
    """P6."""
    wave, mert, old = sounds(size.gpu_clips, size.seconds).cuda(), CQT.preset("mert"), peer("nnAudio", partial(nnaudio_cqt, "CQT1992v2"))
    rows = []
    if old:
        agree("nnAudio CQT1992v2", mert.cuda()(wave[:3]), old.cuda()(wave[:3]), 2e-3)
        for clips in sorted({min(8, len(wave)), min(32, len(wave))}):
            peaks = [peak_memory(module, wave[:clips]) for module in (mert, old)]
            rows.append(row("P6", f"peak memory of {clips} clips: ours : nnAudio CQT1992v2", [peaks[0] / peaks[1]], at_most=.25,
                            note=f"{peaks[0] / 1e6:,.0f} : {peaks[1] / 1e6:,.0f} MB"))
    matrix, calls = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16), 10
    again = lambda work: [work() for _ in range(calls)]
    works = {"ours": partial(again, partial(mert.cuda(), wave)), "product": partial(again, lambda: matrix @ matrix)}
    if old: works["nnAudio CQT1992v2"] = partial(again, partial(old.cuda(), wave))
    times = paired(works, size.rounds)
    flop = STEP * len(wave) * size.seconds / 5
    steps = [calls * flop / (calls * 2 * 8192**3 / taken) for taken in times.pop("product")]    # s, as many steps as calls, at the product's rate
    rate = f"{calls * flop / median(steps) / 1e12:,.0f} TFLOP/s"
    clip = lambda taken: f"{1e6 * median(taken) / calls / len(wave):,.1f} µs a clip"
    rows += [row("P6", f"{name} : the step at {rate}", taken, steps, at_most=.02 if name == "ours" else None, note=clip(taken))
             for name, taken in times.items()]
    return [*rows, in_the_step(size, "cuda")]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="full", help="within a minute")
    parser.add_argument("--size", choices=SIZES, help="test: to see that everything runs")
    parser.add_argument("--json", action="store_true", help="one object by target instead of the table")
    parser.add_argument("--only", nargs="+", choices=("P5", "P6", "P7"), help="default: P5 and P7 on the CPU, P6 on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: P6")
    given = parser.parse_args(arguments)
    only, size, rows = given.only or (["P6"] if given.device == "cuda" else ["P5", "P7"]), SIZES[given.size], []
    torch.set_num_threads(1)
    if "P6" in only and not (given.device == "cuda" and torch.cuda.is_available()): only = [id for id in only if id != "P6"]
    if "P6" not in only: print("P6: skipped, it needs a GPU and --device cuda", file=sys.stderr)
    with torch.no_grad(), threadpool_limits(1):
        if "P5" in only: rows += constant_q(size)
        if "P7" in only: rows += mel_and_chroma(size)
        if "P6" in only: rows += on_gpu(size)
    if given.json: print(as_json(rows))
    else: print(header("nnAudio", "librosa", "torchaudio"), table(rows), sep="\n")


if __name__ == "__main__": main()
