"""The weights CLMR's authors published: every spelling of theirs opens, nothing in a file is executed, and what does not fit is named."""
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from musicssl import checkpoint
from musicssl.checkpoint import Mismatch, save_weights
from musicssl.encoders.samplecnn import SampleCNN, official_weights

RATES = {22_050: (3,) * 9, 16_000: (3, 3, 3, 3, 3, 3, 5, 2, 2), 8_000: (3, 3, 3, 2, 2, 4, 4, 2, 2)}


class Theirs(nn.Module):
    """The encoder as the official code lays it out: rectified, then pooled, and a last layer that pre-training takes away."""

    def __init__(self, strides, n_tags=None):
        super().__init__()
        sizes = [128, 128, 128, 256, 256, 256, 256, 256, 256, 512]
        blocks = [nn.Sequential(nn.Conv1d(1, 128, 3, stride=3), nn.BatchNorm1d(128), nn.ReLU())]
        blocks += [nn.Sequential(nn.Conv1d(i, o, s, padding=1), nn.BatchNorm1d(o), nn.ReLU(), nn.MaxPool1d(s)) for i, o, s in zip(sizes, sizes[1:], strides)]
        self.sequential = nn.Sequential(*blocks, nn.Sequential(nn.Conv1d(512, 512, 3, padding=1), nn.BatchNorm1d(512), nn.ReLU()))
        self.fc = nn.Linear(512, n_tags) if n_tags else nn.Identity()

    def forward(self, wave):
        return self.fc(self.sequential(wave[:, None]).flatten(1))


class SimCLR(nn.Module):
    """What version 1 saves."""

    def __init__(self, encoder, width):
        super().__init__()
        self.encoder = encoder
        if width: self.projector = nn.Sequential(nn.Linear(512, 512, bias=False), nn.ReLU(), nn.Linear(512, width, bias=False))


class Lightning(nn.Module):
    """What version 2 saves: the same encoder in two places."""

    def __init__(self, encoder, model):
        super().__init__()
        self.encoder, self.model = encoder, model


def lived_in(network):
    """No statistic and no scale is at its starting value."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            for tensor in (module.weight, module.bias, module.running_mean): nn.init.normal_(tensor.data)
            nn.init.uniform_(module.running_var, .5, 2)
    return network.eval()


def as_conv(state):
    """The oldest spelling of version 1."""
    return {f"encoder.conv{int(name.split('.')[2]) + 1}.{name.split('.', 3)[3]}" if "sequential" in name else name: tensor for name, tensor in state.items()}


LAYOUTS = {
    "v1": (lambda theirs: SimCLR(theirs, 128).state_dict(), {"projector.0.weight", "projector.2.weight"}),
    "v1, oldest": (lambda theirs: as_conv(SimCLR(theirs, 128).state_dict()), {"projector.0.weight", "projector.2.weight"}),
    "v1, DataParallel": (lambda theirs: nn.DataParallel(SimCLR(theirs, 128)).state_dict(), {"projector.0.weight", "projector.2.weight"}),
    "v2": (lambda theirs: {"epoch": 9, "pytorch-lightning_version": "1.2.0", "state_dict": Lightning(theirs, SimCLR(theirs, 64)).state_dict()},
           {"projector.0.weight", "projector.2.weight"}),
    "v1, supervised": (lambda theirs: SimCLR(theirs, None).state_dict(), {"fc.weight", "fc.bias"}),
    "v2, supervised": (lambda theirs: {"state_dict": Lightning(theirs, theirs).state_dict()}, {"fc.weight", "fc.bias"}),
    "v2, read-out": (lambda theirs: {"state_dict": Lightning(theirs, nn.Sequential(nn.Linear(512, 50))).state_dict()}, {"0.weight", "0.bias"}),
}


def written(layout, tmp_path, rate=22_050, **how):
    torch.manual_seed(1)
    theirs = lived_in(Theirs(RATES[rate], 50 if "supervised" in layout else None))
    torch.save(LAYOUTS[layout][0](theirs), tmp_path / "theirs.pt", **how)
    theirs.fc = nn.Identity()
    return theirs, tmp_path / "theirs.pt"


@torch.no_grad()
def same(theirs, ours):
    wave = .1 * torch.randn(2, ours.n_samples, generator=torch.Generator().manual_seed(2))
    return torch.equal(ours(wave).clip, theirs(wave))


# What opens --------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_spelling_gives_the_same_answers(layout, tmp_path):
    theirs, path = written(layout, tmp_path)
    ours, heads = SampleCNN.from_pretrained(path), official_weights(path)[1]
    assert same(theirs, ours) and not ours.training and ours.settings["strides"] == RATES[22_050] and set(heads) == LAYOUTS[layout][1]
    assert all(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("rate", RATES)
def test_the_shapes_tell_the_sample_rate(rate, tmp_path):
    theirs, path = written("v1", tmp_path, rate)
    ours = SampleCNN.from_pretrained(path)
    assert ours.sample_rate == rate and ours.strides == RATES[rate] and same(theirs, ours)


def test_the_way_torch_saved_in_2020_opens_too(tmp_path):
    theirs, path = written("v1", tmp_path, _use_new_zipfile_serialization=False)
    assert same(theirs, SampleCNN.from_pretrained(path))


def test_half_precision_comes_back_in_32_bits(tmp_path):
    state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in LAYOUTS["v1"][0](Theirs(RATES[8_000])).items()}
    torch.save(state, tmp_path / "half.pt")
    assert {tensor.dtype for tensor in SampleCNN.from_pretrained(tmp_path / "half.pt").parameters()} == {torch.float32}


def test_dice_are_left_as_they_were(tmp_path):
    path, before = written("v1", tmp_path)[1], torch.get_rng_state()
    SampleCNN.from_pretrained(path)
    assert torch.equal(torch.get_rng_state(), before)


# Nothing is executed -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lightning_file(tmp_path, monkeypatch):
    """A checkpoint that names a class of a package that is not here, as Lightning's of 2021 name their callbacks."""
    module = ModuleType("an_absent_package")
    class ModelCheckpoint:
        def __init__(self): self.best = torch.ones(1)
    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__, module.ModelCheckpoint = module.__name__, "ModelCheckpoint", ModelCheckpoint
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        theirs = lived_in(Theirs(RATES[8_000]))
        torch.save({**LAYOUTS["v2"][0](theirs), "callbacks": {ModelCheckpoint: {"best_model_path": ""}}, "hparams": ModelCheckpoint()}, tmp_path / "theirs.ckpt")
    return theirs, tmp_path / "theirs.ckpt"


def test_classes_that_are_not_here_do_not_matter(lightning_file, monkeypatch):
    """Mutation: no stand-ins."""
    theirs, path = lightning_file
    assert same(theirs, SampleCNN.from_pretrained(path))
    monkeypatch.setattr(checkpoint, "zipfile", SimpleNamespace(is_zipfile=lambda path: False))
    with pytest.raises(Mismatch, match="an_absent_package"): SampleCNN.from_pretrained(path)


class Bomb:
    def __init__(self, code): self.code = code
    def __reduce__(self): return exec, (self.code,)


def test_code_in_a_file_stays_asleep(tmp_path, monkeypatch):
    """Mutation: pickle as torch reads it without `weights_only`."""
    path, mark = tmp_path / "theirs.pt", tmp_path / "it ran"
    state = LAYOUTS["v1"][0](Theirs(RATES[8_000]))
    torch.save({"state_dict": state, "extra": Bomb(f"open({str(mark)!r}, 'w').close()")}, path)
    assert SampleCNN.from_pretrained(path).sample_rate == 8_000 and not mark.exists()
    load = torch.load
    monkeypatch.setattr(checkpoint.torch, "load", lambda path, map_location, weights_only: load(path, map_location, weights_only=False))
    SampleCNN.from_pretrained(path)
    assert mark.exists()


# What is refused ---------------------------------------------------------------------------------------------------------------------------------


def changed(**edits):
    state = LAYOUTS["v1"][0](Theirs(RATES[8_000]))
    for name, tensor in edits.items():
        if tensor is None: del state[name]
        else: state[name] = tensor
    return state


@pytest.mark.parametrize("edits, line", [
    ({"encoder.sequential.4.1.running_var": None}, r"blocks\.4\.1\.running_var: got nothing, wanted \(256,\) float32"),
    ({"encoder.attention.weight": torch.zeros(3)}, r"encoder\.attention\.weight: got \(3,\) float32, wanted nothing"),
    ({"encoder.sequential.11.0.weight": torch.zeros(3)}, r"blocks\.11\.0\.weight: got \(3,\) float32, wanted nothing"),
    ({"encoder.sequential.10.0.weight": torch.zeros(1024, 1024, 3)}, r"blocks\.10\.0\.weight: got \(1024, 1024, 3\) float32, wanted \(512, 512, 3\) float32")])
def test_every_difference_is_named(edits, line, tmp_path):
    torch.save(changed(**edits), tmp_path / "theirs.pt")
    with pytest.raises(Mismatch, match=f"theirs.pt does not fit SampleCNN\n  {line}$"): SampleCNN.from_pretrained(tmp_path / "theirs.pt")


def test_a_stranger_unlooked_for_would_pass(tmp_path, monkeypatch):
    """Mutation: shapes are not compared before weights are put in."""
    torch.save(changed(**{"encoder.attention.weight": torch.zeros(3)}), tmp_path / "theirs.pt")
    monkeypatch.setattr(checkpoint, "_refuse_other_shapes", lambda *_: None)
    assert SampleCNN.from_pretrained(tmp_path / "theirs.pt").sample_rate == 8_000


def test_a_network_in_between_is_none(tmp_path):
    """Strides nobody published have a filter of another length somewhere."""
    torch.save(SimCLR(Theirs((3, 3, 3, 3, 3, 3, 5, 2, 3)), 64).state_dict(), tmp_path / "theirs.pt")
    with pytest.raises(Mismatch, match=r"blocks\.9\.0\.weight: got \(512, 256, 3\) float32, wanted \(512, 256, 2\) float32$"):
        SampleCNN.from_pretrained(tmp_path / "theirs.pt")


def torn(path):
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize("kind", ["text", "torn", "list", "numbers", "safetensors", "whole model"])
def test_other_files_are_no_checkpoints(kind, tmp_path):
    path = tmp_path / "it.pt"
    if kind == "text": path.write_text("not weights")
    elif kind == "safetensors": save_weights(path, SampleCNN.preset("toy"))
    elif kind == "whole model": torch.save(nn.Linear(1, 1), path)
    else: torch.save([torch.zeros(3)] if kind == "list" else {"state_dict": 3} if kind == "numbers" else LAYOUTS["v1"][0](Theirs(RATES[8_000])), path)
    if kind == "torn": torn(path)
    with pytest.raises(Mismatch, match=r"it\.pt (is no file of tensors|does not fit SampleCNN)"): SampleCNN.from_pretrained(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError): SampleCNN.from_pretrained(tmp_path / "absent.pt")
