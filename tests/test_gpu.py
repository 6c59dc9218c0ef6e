"""What only a GPU can show; `make gpu-check` runs this file. Each test fails, not skips, where there is no GPU."""
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from musicssl import evaluate
from musicssl.audio import Batch
from musicssl.augment import clmr_chain, clmr_views
from musicssl.data import loader as library
from musicssl.data.loader import Arrays, Loader
from musicssl.data.store import StoreWriter
from musicssl.encoders.mert import MERT
from musicssl.encoders.samplecnn import SampleCNN
from musicssl.experiments import clmr
from musicssl.features.cqt import CQT, ChromaCQT
from musicssl.features.frames import MusiCoderFrames
from musicssl.objectives.clmr import CLMR, nt_xent
from musicssl.objectives.mert import MERTPretext
from musicssl.objectives.multitask import MultiTask
from musicssl.objectives.musicoder import MusiCoder, hide
from musicssl.probe.frozen import read_features
from musicssl.probe.tasks import Sizes
from musicssl.train import TrainConfig, fit
from musicssl.zoo import load_encoder

sys.path.insert(0, str(Path(__file__).parent / "workers"))
import curves  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    assert torch.cuda.is_available(), "make gpu-check needs a GPU"
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def noise(rows: int, samples: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, samples, generator=torch.Generator().manual_seed(seed)) * .1


def test_loss_and_gradient_equal_the_cpu():
    found = {}
    for device in ("cpu", "cuda"):
        z = torch.randn(2, 96, 64, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        loss = nt_xent(z[0], z[1])
        loss.backward()
        found[device] = loss.detach().cpu(), z.grad.cpu()
    assert_close(found["cuda"], found["cpu"], atol=1e-6, rtol=1e-5)


def test_views_equal_the_cpu():
    wave, chain = noise(8, 70_000), clmr_chain()
    seeds = torch.arange(8)
    on_cpu, on_gpu = clmr_views(wave, chain, seeds=seeds), clmr_views(wave.cuda(), chain, seeds=seeds)
    for a, b in zip(on_cpu, on_gpu): assert_close(b.cpu(), a, atol=1e-5, rtol=1e-4)


def test_encoder_equals_the_cpu():
    encoder, wave = SampleCNN().eval(), noise(4, 59_049)
    with torch.no_grad():
        expected = encoder(wave).clip
        assert_close(encoder.cuda()(wave.cuda()).clip.cpu(), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["samplecnn:8k-quarter", "mfcc:8k", "chroma:8k"])
def test_frozen_features_equal_the_cpu(name):
    encoder, wave = load_encoder(name), noise(6, 40_000, 3)
    sounds = SimpleNamespace(sample_rate=8000, wave=lambda ids: wave[np.asarray(ids)])
    on_cpu, on_gpu = (read_features(encoder, sounds, np.arange(6), device=device, progress=False) for device in ("cpu", "cuda"))
    for part in ("layers", "clip"):
        assert_close(torch.tensor(getattr(on_gpu, part)), torch.tensor(getattr(on_cpu, part)), atol=1e-3, rtol=1e-3)


def test_evaluation_gives_the_scores_of_the_cpu():
    sizes = Sizes(clips=60, seconds=4., note_step=12, note_seconds=1.)
    found = {device: evaluate.evaluate(load_encoder("mfcc:8k"), "scorebox.tags, scorebox.excerpt, scorebox.beats", sizes, device=device, progress=False)
             for device in ("cpu", "cuda")}
    for one, other in zip(*found.values()): # features differ in the last bits, and a read-out can amplify that a little
        assert abs(one.scored().interval(10).mean - other.scored().interval(10).mean) < .1, one.task.id


def test_bf16_training_learns_and_says_how_fast(tmp_path, capsys):
    objective = CLMR(SampleCNN.preset("paper"), clmr_chain())
    pairs, steps = 256, 40
    wave = noise(pairs, 80_000).cuda()
    result = fit(objective, lambda step: Batch(wave=wave), TrainConfig(steps=steps, lr=3e-4, precision="bf16-mixed"), tmp_path)
    losses = [line["loss"] for line in result.history]
    assert losses[-1] < losses[0] and all(torch.isfinite(torch.tensor(losses)))

    views = noise(2 * pairs, 59_049).cuda()
    timed = []
    for repeat in range(12):
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16): z = objective.head(objective.encoder(views).clip)
        nt_xent(*z.chunk(2)).backward()
        torch.cuda.synchronize()
        timed.append(time.perf_counter() - began)
    copied = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10): copied.clone()
    torch.cuda.synchronize()
    bandwidth = 20 * copied.numel() / (time.perf_counter() - began)
    with capsys.disabled():
        print(f"\nencoder step, bf16: {pairs / min(timed[2:]):.0f} pairs/s; copy {bandwidth / 1e12:.2f} TB/s; "
              f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on {torch.cuda.get_device_name()}")


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_merts_network_and_gradient_equal_the_cpu(norm):
    """At the published width, three layers; hidden frames; an odd number of frames; then in bf16, near it."""
    torch.manual_seed(0)
    encoder, wave, found = MERT(n_layers=3, norm=norm).eval(), noise(4, 40_320), {}
    for device in ("cpu", "cuda"):
        encoder.to(device).zero_grad()
        features = encoder.front(wave.to(device))
        layers = encoder.encode(features, torch.arange(features.shape[1], device=device).expand(4, -1) % 3 == 0)
        (layers[:, -1] * torch.linspace(-1, 1, 768, device=device)).mean().backward()
        found[device] = layers.detach().cpu(), [weights.grad.cpu() for weights in encoder.parameters()]
    assert found["cpu"][0].shape[2] % 2
    assert_close(found["cuda"][0], found["cpu"][0], atol=1e-4, rtol=1e-3)
    for (name, _), on_gpu, on_cpu in zip(encoder.named_parameters(), found["cuda"][1], found["cpu"][1]):
        assert (on_gpu - on_cpu).norm() <= 1e-3 * on_cpu.norm() + 1e-8, name
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16): rough = encoder.encode(encoder.front(wave.cuda()))
    with torch.no_grad(): exact = encoder.encode(encoder.front(wave.cuda()))
    assert 0 < (rough - exact).abs().mean() < .05 * exact.std()


def test_merts_objective_pays_on_the_gpu_what_it_pays_on_the_cpu():
    """Mixture, masks and both teachers; masks and what is heard are the same, bit by bit."""
    torch.manual_seed(0)
    encoder = MERT.preset("tiny", dropout=0., attention_dropout=0., layerdrop=0.)
    objective = MERTPretext.preset("tiny", encoder=encoder, sizes=(16, 16))
    codes = torch.randint(16, (6, 192, 2), generator=torch.Generator().manual_seed(0))
    batch, found = Batch(wave=noise(6, 61_440), codes=codes, seeds=torch.arange(6)), {}
    for device in ("cpu", "cuda"):
        objective.to(device)
        heard, parts = objective.listen(batch.to(device)), objective(batch.to(device))
        found[device] = heard.wave.cpu(), heard.mask.cpu(), {name: parts[name].cpu() for name in ("loss", "code_loss", "cqt_loss", "penalty", "masked")}
    for on_gpu, on_cpu in zip(found["cuda"][:2], found["cpu"][:2]): assert torch.equal(on_gpu, on_cpu)
    assert_close(found["cuda"][2], found["cpu"][2], atol=1e-4, rtol=1e-4)


def test_musicoders_masks_equal_the_cpu():
    frames, n_frames, columns = noise(6, 200 * 324).view(6, 200, 324), torch.full((6,), 200), MusiCoderFrames.preset("8k").columns
    on_cpu, on_gpu = (hide(frames.to(device), n_frames.to(device), torch.arange(6), columns) for device in ("cpu", "cuda"))
    for name in ("shown", "frames", "channels"): assert_close(getattr(on_gpu, name).cpu(), getattr(on_cpu, name), atol=0, rtol=0)


def test_musicoder_base_in_bf16_learns_and_says_how_fast(tmp_path, capsys):
    wave = noise(32, 220_500).cuda() # 10 s at 22,050 Hz
    result = fit(MusiCoder.preset("base"), lambda step: Batch(wave=wave), TrainConfig(steps=40, lr=2e-4, precision="bf16-mixed"), tmp_path, measure=True)
    losses = [row["loss"] for row in result.history]
    assert losses[-1] < losses[0] and all(torch.isfinite(torch.tensor(losses)))
    shares = [row["matrix_share"] for row in result.history[10:]]
    with capsys.disabled(): print(f"\nMusiCoder base, bf16: {np.median(shares):.0%} of the matrix limit on {torch.cuda.get_device_name()}")


@pytest.mark.parametrize("weighting", ["sum", "uncertainty", "mgda"])
def test_every_worker_pays_on_the_gpu_what_it_pays_on_the_cpu(weighting):
    """Targets within the step, on the device; losses and weights alike."""
    objective = MultiTask.preset("quarter", workers="every", weighting=weighting)
    batch = Batch(wave=noise(4, 64_000), ids=torch.arange(4), seeds=torch.arange(4))
    objective.fit_targets([batch])
    expected = objective(batch)
    found = objective.cuda()(batch.to("cuda"))
    assert all(value.is_cuda for value in found.values())
    for name, value in expected.items(): assert_close(found[name].cpu(), value, atol=1e-3, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("arm", clmr.ARMS)
def test_every_arm_of_the_chapter_runs(arm, tmp_path):
    config = next(config for config in clmr.grid("test") if config["arm"] == arm)
    if "precision" in config: config["precision"] = "bf16-mixed"
    metrics, arrays = clmr.run(config, tmp_path)
    for name in (name for name in arrays if "@" in name): assert 0 <= metrics[name]["pr_auc"] <= 1
    assert sum("@" in name for name in arrays) >= 1


@pytest.mark.parametrize("build", [lambda: CQT.preset("mert"), lambda: ChromaCQT(24_000, 320)], ids=["CQT", "ChromaCQT"])
def test_constant_q_equals_the_cpu_and_waits_for_nothing(build):
    module, wave = build(), noise(4, 120_000)
    expected = module(wave)
    module, wave = module.cuda(), wave.cuda()
    module(wave)                                             # plans and handles are made at the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16): found = module(wave)
    finally: torch.cuda.set_sync_debug_mode("default")
    assert found.is_cuda and found.dtype == torch.float32
    assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-3)


def test_constant_q_needs_a_quarter_of_nnaudios_memory():
    """P6, at 8 clips of 5 s: weights and everything in between."""
    from nnAudio.features.cqt import CQT1992v2
    wave, peaks = noise(8, 120_000).cuda(), []
    for build in (lambda: CQT.preset("mert"),
                  lambda: CQT1992v2(24_000, 320, 32.7, n_bins=336, bins_per_octave=48, pad_mode="constant", verbose=False)):
        before = torch.cuda.memory_allocated()
        module = build().cuda()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad(): module(wave)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del module
    assert peaks[0] <= peaks[1] / 4, f"peak: {peaks[0] / 1e6:.0f} MB, nnAudio {peaks[1] / 1e6:.0f} MB"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """192 clips of noise, 6 s each."""
    writer = StoreWriter(tmp_path_factory.mktemp("store"), n=192, n_samples=6 * 22_050, sample_rate=22_050)
    for chunk in writer.missing():
        writer.write(chunk, np.random.default_rng(chunk).integers(-9000, 9000, (len(writer.rows(chunk)), 6 * 22_050), dtype=np.int16))
    return writer.finish()


def test_a_resident_corpus_gives_the_bits_of_the_memmap(store):
    read, *resident = [Loader(store, batch_size=48, crop=59_049, resident=where) for where in (None, "cuda", "auto")]
    for loader in resident:
        assert all(loader(number).wave.is_cuda and torch.equal(loader(number).wave.cpu(), read(number).wave) for number in range(12))
    ragged = [np.full(length, .5, np.float32) for length in (500, 90, 400)]
    padded = [Loader(ragged, batch_size=1, crop=300, short="pad", resident=where) for where in (None, "cuda")]
    assert all(torch.equal(padded[0](number).wave, padded[1](number).wave.cpu()) for number in range(3))


def test_a_row_of_more_than_two_to_the_31_samples():
    clip = np.zeros(1_200_000_000, np.int16)
    clip[-1000:] = np.arange(1000)
    loader = Loader(Arrays([clip, clip]), batch_size=2, crop=1000, resident="cuda")
    job = library._Job(0, [1, 0], [len(clip) - 1000, len(clip) - 1000], [1000, 1000], 1000)
    assert torch.equal(loader._reader(lambda *key: job, 0).cpu(), (torch.arange(1000.) / 32768).expand(2, -1))


def test_what_does_not_fit_is_refused(store, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50_000_000, 2**37))
    with pytest.raises(MemoryError, match="192 clips take 50,803,200 bytes, 50,000,000 are free on cuda"): Loader(store, batch_size=48, resident="cuda")
    assert isinstance(Loader(store, batch_size=48, resident="auto")._reader, library._Now)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_wait_in_pinned_memory(store, workers):
    loader = Loader(store, batch_size=48, crop=59_049, workers=workers)
    assert loader(0).wave.is_pinned() and torch.equal(loader(1).to("cuda").wave.cpu(), Loader(store, batch_size=48, crop=59_049)(1).wave)
    loader.close()


@pytest.mark.parametrize("path", [{"resident": "cuda"}, {"workers": 4}], ids=str)
def test_the_network_hardly_waits(store, path, capsys):
    """P17: steps fed by the loader against the same steps with one batch that lies on the GPU; median of seven paired rounds."""
    objective = CLMR(SampleCNN.preset("paper"), clmr_chain()).cuda()
    optimizer = torch.optim.Adam(objective.parameters())
    loader, number = Loader(store, batch_size=48, crop=60_000, **path), iter(range(10_000))
    still = loader(0).to("cuda").wave
    def seconds(wave_of):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(20):
            with torch.autocast("cuda", torch.bfloat16): loss = objective(Batch(wave=wave_of(), generator=torch.Generator().manual_seed(0)))["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    def alone(): return seconds(lambda: still)
    def fed(): return seconds(lambda: loader(next(number)).to("cuda").wave)
    alone(), fed()
    rounds = [fed() / alone() for _ in range(7)]
    loader.close()
    with capsys.disabled():
        print(f"\nloader {path}: {100 * (np.median(rounds) - 1):.1f} % of a step ({100 * (min(rounds) - 1):.1f} to {100 * (max(rounds) - 1):.1f}), "
              f"step {1000 * alone() / 20:.1f} ms")
    assert np.median(rounds) <= 1.05


def test_bf16_follows_float32(tmp_path, capsys):
    """Over 200 steps, three seeds: precisions end no further apart than seeds do."""
    precisions, seeds = curves.distances(tmp_path, "paper", 64, 200)
    with capsys.disabled(): print(f"\nmean loss of the last 50 of 200 steps: bf16 from float32 {precisions:.4f}, seed from seed {seeds:.4f}")
    assert precisions <= seeds


def test_compiled_training_learns_the_same(tmp_path, capsys):
    found = {compiled: curves.curve(tmp_path / str(compiled), "paper", 128, 60, "bf16-mixed", compile=compiled) for compiled in (False, True)}
    with capsys.disabled(): print(f"\nbf16, 128 pairs: {found[False][1]:,.0f} clips/s eager, {found[True][1]:,.0f} compiled")
    ends = [np.mean(losses[-20:]) for losses, _ in found.values()]
    assert abs(ends[0] - ends[1]) < .1 * ends[0]
