"""Loss curves of one objective in two precisions, compiled or not: as fast as they go, and how far apart they end."""
import time

import torch

from musicssl.audio import Batch
from musicssl.augment import clmr_chain
from musicssl.encoders.samplecnn import SampleCNN
from musicssl.objectives.clmr import CLMR
from musicssl.train import TrainConfig, fit


def curve(folder, preset, songs, steps, precision="32-true", seed=0, compile=False):
    """Losses per step, and clips per second over the second half; the corpus lies where the network is."""
    torch.manual_seed(seed)
    network = SampleCNN.preset(preset)
    objective = CLMR(network, clmr_chain(n_samples=network.n_samples, sample_rate=network.sample_rate))
    wave = torch.randn(4 * songs, 2 * network.n_samples, generator=torch.Generator().manual_seed(1)) * .1
    wave = (wave.cumsum(1) * torch.linspace(.001, .03, len(wave))[:, None]).sin()       # so that songs differ
    if torch.cuda.is_available(): wave = wave.cuda()
    rows = lambda number: torch.arange(number * songs, (number + 1) * songs, device=wave.device) % len(wave)
    config = TrainConfig(steps=steps, lr=3e-4, precision=precision, seed=seed, compile=compile, checkpoint_every=steps)
    history = fit(objective, lambda number: Batch(wave=wave[rows(number)]), config, folder, progress=False).history
    timed = history[steps // 2:]
    return [row["loss"] for row in history], sum(row["clips"] for row in timed) / sum(row["seconds"] for row in timed)


def distances(folder, preset, songs, steps, seeds=(0, 1, 2), tail=50):
    """Of the mean loss at the end: precisions apart (same seed, the largest), and seeds apart in float32 (the largest)."""
    ends = {(precision, seed): sum(curve(folder / f"{precision}-{seed}", preset, songs, steps, precision, seed)[0][-tail:]) / tail
            for precision in ("32-true", "bf16-mixed") for seed in seeds}
    full = [ends["32-true", seed] for seed in seeds]
    return max(abs(ends["bf16-mixed", seed] - ends["32-true", seed]) for seed in seeds), max(full) - min(full)
