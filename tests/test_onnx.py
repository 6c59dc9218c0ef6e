"""Published weights become files of ours, files of ours become graphs; each is compared with what it came from."""
import builtins
import json

import pytest
import torch
from torch import nn

from musicssl import reproduce, zoo
from musicssl.checkpoint import Mismatch, read_about
from musicssl.encoders.base import Embedding
from musicssl.encoders.samplecnn import SampleCNN
from musicssl.probe import Probe
from musicssl.tag import Tagger, save_tagger
from musicssl.zoo import convert, export_onnx, load_encoder, new_encoder, save_encoder

onnxruntime = pytest.importorskip("onnxruntime")
SMALL = "samplecnn:8k-eighth"


def answers(path, wave):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return {out.name: torch.from_numpy(a) for out, a in zip(session.get_outputs(), session.run(None, {"wave": wave.numpy()}))}, session


@pytest.fixture
def official(tmp_path):
    """A checkpoint as version 1 of CLMR's code writes it."""
    state = new_encoder("samplecnn:8k", 3).state_dict()
    torch.save({f"encoder.sequential.{name.removeprefix('blocks.')}": tensor for name, tensor in state.items()} | {"projector.0.weight": torch.zeros(512, 512)},
               tmp_path / "clmr.pt")
    return tmp_path / "clmr.pt"


# Conversion --------------------------------------------------------------------------------------------------------------------------------------


def test_the_command_converts_what_was_published(official, tmp_path, capsys):
    target = tmp_path / "ours.safetensors"
    assert reproduce.main(["convert", "--encoder", "samplecnn", str(official), str(target)]) == 0
    assert f"{target}: SampleCNN at 8000 Hz, windows of 2.59 s" in capsys.readouterr().out
    wave = .1 * torch.randn(2, 20_736, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_encoder(target)(wave).clip, load_encoder("samplecnn:8k", 3)(wave).clip) and read_about(target)["converted_from"] == "clmr.pt"


@pytest.mark.parametrize("words, message", [
    (["--encoder", "mfcc", "{source}", "no.safetensors"], "nobody published weights of 'mfcc'"),
    (["--encoder", "wavenet", "{source}", "no.safetensors"], "there is no encoder 'wavenet'"),
    (["--encoder", "samplecnn", "{source}", "no.pt"], "wanted a name that ends in .safetensors"),
    (["--encoder", "samplecnn", "absent.pt", "no.safetensors"], "there is no file absent.pt"),
    (["{source}", "no.safetensors"], "wanted --encoder NAME"),
    (["--encoder", "samplecnn", "{source}", "no.onnx"], "none for .onnx")])
def test_what_cannot_be_converted_is_said_in_a_line(words, message, official, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["convert", *(word.format(source=official) for word in words)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("musicssl: ") and message in said and not list(tmp_path.glob("no.*"))


def test_a_misfit_leaves_no_file(tmp_path):
    save_encoder(tmp_path / "ours.safetensors", new_encoder(SMALL))
    with pytest.raises(Mismatch, match="does not fit SampleCNN"): convert("samplecnn", tmp_path / "ours.safetensors", tmp_path / "no.safetensors")
    assert not (tmp_path / "no.safetensors").exists()


# Graphs ------------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """A tagger's graph, by the command, and the tagger."""
    folder, encoder, probe = tmp_path_factory.mktemp("onnx"), new_encoder(SMALL).eval(), Probe(64, 3)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm1d): nn.init.uniform_(module.running_var, .5, 2)
    nn.init.normal_(probe.mean), nn.init.uniform_(probe.std, .5, 2)
    tagger = Tagger(encoder, probe, ["high", "low", "loud"]).eval()
    save_tagger(folder / "tagger.safetensors", tagger)
    assert reproduce.main(["convert", str(folder / "tagger.safetensors"), str(folder / "tagger.onnx")]) == 0
    return folder / "tagger.onnx", tagger


@pytest.mark.parametrize("batch", [1, 2, 7])
@torch.no_grad()
def test_graph_and_network_answer_alike(graph, batch):
    path, tagger = graph
    wave = .3 * torch.randn(batch, tagger.n_samples, generator=torch.Generator().manual_seed(batch))
    given, session = answers(path, wave)
    heard = tagger.encoder(wave)
    for name, wanted in (("layers", heard.layers), ("clip", heard.clip), ("answer", tagger(wave))):
        assert torch.allclose(given[name], wanted, atol=1e-5, rtol=1e-4), name
    told = json.loads(session.get_modelmeta().custom_metadata_map["musicssl"])
    assert told == {"sample_rate": 8000, "hop": 20_736, "n_samples": 20_736, "tags": ["high", "low", "loud"]}


class Shy(SampleCNN):
    """Answers otherwise while it is recorded: what a graph that froze something looks like from outside."""

    def forward(self, wave):
        heard = super().forward(wave)
        return Embedding(heard.layers, 0 * heard.clip) if torch.compiler.is_exporting() else heard


def test_a_graph_that_answers_otherwise_is_not_kept(tmp_path, monkeypatch):
    """Mutation: nobody compares."""
    encoder = Shy.preset("toy").eval()
    with pytest.raises(ValueError, match="gives other answers than it does"): export_onnx(encoder, tmp_path / "shy.onnx")
    assert not (tmp_path / "shy.onnx").exists()
    monkeypatch.setattr(zoo, "_equals", lambda *_: True)
    export_onnx(encoder, tmp_path / "shy.onnx")
    given, _ = answers(tmp_path / "shy.onnx", torch.ones(1, encoder.n_samples))
    assert not given["clip"].any() and encoder(torch.ones(1, encoder.n_samples)).clip.any()


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    save_encoder(tmp_path / "ours.safetensors", new_encoder(SMALL))
    real = builtins.__import__
    def absent(name, *rest):
        if name.split(".")[0] == "onnx": raise ModuleNotFoundError("No module named 'onnx'", name="onnx")
        return real(name, *rest)
    monkeypatch.setattr(builtins, "__import__", absent)
    assert reproduce.main(["convert", str(tmp_path / "ours.safetensors"), str(tmp_path / "it.onnx")]) == 1
    assert "pip install 'musicssl[onnx]'" in capsys.readouterr().err and not (tmp_path / "it.onnx").exists()
