"""PASE: scipy's filters, the specification written out by hand and arithmetic as referees; where a frame listens; what removing a part would do."""
import librosa
import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
from torch import nn

from musicssl import zoo
from musicssl.encoders import pase as room
from musicssl.encoders.base import Encoder, count_parameters
from musicssl.encoders.pase import PASE, SincConv


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(**changes) -> PASE:
    """Every number of it drawn, also those that start at 0 or 1."""
    torch.manual_seed(0)
    net = PASE.preset("tiny", **changes)
    for number, (name, value) in enumerate(net.state_dict().items()):
        if not value.is_floating_point() or name.endswith((".low", ".band")): continue
        if name.endswith("running_var"): value.copy_(.5 + noise(*value.shape, seed=number).abs())
        else: value.add_(.1 * noise(*value.shape, seed=number))
    return net.eval()


# The bank of filters

def test_filters_are_scipys():
    """`firwin` gives unit gain in the band; ours has a middle tap of one."""
    bank = SincConv()
    low, high = (edge.detach().double().numpy() for edge in bank.edges())
    for ours, f_1, f_2 in zip(bank.filters().detach().numpy(), low, np.minimum(high, 7999.99)):
        theirs = scipy.signal.firwin(251, [f_1, f_2], pass_zero=False, window="hamming", scale=False, fs=16_000)
        np.testing.assert_allclose(ours, theirs / theirs[125], atol=3e-5)


def test_bands_start_equally_spaced_in_mel():
    bank = SincConv()
    edges = torch.cat([bank.low, (bank.low + bank.band)[-1:]]).detach().double().numpy()
    mel = librosa.hz_to_mel(edges, htk=True)
    np.testing.assert_allclose(np.diff(mel), (mel[-1] - mel[0]) / 64, rtol=1e-3)
    assert edges[0] == 30 and edges[-1] == pytest.approx(7900, abs=.01)
    low, high = (edge.detach() for edge in bank.edges())
    assert low[0] == 80 and high[-1] == pytest.approx(8000, abs=.01) and (high - low >= 50).all()


def test_a_tone_passes_its_band_only():
    bank = SincConv(4)
    low, high = (edge.detach() for edge in bank.edges())
    time = torch.arange(4000) / 16_000
    tones = torch.sin(2 * torch.pi * (low + high)[:, None] / 2 * time)
    loud = bank(tones[:, None]).detach().square().mean(-1).sqrt() * (high - low) # tone, filter
    assert (loud.argmax(1) == torch.arange(4)).all()
    assert (loud.fill_diagonal_(0) < loud.new_tensor(16_000 / 2 / 2**.5 * 1e-2)).all(), "40 dB below a tone in the band"


def test_gradients_of_the_edges():
    """By finite differences, in double precision."""
    bank = SincConv(3, 31).double()
    bank.band.data -= 10. # away from the bound, which is no place for differences
    wave = noise(1, 1, 64).double()
    def heard(low, band): return torch.func.functional_call(bank, {"low": low, "band": band}, (wave,))
    assert torch.autograd.gradcheck(heard, (bank.low.detach().requires_grad_(), bank.band.detach().requires_grad_()), eps=1e-3)


def far_out(bank: SincConv) -> None:
    """Edges that an optimiser has thrown beyond half the rate, on either side."""
    with torch.no_grad(): bank.low.copy_(torch.tensor([1e5, -2e4, 7950.])), bank.band.copy_(torch.tensor([0., -1e5, 10.]))
    low, high = bank.edges()
    assert (low >= 50).all() and (high - low >= 49.9).all() and (high <= 8000).all()
    bank.filters().square().sum().backward()
    assert bank.filters().isfinite().all() and bank.low.grad.isfinite().all() and bank.band.grad.isfinite().all()


def test_edges_stay_where_sound_is(): far_out(SincConv(3))


def unbounded(bank):
    low = 50 + bank.low.abs()
    return low, (low + 50 + bank.band.abs()).clamp(max=bank.highest)


def test_edges_without_a_bound_are_noticed(monkeypatch):
    """The mutation: only the upper edge is held."""
    monkeypatch.setattr(SincConv, "edges", unbounded)
    with pytest.raises(AssertionError): far_out(SincConv(3))


def test_filters_are_made_once_a_pass_and_in_single_precision(monkeypatch):
    made, right = [], SincConv.filters
    monkeypatch.setattr(SincConv, "filters", lambda bank: made.append(right(bank)) or made[-1])
    with torch.autocast("cpu", torch.bfloat16): assert tiny()(noise(3, 1600)).clip.isfinite().all()
    assert len(made) == 1 and made[0].dtype == torch.float32 and torch.equal(made[0], right(tiny().blocks[0][1]))


@pytest.mark.parametrize("filters, kernel", [(0, 251), (64, 250), (64, 1)])
def test_banks_that_are_none(filters, kernel):
    with pytest.raises(ValueError, match=f"got {filters} filters of {kernel} taps, wanted one or more filters of an odd"): SincConv(filters, kernel)


# The network, against the specification

TABLE = [(251, 1, 64), (20, 10, 64), (11, 2, 128), (11, 1, 128), (11, 2, 256), (11, 1, 256), (11, 2, 512), (11, 2, 512)] # kernel, stride, channels


def by_the_table(net: PASE, wave: torch.Tensor) -> torch.Tensor:
    """Section 3 of the specification in eval mode, step by step, from the numbers of `net` alone: (B, N, D)."""
    given = net.state_dict()
    def of(prefix): return {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    x, early = wave[:, None], []
    for number, (kernel, stride, _) in enumerate(TABLE):
        conv, norm, slope = (of(f"blocks.{number}.{part}.") for part in (1, 2, 3))
        weight = conv["weight"] if number else net.blocks[0][1].filters()[:, None]
        before = kernel // 2 - 1 if stride > 1 or kernel % 2 == 0 else kernel // 2
        x = F.conv1d(F.pad(x, (before, kernel // 2), mode="reflect"), weight, conv.get("bias"), stride)
        x = (x - norm["running_mean"][:, None]) / (norm["running_var"][:, None] + 1e-5).sqrt() * norm["weight"][:, None] + norm["bias"][:, None]
        x = x.clamp(min=0) + slope["weight"][:, None] * x.clamp(max=0)
        early.append(x)
    if net.recurrent is not None: x = remembered(x, of("recurrent."))
    y = F.conv1d(x, given["project.weight"], given["project.bias"])
    for number in range(len(net.skips)):
        mapped = F.conv1d(early[number], given[f"skips.{number}.weight"])
        y = y + mapped.unflatten(2, (y.shape[2], -1)).mean(3)
    mean, var = given["norm_out.running_mean"], given["norm_out.running_var"]
    return (y.transpose(1, 2) - mean) / (var + 1e-5).sqrt()


def remembered(x: torch.Tensor, gru: dict) -> torch.Tensor:
    """A gated recurrent unit, one frame after the other: (B, C, N) to the same."""
    state, states = torch.zeros_like(x[..., 0]), []
    for frame in x.unbind(2):
        new = (frame @ gru["weight_ih_l0"].T + gru["bias_ih_l0"]).chunk(3, 1)
        old = (state @ gru["weight_hh_l0"].T + gru["bias_hh_l0"]).chunk(3, 1)
        reset, keep = ((new[k] + old[k]).sigmoid() for k in (0, 1))
        state = keep * state + (1 - keep) * (new[2] + reset * old[2]).tanh()
        states.append(state)
    return torch.stack(states, 2)


def is_the_table(net: PASE) -> None:
    wave = noise(2, 4800, seed=7)
    torch.testing.assert_close(net.double()(wave.double()).layers[:, 0], by_the_table(net.double(), wave.double()), atol=1e-9, rtol=1e-9)


VARIANTS = {"pase": dict(skips=False, recurrent=False), "shortcuts": dict(recurrent=False), "memory": dict(skips=False), "pase_plus": {}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_network_is_the_table(variant): is_the_table(tiny(**VARIANTS[variant]))


MUTATIONS = {
    "zeros behind the edges": lambda patch: patch.setattr(nn.ReflectionPad1d, "forward", lambda pad, x: F.pad(x, pad.padding)),
    "the later side is padded by less": lambda patch: patch.setattr(nn.ReflectionPad1d, "forward",
                                                                         lambda pad, x: F.pad(x, pad.padding[::-1], mode="reflect")),
    "the negative side is lost": lambda patch: patch.setattr(nn.PReLU, "forward", lambda slope, x: x.relu()),
    "shortcuts take the largest": lambda patch: patch.setattr(F, "avg_pool1d", F.max_pool1d),
    "shortcuts take the first": lambda patch: patch.setattr(F, "avg_pool1d", lambda x, size: x[..., ::size]),
    "nothing is remembered": lambda patch: patch.setattr(nn.GRU, "forward", lambda gru, x: (x, None)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_another_network_is_noticed(mutation, monkeypatch):
    """The mutations: one part after the other replaced by what it might have been."""
    net = tiny()
    MUTATIONS[mutation](monkeypatch)
    with pytest.raises(AssertionError): is_the_table(net)


COUNTS = {"pase": 5_818_020, "pase_plus": 7_834_432, "quarter": 370_128, "plus-quarter": 491_728, "tiny": 31_252}


def formula(width: float, dim: int, skips: bool = False, recurrent: bool = False) -> tuple[int, int]:
    """Parameters of the blocks, and of all."""
    channels = [int(c * width) for _, _, c in TABLE]
    sizes = zip([1, *channels], channels, [kernel for kernel, _, _ in TABLE])
    blocks = sum((i * o * kernel + o if i > 1 else 2 * o) + 2 * o + o for i, o, kernel in sizes)
    last = channels[-1]
    return blocks, blocks + last * dim + dim + skips * sum(channels[:-1]) * dim + recurrent * 3 * (2 * last * last + 2 * last)


@pytest.mark.parametrize("preset", COUNTS)
def test_parameters_to_the_unit(preset):
    """M-1. With the QRNN of PASE+, one linear map from twice 512 numbers to three times 512, 7,832,896: the specification's 7.83 million."""
    with torch.device("meta"): net = PASE.preset(preset)
    blocks, total = formula(**{"width": 1, "dim": 100, **PASE.presets()[preset]})
    assert count_parameters(net.blocks) == blocks and count_parameters(net) == count_parameters(net, trainable=True) == total == COUNTS[preset]
    if preset in ("pase", "pase_plus"): assert blocks == 5_766_720
    if preset == "pase_plus":
        assert count_parameters(net.skips) == 360_448 and count_parameters(net.recurrent) == 1_575_936
        assert total - 1_575_936 + (2 * 512 + 1) * 3 * 512 == 7_832_896


# Frames

@pytest.mark.parametrize("preset", ["pase", "tiny"])
@pytest.mark.parametrize("samples, frames", [(16_000, 100), (32_000, 200), (100_000, 625)])
def test_a_frame_every_hop(preset, samples, frames):
    """M-1."""
    net = PASE.preset(preset).eval()
    with torch.no_grad(): heard = net(.1 * noise(1, samples))
    assert heard.layers.shape == (1, 1, frames, net.dim) and heard.clip.shape == (1, net.dim) and net.hop * frames == samples
    torch.testing.assert_close(heard.clip, heard.layers[:, 0].mean(1))


def test_any_length_gives_the_whole_hops():
    """The mutation: the blocks alone, which make one frame more of 151 to 159 samples that are left over."""
    net, wave = tiny(), noise(1, 1760)
    counts = {left: net(wave[:, :1600 + left]).layers.shape[2] for left in (0, 1, 150, 151, 159, 160)}
    assert counts == {0: 10, 1: 10, 150: 10, 151: 10, 159: 10, 160: 11}
    assert torch.equal(net(wave[:, :1759]).layers, net(wave[:, :1600]).layers)
    x = wave[:, None, :1759]
    for block in net.blocks: x = block(x)
    assert x.shape[2] == 11


@pytest.mark.parametrize("given, words", [(torch.zeros(1, 479), "got 479 samples, wanted at least 480"), (torch.zeros(480), r"wanted \(B, T\)"),
                                          (torch.zeros(1, 480, dtype=torch.int16), "wanted floats")])
def test_what_is_no_batch_is_refused(given, words):
    with pytest.raises(ValueError, match=words): tiny()(given)
    assert tiny()(torch.zeros(1, 480)).layers.shape[2] == 3


def reach(net: PASE, frame: int = 50) -> tuple[int, int]:
    """First and last sample that a frame hears, from the sample where a spectrogram's frame has its middle."""
    net = net.double().eval()
    for block in net.blocks: block[3] = nn.Identity()
    wave = noise(1, 16_000).double().requires_grad_()
    net(wave).layers[0, 0, frame].sum().backward()
    first, last = wave.grad[0].nonzero()[[0, -1], 0].tolist()
    return first - 160 * frame, last - 160 * frame


def test_where_a_frame_listens():
    """148 ms, and the middle almost a frame later than a spectrogram's, by the kernels and strides alone. With memory, to all that was before."""
    span, step, middle = 1, 1, 0.
    for kernel, stride, _ in TABLE:
        before = kernel // 2 - (stride > 1)
        middle += step * ((kernel - 1) / 2 - before)
        span, step = span + (kernel - 1) * step, step * stride
    first, last = reach(tiny(skips=False, recurrent=False))
    assert last - first + 1 == span == 2370 and (first + last) / 2 == middle == 150.5 and step == 160
    assert reach(tiny(skips=False)) == (-8000, last) and reach(tiny(recurrent=False)) == (first, last)


@pytest.mark.parametrize("sample", [4000, 8000, 12_100])
def test_a_click_is_heard_where_it_is(sample):
    net, wave = tiny(recurrent=False), .01 * noise(1, 16_000)
    clicked = wave.clone()
    clicked[0, sample] = 1
    with torch.no_grad(): change = (net(clicked).layers - net(wave).layers)[0, 0].norm(dim=1)
    frames = change.nonzero()[:, 0]
    middle = (change * torch.arange(100)).sum() / change.sum()
    assert len(frames) <= 16 and abs(middle - (sample - 150.5) / 160) < 1.5


# Training

def is_normalised(net: PASE) -> None:
    frames = net.train()(.1 * noise(6, 8000, seed=3)).layers.flatten(0, 2).double()
    assert frames.mean(0).abs().max() < 1e-4 and (frames.var(0, correction=0) - 1).abs().max() < .02


@pytest.mark.parametrize("variant", VARIANTS)
def test_embeddings_are_normalised_over_the_batch(variant):
    """M-1. The mutation: without the last normalisation."""
    net = tiny(**VARIANTS[variant])
    is_normalised(net)
    net.norm_out = nn.Identity()
    with pytest.raises(AssertionError): is_normalised(net)


def test_the_last_normalisation_belongs_to_the_embedding():
    """In eval mode a row is what it is, in training what it is among others; and its statistics are saved."""
    net, wave = tiny(), noise(4, 4800) * torch.tensor([.001, .01, .1, 1.])[:, None]
    alone, among = net(wave[:1]).clip, net(wave).clip[:1]
    torch.testing.assert_close(alone, among, atol=1e-6, rtol=1e-5)
    assert torch.equal(net(wave).layers, net(wave).layers)
    net.train()
    assert (net(wave[:1]).clip - net(wave).clip[:1]).abs().max() > .1
    assert {"norm_out.running_mean", "norm_out.running_var"} <= set(net.state_dict()) and not any("window" in name for name in net.state_dict())


def reached(net: PASE) -> set[str]:
    """Parameters with a gradient that is not nothing."""
    (net.train()(noise(4, 3200)).layers * noise(4, 1, 20, net.dim, seed=1)).sum().backward()
    return {name for name, parameter in net.named_parameters() if parameter.grad is not None and parameter.grad.abs().max() > 1e-5}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns(variant):
    """But for biases that the normalisation behind them takes away."""
    net = tiny(**VARIANTS[variant])
    idle = {f"blocks.{number}.1.bias" for number in range(1, 8)} | {"project.bias"}
    assert reached(net) >= {name for name, _ in net.named_parameters()} - idle


def test_shortcuts_carry_gradients_past_the_last_block():
    """The mutation: no shortcuts, and nothing arrives."""
    for skips in (True, False):
        net = tiny(skips=skips)
        net.project.weight.data.zero_()
        blocks = {name.split(".")[1] for name in reached(net) if name.startswith("blocks")}
        assert blocks == (set("0123456") if skips else set())


def test_rectifiers_start_as_relus():
    net = PASE.preset("plus-quarter")
    slopes = [block[3].weight for block in net.blocks]
    assert all(slope.shape == (block[2].num_features,) and not slope.any() for slope, block in zip(slopes, net.blocks))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    (net(noise(2, 3200)).layers * noise(2, 1, 20, 64, seed=1)).sum().backward()
    optimizer.step()
    assert all(slope.any() for slope in slopes)


def test_silence_is_finite():
    net = tiny().train()
    heard = net(torch.zeros(2, 1600))
    heard.layers.square().sum().backward()
    assert heard.layers.isfinite().all() and all(p.grad.isfinite().all() for p in net.parameters())


# The contract

@pytest.mark.parametrize("preset", PASE.presets())
def test_the_contract_of_an_encoder(preset):
    net = zoo.new_encoder(f"pase:{preset}")
    assert isinstance(net, Encoder) and (net.sample_rate, net.hop) == (16_000, 160) and zoo.check_encoder(net) is net
    again = PASE(**zoo.describe(net)["settings"])
    assert again.load_state_dict(net.state_dict()) and torch.equal(again.eval()(torch.ones(1, 480)).clip, net(torch.ones(1, 480)).clip)


@pytest.mark.parametrize("settings", [dict(width=.3), dict(width=0), dict(width=-1), dict(dim=0)])
def test_settings_that_make_no_network(settings):
    with pytest.raises(ValueError, match="wanted a width that makes 64 channels a whole number, such as 1/4, and dim >= 1"): PASE(**settings)


def test_rooms_own_numbers_are_the_table():
    assert list(zip(room._KERNELS, room._STRIDES, room._CHANNELS)) == TABLE
