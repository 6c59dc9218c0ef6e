"""Does a training step waste time or memory? The loss, SampleCNN's step, heads and checkpoints, against what one would otherwise write.

    python benchmarks/train.py [--quick] [--json] [--only P8 MT P11 P13 P14 P15 P22] [--device cuda]

P8   CLMR's step on one core against the official modules: convolution, batch norm, ReLU, pooling, two passes, the same weights
P9   the same in bf16 on a GPU (--device cuda), views resident: its share of what the memory's speed allows, and against the official modules in fp32
P11  MERT's step at 95M in bf16 on a GPU (--device cuda), all teachers asked, codes ready: its share of the speed of a large matrix product
P12  the same at 330M
MT   targets of the multi-task workers, measured inside the step: their share of it, in all and one by one; with --device cuda the encoder is as
     large as PASE's and the step runs in bf16
P13  heads on masked frames only against heads on all frames, of which the loss then takes the masked ones, on random frames: both of MERT-95M's
     with their prices, masked as in batches of sixteen, and of MusiCoder's the head alone, a plain one of the size in the paper
P14  MusiCoder's encoder, four layers of 768, forward on one core: fused attention against the formula of attention written out
P15  NT-Xent with its gradient, on one core, against the loss CLMR's code calls and against one masked matrix
P22  a checkpoint against torch.save of the same tensors: time, memory beyond the state, share of training time at the default interval

CLMR's code takes its loss from the package simclr; without it, the same formula written out stands in. It is nobody's dependency:

    pip install --no-deps simclr==1.0.2

Memory of tensors is what PyTorch's profiler counts, peak over a call; memory of a process is what it holds at most beyond what it held before,
in a process of its own. Nothing is timed before losses, gradients and what was read back have been compared.
"""
import argparse
import copy
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musicssl.audio import Batch
from musicssl.checkpoint import full_state, load_checkpoint, save_checkpoint
from musicssl.devices import largest_batch
from musicssl.encoders.frames import FrameTransformer
from musicssl.encoders.samplecnn import SampleCNN
from musicssl.features.targets import Targets
from musicssl.encoders.transformer import attend
from musicssl.meter import copy_limit, flops, matrix_limit
from musicssl.objectives.clmr import CLMR, nt_xent
from musicssl.objectives.mert import Heard, MERTPretext, level, span_mask
from musicssl.objectives.multitask import MultiTask
from musicssl.train import TrainConfig
from paired import Disagreement, Row, as_json, header, paired, row, seconds, table

os.environ.setdefault("KINETO_LOG_LEVEL", "99") # a profiler that keeps quiet
TAU, WIDTH = .5, 64 # CLMR's temperature and width of embeddings
PASSES = 10 # over the activations, forward and backward, that a step of SampleCNN cannot do without
# What a missing peer leaves unsaid.
LAST = {"simclr": "2026-11-21, its loss took as long as the formula written out, and as much memory"}


@dataclass(frozen=True)
class Size:
    """How much is measured."""
    rounds: int | None # None: as many as the rules ask for
    encoder: str # preset of P8 and P9
    pairs: int # in a step of P8
    gpu_pairs: int # in a step of P9
    frames: tuple[int, int] # clips and frames of each in P13
    encoders: str # preset of P14
    losses: tuple[int, int, int] # pairs in P15
    state: int # MB of tensors in P22, about
    step: tuple[str, int] # preset and pairs of the step that P22's interval is counted in
    children: int # processes whose memory is measured in P22
    workers: tuple[str, int] # preset and clips of MT
    gpu_workers: tuple[str, int] # the same on a GPU
    merts: dict[str, tuple[str, int]] # preset of P11 and P12, and clips in a step at most


SIZES = {"full": Size(None, "paper", 4, 256, (4, 374), "base", (512, 2048, 4096), 256, ("8k-quarter", 48), 3,
                     ("quarter", 16), ("pase", 32), {"P11": ("95M", 128), "P12": ("330M", 64)}),
         "quick": Size(3, "paper", 2, 256, (2, 374), "base", (512, 2048, 4096), 128, ("8k-quarter", 48), 1,
                      ("quarter", 8), ("pase", 32), {"P11": ("95M", 128), "P12": ("330M", 64)}),
         "test": Size(1, "toy", 2, 2, (2, 20), "tiny", (16, 520, 1040), 12, ("toy", 2), 1,
                     ("tiny", 2), ("tiny", 2), {"P11": ("tiny", 2), "P12": ("tiny", 3)})}


def random(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


# Agreement, and memory

def agree(what: str, found: list[Tensor], expected: list[Tensor], loss: float, gradient: float = 1e-5) -> None:
    """Loss first, then gradients, if any: the norm of the difference over the norm expected, all gradients taken together."""
    joined = lambda tensors: torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    for name, a, b, most in (("loss", found[:1], expected[:1], loss), ("gradient", found[1:], expected[1:], gradient)):
        if not a: continue
        off = float((joined(a) - joined(b)).norm() / joined(b).norm())
        if not off <= most: raise Disagreement(f"{what}: the {name} is {off:.1e} away, wanted at most {most:.0e}")


def with_gradient(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def peak_of_tensors(work: Callable[[], object]) -> int:
    """Bytes that a call holds at most on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile: work()
    events, held, most = profile.profiler.kineto_results.events(), 0, 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        held += change
        most = max(most, held)
    return most


# P15: the loss

def written_out(z_i: Tensor, z_j: Tensor) -> Tensor:
    """The simclr package's loss: the cosine of all pairs by broadcasting (2N, 2N, D), the partner's first, everybody else's behind it."""
    z, n = torch.cat([z_i, z_j]), len(z_i)
    scores = F.cosine_similarity(z[:, None], z[None], dim=2) / TAU
    partner = torch.arange(2 * n).roll(n)
    others = torch.ones(2 * n, 2 * n, dtype=torch.bool).fill_diagonal_(False)
    others[torch.arange(2 * n), partner] = False
    scores = torch.cat([scores.gather(1, partner[:, None]), scores[others].view(2 * n, -1)], dim=1)
    return F.cross_entropy(scores, torch.zeros(2 * n, dtype=torch.long))


def masked(z_i: Tensor, z_j: Tensor) -> Tensor:
    """One matrix whose diagonal a mask takes out."""
    z, row = F.normalize(torch.cat([z_i, z_j]), dim=1), torch.arange(2 * len(z_i))
    partner = row.roll(len(z_i))
    scores = (z @ z.T / TAU)[~torch.eye(len(z), dtype=torch.bool)].view(len(z), -1)
    return F.cross_entropy(scores, partner - (partner > row).long())


def package_loss(pairs: int) -> tuple[str, Callable[[Tensor, Tensor], Tensor]]:
    """The loss that CLMR's code calls, by name; the package's other modules, which want torchvision, stay unread."""
    if "simclr" not in sys.modules and (spec := find_spec("simclr")):
        for name, inner in (("simclr", ""), ("simclr.modules", "modules")):
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [str(Path(folder, inner)) for folder in spec.submodule_search_locations]
    try: from simclr.modules.nt_xent import NT_Xent
    except ImportError as error:
        print(f"the formula stands in for simclr: {error}; when last measured, {LAST['simclr']}", file=sys.stderr)
        return "simclr 1.0.2's loss, written out", written_out
    return "the package simclr", NT_Xent(pairs, TAU, 1)


def loss_costs(works: dict[str, Callable], rounds: int | None) -> tuple[dict[str, list], dict[str, list]]:
    """Seconds and peak bytes by name; memory needs no rounds, being the same in each."""
    return paired(works, rounds), {name: [peak_of_tensors(work)] for name, work in works.items()}


def losses(size: Size) -> list[Row]:
    """P15."""
    few, many, twice = size.losses
    name, theirs = package_loss(few)
    rows, ours = [], partial(nt_xent, temperature=TAU)
    for pairs, peer, loss, faster, memory in ((few, name, theirs, 100., 1 / 40), (many, "one masked matrix", masked, 3., 1 / 6)):
        z = random(2, pairs, WIDTH).requires_grad_()
        found, expected = (with_gradient(work(*z), z) for work in (ours, loss))
        agree(f"NT-Xent of {pairs} pairs, against {peer}", found, expected, 1e-6)
        works = {which: lambda work=work: with_gradient(work(*z), z) for which, work in (("ours", ours), ("theirs", loss))}
        times, peaks = loss_costs(works, size.rounds)
        said = f"{1e3 * median(times['theirs']):,.1f} and {1e3 * median(times['ours']):,.1f} ms"
        held = f"{peaks['theirs'][0] / 2**20:,.1f} and {peaks['ours'][0] / 2**20:,.1f} MiB"
        rows += [row("P15", f"{pairs:,} pairs, time: {peer} : ours", times["theirs"], times["ours"], at_least=faster, note=said),
                 row("P15", f"{pairs:,} pairs, peak memory: ours : {peer}", peaks["ours"], peaks["theirs"], at_most=memory, note=held)]
    z = random(2, twice, WIDTH).requires_grad_()
    more = [peak_of_tensors(lambda: with_gradient(ours(*z), z))]
    return [*rows, row("P15", f"peak memory: {twice:,} pairs : {many:,} pairs", more, peaks["ours"], at_most=2.3)]


# P8 and P9: SampleCNN's step

class Official(nn.Module):
    """The layers of CLMR's official SampleCNN, in their order and with their biases, in the sizes and with the weights of one of ours."""

    def __init__(self, ours: CLMR):
        super().__init__()
        layers = []
        for number, (convolution, *_) in enumerate(ours.encoder.blocks):
            inputs, outputs, kernel = convolution.in_channels, convolution.out_channels, convolution.kernel_size[0]
            edge = dict(stride=kernel, padding=0) if number == 0 else dict(stride=1, padding=1)
            layers += [nn.Conv1d(inputs, outputs, kernel, **edge), nn.BatchNorm1d(outputs), nn.ReLU()]
            if 0 < number < 10: layers.append(nn.MaxPool1d(kernel, stride=kernel))
        self.layers, self.head = nn.Sequential(*layers), copy.deepcopy(ours.head)
        for theirs, weights in zip(self.layers.parameters(), ours.encoder.parameters(), strict=True): theirs.data.copy_(weights)

    def project(self, wave: Tensor) -> Tensor: return self.head(self.layers(wave[:, None]).flatten(1))


def loss_of(module: nn.Module, loss: Callable, views: Tensor, half: bool = False) -> Tensor:
    """Two passes, views (2, N, T)."""
    with torch.autocast(views.device.type, torch.bfloat16) if half else nullcontext():
        return loss(module.project(views[0]), module.project(views[1]))


def step(module: nn.Module, loss: Callable, views: Tensor, half: bool = False) -> Callable[[], None]:
    """Calls of a training step: loss, gradient, Adam."""
    adam = torch.optim.Adam(module.parameters(), 3e-4)
    def play() -> None:
        loss_of(module, loss, views, half).backward()
        adam.step()
        adam.zero_grad()
    return play


def both(encoder: str, pairs: int, device: str = "cpu") -> tuple[CLMR, Official, Tensor]:
    """Our objective, the official modules with the same weights, and views (2, N, T) of noise."""
    torch.manual_seed(0)
    ours = CLMR.preset("paper", encoder=encoder)
    return ours.to(device), Official(ours).to(device), .1 * random(2, pairs, ours.encoder.n_samples, device=device)


def same_step(ours: CLMR, official: Official, views: Tensor, theirs: Callable) -> None:
    found, expected = (with_gradient(loss_of(module, loss, views), *module.parameters()) for module, loss in ((ours, nt_xent), (official, theirs)))
    agree("SimCLR step of SampleCNN", found, expected, 1e-5)


def samplecnn(size: Size) -> list[Row]:
    """P8."""
    (ours, official, views), (_, theirs) = both(size.encoder, size.pairs), package_loss(size.pairs)
    same_step(ours, official, views, theirs)
    times = paired({"ours": step(ours, nt_xent, views), "theirs": step(official, theirs, views)}, size.rounds)
    speed = lambda name: f"{median(times[name]) / size.pairs:.2f}"
    return [row("P8", f"step of {size.pairs} pairs: official modules : ours", times["theirs"], times["ours"], at_least=.95,
                note=f"{speed('theirs')} and {speed('ours')} s a pair; 1.3 would be a stretch")]


def bytes_per_pair(encoder: SampleCNN) -> int:
    """What the convolutions of two views put out, in bf16."""
    encoder, found = copy.deepcopy(encoder).cpu().eval(), []
    for block in encoder.blocks: block[0].register_forward_hook(lambda module, given, out: found.append(2 * 2 * out.numel()))
    with torch.no_grad(): encoder(torch.zeros(1, encoder.n_samples))
    return sum(found)


def on_gpu(size: Size, device: str) -> list[Row]:
    """P9."""
    (ours, official, views), theirs = both(size.encoder, size.gpu_pairs, device), nt_xent
    same_step(*both(size.encoder, 2), theirs)
    half, whole = (loss_of(ours, nt_xent, views, half).detach() for half in (True, False))
    agree("SimCLR step in bf16", [half], [whole], .05) # whether training minds is an experiment's question
    works = {"ours": step(ours, nt_xent, views, half=True), "theirs": step(official, theirs, views)}
    copying = lambda work: (seconds(work), copy_limit(device))
    taken = paired(works, size.rounds, measure=copying)
    times = {which: [took for took, _ in figures] for which, figures in taken.items()}
    pace = [size.gpu_pairs / took for took in times["ours"]]
    limit = [speed / PASSES / bytes_per_pair(ours.encoder) for _, speed in taken["ours"]]
    speed = median(speed for _, speed in taken["ours"]) / 1e9
    said = f"{median(pace):,.0f} of {median(limit):,.0f} pairs/s; {speed:,.0f} GB/s"
    name = f"step of {size.gpu_pairs} pairs in bf16 on {device}"
    return [row("P9", f"{name}: pairs/s : limit of {PASSES} passes over the activations", pace, limit, at_least=.25, note=said),
            row("P9", f"{name}: official modules in fp32, as PyTorch comes, : ours", times["theirs"], times["ours"], at_least=2.)]


# P11 and P12: MERT's step

def with_codes(objective: MERTPretext, clips: int, device: str) -> Batch:
    """Noise, and what eight codebooks of 1,024 would say of it."""
    encoder, drawn = objective.encoder, torch.Generator().manual_seed(0)
    codes = torch.randint(1024, (clips, encoder.n_samples // encoder.hop, 8), generator=drawn)
    return Batch(wave=.1 * random(clips, encoder.n_samples), codes=codes, seeds=torch.arange(clips)).to(device)


def mert(id: str, least: float, size: Size, device: str) -> list[Row]:
    """P11 or P12."""
    (preset, most), half = size.merts[id], partial(torch.autocast, device, torch.bfloat16)
    torch.manual_seed(0)
    objective = MERTPretext.preset(preset, sizes=(1024,) * 8).to(device).eval()
    few = with_codes(objective, 2, device)
    with torch.no_grad():
        with half(): rough = objective(few)["loss"]
        agree(f"MERT's loss at {preset} in bf16", [rough], [objective(few)["loss"]], .05)
    objective.train()
    clips = largest_batch(lambda clips: workers_step(objective, with_codes(objective, clips, device))(), most)
    batch = with_codes(objective, clips, device)
    counted, limit = flops(objective, batch), matrix_limit(device, torch.bfloat16)
    times = paired({"ours": workers_step(objective, batch)}, size.rounds)["ours"]
    pace, seconds_of_clip = [clips / took for took in times], objective.encoder.n_samples / objective.encoder.sample_rate
    said = f"{median(pace):,.0f} of {clips * limit / counted:,.0f} clips/s; {limit / 1e12:,.1f} TFLOP/s, {counted / clips / 1e9:,.0f} GFLOP a clip"
    return [row(id, f"MERT {preset} on {device}, {clips} clips of {seconds_of_clip:.2f} s, bf16: arithmetic of the step : the limit of matrix products",
                [counted / took / limit for took in times], at_least=least, note=said)]


# MT: targets

def workers_step(objective: MultiTask, batch: Batch) -> Callable[[], None]:
    """Calls of a training step: windows, targets, encoder, heads, gradient, Adam."""
    adam = torch.optim.Adam(objective.parameters(), 3e-4)
    def play() -> None:
        with torch.autocast(batch.wave.device.type, torch.bfloat16, enabled=batch.wave.is_cuda): loss = objective(batch)["loss"]
        loss.backward()
        adam.step()
        adam.zero_grad()
    return play


def measured_alone(objective: MultiTask, batch: Batch) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """Calls that measure the targets of one step: all together as the step does, and one by one; they have been compared."""
    heard, ours = objective.listen(batch), objective.targets
    works = {"all": lambda: ours(heard.clean)}
    for name, found in heard.targets.items():
        if found.device != batch.wave.device: raise Disagreement(f"{name} is measured on {found.device}, the step is on {batch.wave.device}")
        one = Targets([name], ours.sample_rate, ours.hop, ours.stack).to(batch.wave.device)
        one.levels[name] = ours.levels[name]
        near(f"{name} in the step and alone", found, one(heard.clean)[name])
        works[name] = lambda one=one: one(heard.clean)
    return works


def multitask(size: Size, device: str) -> list[Row]:
    """MT."""
    rows, (encoder, clips) = [], size.gpu_workers if device == "cuda" else size.workers
    wave = .1 * random(clips, 40_000, device=device)
    for group in ("all", "every"):
        torch.manual_seed(0)
        objective, batch = MultiTask.preset(encoder, workers=group).to(device), Batch(wave=wave, seeds=torch.arange(clips))
        objective.fit_targets([batch])
        works = measured_alone(objective, batch)
        times = paired({"step": workers_step(objective, batch), **works}, size.rounds)
        said = lambda name: f"{1e3 * median(times[name]) / clips:,.2f} ms a clip of {objective.chunk / objective.encoder.sample_rate:.0f} s"
        what = f"{encoder} on {device}, {clips} clips, workers '{group}': targets : step"
        rows.append(row("MT", what, times["all"], times["step"], note=f"{said('all')}, the step {said('step')}"))
        each = list(works)[1:] if group == "every" else []
        rows += [row("MT", f"{name} alone : the same step", times[name], times["step"], note=said(name)) for name in each]
    return rows


# P13: heads

@dataclass(frozen=True)
class Head:
    """What turns frames (B, N, 768) into what a masked frame is compared with."""
    name: str
    module: nn.Module
    masked: float # share of the frames
    loss: Callable[[Tensor, Tensor], Tensor]
    targets: Callable[[int], Tensor] # of so many frames


def heads() -> list[Head]:
    """MusiCoder, base: 324 bins, 15 % masked."""
    torch.manual_seed(0)
    bins = nn.Sequential(nn.Linear(768, 768), nn.GELU(), nn.LayerNorm(768), nn.Linear(768, 324))
    return [Head("MusiCoder's bins, the head alone", bins, .15, F.huber_loss, lambda frames: random(frames, 324))]


def compare_heads(name: str, share: str, works: dict[str, Callable], logits: dict[str, int], rounds: int | None) -> list[Row]:
    """Rows of two calls, "masked" and "all", that give a loss and its gradients; and of the bytes of what they predict."""
    agree(name, works["masked"](), works["all"](), 1e-5)
    times, peaks = loss_costs(works, rounds)
    return [row("P13", f"{name}, logits: masked : all", [logits["masked"]], [logits["all"]], at_most=.55, note=share),
            row("P13", f"{name}, peak memory of the pass: masked : all", peaks["masked"], peaks["all"]),
            row("P13", f"{name}, time: all : masked", times["all"], times["masked"], at_least=.97)]


def mert_heads(size: Size) -> list[Row]:
    """Both heads of MERT-95M and their prices, behind whatever encoder: eight codebooks of 1,024 and four more rows, 336 bins."""
    torch.manual_seed(0)
    objective = MERTPretext(SimpleNamespace(dim=768, sample_rate=24_000, hop=320))
    (clips, n), frames, sixteen = size.frames, random(*size.frames, 768).requires_grad_(), torch.arange(16)
    mask = level(span_mask(n, sixteen), sixteen)[:clips]
    at, codes = mask.flatten().nonzero()[:, 0], torch.randint(1024, (clips, n, 8), generator=torch.Generator().manual_seed(1))
    objective.listen = lambda batch: Heard(None, torch.zeros(1), mask, at, [torch.arange(len(at))] * 8, frames, codes, random(clips, n, 336))
    leaves = [frames, *(p for p in objective.parameters() if p.requires_grad)]
    def work(masked: bool) -> list[Tensor]:
        objective.masked_only = masked
        return with_gradient(objective(None)["loss"], *leaves)
    logits = {"masked": frames.flatten(0, 1)[at], "all": frames.flatten(0, 1)}
    nbytes = {name: sum(found.nbytes for found in objective.code_head(some)) for name, some in logits.items()}
    works = {"masked": partial(work, True), "all": partial(work, False)}
    return compare_heads("MERT's codes and notes", f"{mask.double().mean():.0%} masked", works, nbytes, size.rounds)


def masked_only(size: Size) -> list[Row]:
    """P13."""
    rows = []
    for head in heads():
        frames = random(*size.frames, 768).requires_grad_()
        total = frames.shape[0] * frames.shape[1]
        mask = (torch.randperm(total, generator=torch.Generator().manual_seed(0)) < round(head.masked * total)).view(size.frames)
        target, leaves = head.targets(total)[mask.flatten()], [frames, *head.module.parameters()]
        predict = {"masked": lambda: head.module(frames[mask]), "all": lambda: head.module(frames)}
        works = {"masked": lambda: with_gradient(head.loss(predict["masked"](), target), *leaves),
                 "all": lambda: with_gradient(head.loss(predict["all"]()[mask], target), *leaves)}
        logits = {name: work().nbytes for name, work in predict.items()}
        rows += compare_heads(head.name, f"{head.masked:.0%} masked", works, logits, size.rounds)
    return rows + mert_heads(size)


# P14: attention

CLIPS = {128: (8, .98), 512: (4, 1.15), 1500: (1, 1.3)} # frames of a clip: clips in a batch, and how much faster the target wants it


def written_out_in(encoder: FrameTransformer, frames: Tensor) -> Tensor:
    """The same network with the same weights, whose attention is the formula."""
    with patch.object(F, "scaled_dot_product_attention", lambda q, k, v, mask, dropout: attend(q, k, v, mask)): return encoder.encode(frames)


def near(what: str, found: Tensor, expected: Tensor) -> None:
    off = float((found - expected).abs().max())
    if not off <= 1e-5: raise Disagreement(f"{what}: a number is {off:.1e} away, wanted at most 1e-05")


@torch.no_grad()
def attention(size: Size) -> list[Row]:
    """P14."""
    torch.manual_seed(0)
    encoder, rows = FrameTransformer.preset(size.encoders).eval(), []
    for length, (clips, faster) in CLIPS.items():
        frames = random(clips, length, 324)
        near(f"{length} frames", encoder.encode(frames), written_out_in(encoder, frames))
        times = paired({"ours": lambda: encoder.encode(frames), "theirs": lambda: written_out_in(encoder, frames)}, size.rounds)
        said = f"{1e3 * median(times['theirs']) / clips:,.0f} and {1e3 * median(times['ours']) / clips:,.0f} ms a clip"
        rows.append(row("P14", f"{clips} x {length:,} frames: written out : fused", times["theirs"], times["ours"], at_least=faster, note=said))
    return rows


# P22: checkpoints

RUN = {"config": {"schedule": "constant"}} # what a checkpoint says it is of


def state(megabytes: int) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Weights and two moments of each: matrices of 4 MB, or one that is smaller."""
    matrix = lambda value: torch.full((1024, 1024) if megabytes >= 12 else (64, 1024), float(value))
    names = [f"layer.{number}" for number in range(max(megabytes // 12, 1))]
    return {name: matrix(1) for name in names}, {name: {"exp_avg": matrix(2), "exp_avg_sq": matrix(3)} for name in names}


def in_bytes(weights: dict[str, Tensor], moments: dict[str, dict]) -> int:
    return sum(tensor.nbytes for tensor in [*weights.values(), *(value for of in moments.values() for value in of.values())])


def savers(folder: Path, weights: dict[str, Tensor], moments: dict[str, dict]) -> dict[str, Callable[[], object]]:
    """Each call writes another step; one is kept."""
    steps = count(1)
    ours = lambda: save_checkpoint(folder, weights, moments, {**RUN, "step": next(steps)}, keep=1)
    theirs = lambda: torch.save({"weights": weights, "optimizer": moments, "state": {**RUN, "step": next(steps)}}, folder / "peer.pt")
    def synced() -> None:
        theirs()
        with open(folder / "peer.pt", "rb") as file: os.fsync(file.fileno())
    return {"ours": ours, "theirs": theirs, "synced": synced}


def same_again(path: Path, weights: dict[str, Tensor], moments: dict[str, dict]) -> None:
    """What is read back is what was written, bit by bit."""
    read, remembered, _ = load_checkpoint(path, {**RUN, "step": None})
    for what, found, wanted in (("weights", {"": read}, {"": weights}), ("moments", remembered, moments)):
        alike = found.keys() == wanted.keys() and all(found[of].keys() == wanted[of].keys() for of in wanted)
        if not alike or not all(torch.equal(found[of][name], wanted[of][name]) for of in wanted for name in wanted[of]):
            raise Disagreement(f"checkpoint: the {what} read back are not those written")


def held(name: str) -> int:
    """Bytes this process holds: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def beyond_the_state(which: str, megabytes: int) -> float:
    """What a process holds at most while it writes, beyond what it held before, as a share of the state."""
    with tempfile.TemporaryDirectory() as folder:
        savers(Path(folder), *state(1))[which]() # imports and buffers of a first time
        weights, moments = state(megabytes)
        before = held("VmRSS")
        Path("/proc/self/clear_refs").write_text("5") # VmHWM starts anew
        (Path(folder) / "large").mkdir()
        savers(Path(folder) / "large", weights, moments)[which]()
        return (held("VmHWM") - before) / in_bytes(weights, moments)


def in_a_child(which: str, size: Size) -> list[float]:
    """Figures of processes that have done nothing else."""
    def one() -> float:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool: return pool.submit(beyond_the_state, which, size.state).result()
    return [one() for _ in range(size.children)]


def training_step(encoder: str, pairs: int) -> tuple[Callable[[], None], dict[str, Tensor], dict[str, dict]]:
    """A step of CLMR with all its views, and the state it trains."""
    objective, generator = CLMR.preset(encoder), torch.Generator().manual_seed(0)
    adam, wave = torch.optim.Adam(objective.parameters()), .1 * random(pairs, 5 * objective.encoder.sample_rate)
    def play() -> None:
        objective(Batch(wave=wave, generator=generator))["loss"].backward()
        adam.step()
        adam.zero_grad()
    play()
    return play, *full_state(objective, adam)


def checkpoints(folder: Path, size: Size) -> list[Row]:
    """P22."""
    for name in ("large", "trained"): (folder / name).mkdir(parents=True)
    tensors = state(size.state)
    works = savers(folder / "large", *tensors)
    same_again(works["ours"](), *tensors)
    times = paired(works, size.rounds)
    said = f"{1e3 * median(times['ours']):,.0f} and {1e3 * median(times['theirs']):,.0f} ms"
    what = f"write of {in_bytes(*tensors) / 1e6:.0f} MB, with fsync: ours : torch.save"
    rows = [row("P22", f"{what}, without", times["ours"], times["theirs"], at_most=1.5, note=said),
            row("P22", f"{what}, with", times["ours"], times["synced"])]
    if Path("/proc/self/clear_refs").exists():
        rows += [row("P22", "memory beyond the state, while writing : the state", in_a_child("ours", size), at_most=.2),
                 row("P22", "the same for torch.save", in_a_child("theirs", size))]
    else: print("no rows for memory while writing: it is read from Linux's /proc", file=sys.stderr)
    play, *trained = training_step(*size.step)
    save = savers(folder / "trained", *trained)["ours"]
    same_again(save(), *trained)
    taken, every = paired({"step": play, "save": save}, size.rounds), TrainConfig(steps=1).checkpoint_every
    preset, pairs = size.step
    said = f"{1e3 * median(taken['save']):,.0f} ms every {every} steps of {1e3 * median(taken['step']):,.0f} ms"
    return [*rows, row("P22", f"a checkpoint every {every} steps of CLMR, {preset}, {pairs} pairs : training", taken["save"],
                       [every * took for took in taken["step"]], at_most=.05, note=said)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="full", help="within minutes")
    parser.add_argument("--size", choices=SIZES, help="test: to see that everything runs, P9, P11 and P12 on a CPU too if asked for")
    parser.add_argument("--json", action="store_true", help="one object by target instead of the table")
    parser.add_argument("--only", nargs="+", choices=("P8", "P9", "P11", "P12", "MT", "P13", "P14", "P15", "P22"),
                        help="default: all but P9, P11 and P12 on the CPU, these and MT on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: P9, P11, P12 and MT")
    given = parser.parse_args(arguments)
    usual = ["P9", "P11", "P12", "MT"] if given.device == "cuda" else ["P8", "MT", "P13", "P14", "P15", "P22"]
    only, size, rows = given.only or usual, SIZES[given.size], []
    torch.set_num_threads(1)
    of_gpus = ("P9", "P11", "P12")
    if given.size != "test" and not (given.device == "cuda" and torch.cuda.is_available()): only = [id for id in only if id not in of_gpus]
    if "MT" in only and given.device == "cuda" and not torch.cuda.is_available():
        only = [id for id in only if id != "MT"]
        print("MT: skipped, --device cuda needs a GPU", file=sys.stderr)
    for id in of_gpus:
        if id not in only: print(f"{id}: skipped, it needs a GPU and --device cuda", file=sys.stderr)
    if "P8" in only: rows += samplecnn(size)
    if "P9" in only: rows += on_gpu(size, given.device)
    for id, least in (("P11", .4), ("P12", .45)):
        if id in only: rows += mert(id, least, size, given.device)
    if "MT" in only: rows += multitask(size, given.device)
    if "P13" in only: rows += masked_only(size)
    if "P14" in only: rows += attention(size)
    if "P15" in only: rows += losses(size)
    with tempfile.TemporaryDirectory() as folder:
        if "P22" in only: rows += checkpoints(Path(folder), size)
    if given.json: print(as_json(rows))
    else: print(header("safetensors", *["simclr"] * ("simclr.modules.nt_xent" in sys.modules)), table(rows), sep="\n")


if __name__ == "__main__": main()
