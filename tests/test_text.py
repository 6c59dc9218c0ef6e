"""Pieces of sentences and the network that reads them: the same vocabulary in every process, transformers' BERT as referee, nothing fetched."""
import copy
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from musicssl.encoders import text as room
from musicssl.encoders.base import count_parameters
from musicssl.encoders.text import SPECIAL, TextEncoder, Tokenizer, bert_encoder, bert_tokenizer, train_wordpiece

ROOT = Path(__file__).resolve().parent.parent
WORDS = "a brisk reel in d major for fiddle and flute over drone slow waltz minor harpsichord strings quartet march without accompaniment".split()
SENTENCES = [" ".join(WORDS[(start + 7 * k) % len(WORDS)] for k in range(9)) + ", in Café." for start in range(len(WORDS))]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer: return train_wordpiece(SENTENCES, 120)


def small(vocab_size: int = 120, **changes) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(**{**dict(vocab_size=vocab_size, dim=32, n_layers=2, heads=4, ffn=48, max_positions=80), **changes}).eval()


# Vocabulary

IN_A_PROCESS = f"""
import hashlib, sys
import musicssl.encoders.text as room
print(*{{"tokenizers", "transformers"}} & set(sys.modules))
print(hashlib.md5(str(room.train_wordpiece({SENTENCES!r}, 60)).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def elsewhere() -> list[str]:
    """What another process says: which of both libraries came in with the room, and the digest of its vocabulary."""
    return subprocess.run([sys.executable, "-c", IN_A_PROCESS], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def vocabularies() -> set[str]: return {str(train_wordpiece(SENTENCES, 60)) for _ in range(6)}


def test_a_vocabulary_is_the_same_everywhere(elsewhere, monkeypatch):
    """In this process, again, and in another one. The mutation: continuing letters are numbered as the library meets them."""
    (here,) = vocabularies()
    assert elsewhere[1] == hashlib.md5(here.encode()).hexdigest()
    monkeypatch.setattr(room, "sorted", lambda letters: [], raising=False)
    assert len(vocabularies()) > 1


def test_coming_in_is_light(elsewhere):
    """Neither library is imported before it is needed."""
    assert elsewhere[0] == ""


def test_special_pieces_and_size(tokenizer):
    assert (tokenizer.pad, tokenizer.unknown, tokenizer.begin, tokenizer.end, tokenizer.hidden) == (0, 1, 2, 3, 4)
    assert tokenizer.vocab_size <= 120 and tokenizer.pieces(torch.arange(5)) == list(SPECIAL)
    assert len(set(tokenizer.pieces(torch.arange(tokenizer.vocab_size)))) == tokenizer.vocab_size
    with pytest.raises(ValueError, match="got a vocabulary of 20, wanted 53 or more: special pieces and letters"): train_wordpiece(SENTENCES, 20)


def test_continuing_letters_are_no_special_pieces(tokenizer):
    """They were only numbered in advance: signs in a sentence do not become one of them."""
    assert tokenizer.pieces(tokenizer.encode(["##e"], 6).ids[0])[1:4] != ["##e", "[SEP]", "[PAD]"]
    marked = [added["content"] for added in json.loads(str(tokenizer))["added_tokens"]]
    assert marked == list(SPECIAL)


def test_rows(tokenizer):
    ids, mask = tokenizer.encode(["brisk Réel", "", " ".join(WORDS * 3)], length=10)
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool and mask.sum(1).tolist()[1:] == [2, 10]
    assert tokenizer.pieces(ids[1]) == ["[CLS]", "[SEP]"] + 8 * ["[PAD]"] and ids[2, -1] == tokenizer.end
    assert torch.equal(mask, ids != tokenizer.pad) and (ids[:, 0] == tokenizer.begin).all()
    assert tokenizer.decode(ids[0]) == "brisk reel" and tokenizer.encode([], 10).ids.shape == (0, 10)


def test_longest_row_is_62_pieces_and_two(tokenizer):
    ids, mask = tokenizer.encode([" ".join(WORDS * 9)])
    assert ids.shape == (1, 64) and mask.all() and ids[0, 0] == tokenizer.begin and ids[0, -1] == tokenizer.end
    inner = tokenizer.encode([" ".join(WORDS * 9)], 500).ids[0, 1:63]
    assert torch.equal(ids[0, 1:-1], inner)


@pytest.mark.parametrize("texts, length, words", [(["a"], 2, "length 2, wanted a list of texts and 3 or more"), ("a reel", 64, "got a str and")])
def test_what_is_no_list_of_sentences_is_refused(tokenizer, texts, length, words):
    with pytest.raises(ValueError, match=words): tokenizer.encode(texts, length)


@pytest.mark.parametrize("description, words", [("no JSON", "describes no tokenizer"),
    ('{"model": {"type": "WordLevel", "vocab": {"[PAD]": 0}, "unk_token": ""}}', r"without \[UNK\], \[CLS\], \[SEP\], \[MASK\]")])
def test_what_describes_no_tokenizer_is_refused(description, words):
    with pytest.raises(ValueError, match=words): Tokenizer(description)


def test_saved_copied_and_whole_or_not_at_all(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "pieces.json"
    assert str(train_wordpiece(SENTENCES, 120, path)) == path.read_text(encoding="utf8") == str(tokenizer)
    for other in (Tokenizer.load(path), copy.deepcopy(tokenizer)):
        assert str(other) == str(tokenizer) and torch.equal(other.encode(SENTENCES).ids, tokenizer.encode(SENTENCES).ids)
    monkeypatch.setattr(os, "replace", lambda *given: (_ for _ in ()).throw(OSError("the power went out")))
    with pytest.raises(OSError, match="power"): train_wordpiece(SENTENCES, 60).save(path)
    assert path.read_text(encoding="utf8") == str(tokenizer) and [file.name for file in tmp_path.iterdir()] == ["pieces.json"]


def test_a_foreign_tokenizers_own_rows_are_not_used(tokenizer):
    """A published file may cut or fill rows by itself. The mutation: it is left to."""
    description = json.loads(str(tokenizer))
    description["truncation"] = dict(direction="Right", max_length=4, strategy="LongestFirst", stride=0)
    description["padding"] = dict(strategy={"Fixed": 30}, direction="Right", pad_to_multiple_of=None, pad_id=0, pad_type_id=0, pad_token="[PAD]")
    foreign = Tokenizer(json.dumps(description))
    assert torch.equal(foreign.encode(SENTENCES).ids, tokenizer.encode(SENTENCES).ids)
    foreign._cutter = type(foreign._cutter).from_str(json.dumps(description))
    assert not torch.equal(foreign.encode(SENTENCES).ids, tokenizer.encode(SENTENCES).ids)


# The network

def test_parameters_to_the_unit():
    """M2, the text stream: word, position and normalisation; six layers."""
    with torch.device("meta"): encoder = TextEncoder(30_522)
    layers = count_parameters(encoder.layers)
    assert layers == 42_527_232 and count_parameters(encoder) - layers == 23_835_648
    assert encoder.norm.eps == 1e-12 and encoder.places.weight.shape == (512, 768) and encoder.settings["dropout"] == .1


def test_settings_build_it_again(tokenizer):
    encoder, tokens = small(attention_dropout=0.), tokenizer.encode(SENTENCES, 40)
    again = TextEncoder(**encoder.settings).eval()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(*tokens), encoder(*tokens)) and json.loads(json.dumps(encoder.settings)) == encoder.settings


def test_one_by_one_is_all_at_once(tokenizer):
    """As co-attention calls it."""
    encoder, (ids, mask) = small(), tokenizer.encode(SENTENCES, 40)
    states = encoder(ids, mask)
    x = encoder.embed(ids)
    assert states.shape == (len(SENTENCES), 3, 40, 32) and torch.equal(states[:, 0], x)
    for number, layer in enumerate(encoder.layers): assert torch.equal(states[:, number + 1], x := layer(x, mask[:, None, None]))
    assert torch.equal(encoder(ids), encoder(ids, torch.ones_like(mask)))


def deaf_to_padding(encoder: TextEncoder, tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer.encode(SENTENCES, 40)
    longer = tokenizer.encode(SENTENCES, 60)
    keep = mask[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(encoder(*longer)[:, :, :40][keep], encoder(ids, mask)[keep], atol=1e-5, rtol=0)


def test_padding_is_not_heard(tokenizer, monkeypatch):
    """M16, the text stream by itself. The mutation: no mask."""
    encoder, right = small(), TextEncoder.forward
    for parameter in encoder.parameters(): parameter.data += .1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    deaf_to_padding(encoder, tokenizer)
    monkeypatch.setattr(TextEncoder, "forward", lambda self, ids, mask: right(self, ids))
    with pytest.raises(AssertionError): deaf_to_padding(encoder, tokenizer)


def test_order_is_heard():
    encoder, ids = small(), torch.arange(5, 25)[None]
    assert (encoder(ids.flip(1))[:, -1].flip(1) - encoder(ids)[:, -1]).abs().max() > 1e-3
    with torch.no_grad(): encoder.places.weight.zero_()
    torch.testing.assert_close(encoder(ids.flip(1))[:, -1].flip(1), encoder(ids)[:, -1], atol=1e-5, rtol=0)


def test_every_weight_learns():
    encoder = small(dropout=.1).train()
    encoder(torch.arange(80)[None])[:, -1].sin().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in encoder.parameters())


@pytest.mark.parametrize("changes, words", [(dict(heads=5), "32 with 5 heads"), (dict(n_layers=0), "0 layers")])
def test_sizes_without_a_network_are_refused(changes, words):
    with pytest.raises(ValueError, match=words): small(**changes)


def test_too_long_a_row_is_refused():
    with pytest.raises(ValueError, match="got 81 pieces, wanted at most 80"): small()(torch.zeros(1, 81, dtype=torch.int64))


# BERT

TINY = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, max_position_embeddings=80)


def new_bert(folder: Path, kind: str = "BertForMaskedLM", **config) -> object:
    """A BERT of random weights as it is published, its normalisations too; with a vocabulary."""
    transformers = loaded(folder)
    torch.manual_seed(3)
    bert = getattr(transformers, kind)(transformers.BertConfig(**config)).eval()
    for parameter in bert.parameters():
        if parameter.ndim == 1: parameter.data += .1 * torch.randn(parameter.shape)
    bert.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS, "##s", "##ly", ",", "."]) + "\n", encoding="utf8")
    return bert


def loaded(folder: Path) -> object:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").touch()
    return room._transformers(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> tuple[Path, object]:
    folder = tmp_path_factory.mktemp("bert")
    return folder, new_bert(folder, **TINY, vocab_size=30).base_model


@torch.no_grad()
def same_states(encoder: TextEncoder, theirs: object, vocab_size: int) -> None:
    n_layers = len(encoder.layers)
    ids = torch.randint(vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(64) < torch.tensor([[64], [20]])
    expected = torch.stack(theirs(ids, attention_mask=mask, output_hidden_states=True).hidden_states[:n_layers + 1], 1)
    found = encoder.eval()(ids, mask)
    keep = mask[:, None].expand(-1, n_layers + 1, -1)
    torch.testing.assert_close(found[keep], expected[keep], atol=1e-5, rtol=1e-5)


def test_states_are_berts(bert):
    folder, theirs = bert
    for n_layers in (1, 3): same_states(bert_encoder(folder, n_layers=n_layers), theirs, 30)
    encoder = bert_encoder(folder, 2)
    assert encoder.training and encoder.settings == dict(vocab_size=30, dim=32, n_layers=2, heads=4, ffn=48, max_positions=80, dropout=.1,
                                                         attention_dropout=.1)


def test_states_at_the_published_size(tmp_path):
    """Twelve layers of 768 for 30,522 pieces, of random weights; the first six are taken."""
    theirs = new_bert(tmp_path, "BertModel")
    encoder = bert_encoder(tmp_path)
    same_states(encoder, theirs, 30_522)
    assert count_parameters(encoder) == 66_362_880


def test_without_token_types(bert):
    """The released code leaves the first sentence's vector out: other states, unless that vector is zero. The mutation of the comparison above."""
    folder, theirs = bert
    encoder = bert_encoder(folder, 3, token_types=False)
    with pytest.raises(AssertionError): same_states(encoder, theirs, 30)
    theirs = copy.deepcopy(theirs)
    theirs.embeddings.token_type_embeddings.weight.data.zero_()
    same_states(encoder, theirs, 30)


def test_pieces_are_berts(bert):
    """transformers' own tokenizer, its truncation and padding included."""
    folder, _ = bert
    ours, theirs = bert_tokenizer(folder), room._transformers(folder).AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = ["A brisk Réel, slowly.", "waltzs 日", "", " ".join(WORDS * 5)]
    ids, mask = ours.encode(texts)
    expected = theirs(texts, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
    assert torch.equal(ids, expected.input_ids) and torch.equal(mask, expected.attention_mask.bool()) and ours.vocab_size == 30


def damaged(folder: Path, to: Path, **config) -> Path:
    to.mkdir()
    (to / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (to / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    return to


def test_missing_weights_are_no_random_ones(bert, tmp_path, monkeypatch):
    """transformers fills gaps with chance and warns. The mutation: nobody looks at what was missing."""
    folder = damaged(bert[0], tmp_path / "less")
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.1.attention.self.value.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"less lacks weights of BERT: encoder.layer.1.attention.self.value.weight"): bert_encoder(folder, 3)
    kind = room._transformers(folder).BertModel
    right = kind.from_pretrained
    monkeypatch.setattr(kind, "from_pretrained", lambda *given, **how: (right(*given, **how)[0], {"missing_keys": [], "mismatched_keys": []}))
    with pytest.raises(AssertionError): same_states(bert_encoder(folder, 3), bert[1], 30)


@pytest.mark.parametrize("config, words", [
    (dict(hidden_act="relu"), "hidden_act = 'relu', wanted 'gelu'"), (dict(model_type="roberta"), "model_type = 'roberta', wanted 'bert'"),
    (dict(layer_norm_eps=1e-5), "layer_norm_eps = 1e-05, wanted 1e-12"), (dict(num_hidden_layers=2), "2 layers, wanted 3 or more")])
def test_another_network_is_refused(bert, tmp_path, config, words):
    with pytest.raises(ValueError, match=words): bert_encoder(damaged(bert[0], tmp_path / "other", **config), 3)


def test_nothing_is_fetched(bert, tmp_path, monkeypatch):
    """Neither for a name instead of a folder, nor for what a folder lacks, even when transformers would be allowed to look it up. The injected fault:
    any use of the network fails the test, and does so when one is made."""
    asked = []
    def refused(*given, **how): asked.append(given); raise OSError("no network here")
    for name in ("connect", "connect_ex"): monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.chdir(tmp_path)
    bert_encoder(bert[0], 2), bert_tokenizer(bert[0])
    for make in (bert_encoder, bert_tokenizer):
        with pytest.raises(ValueError, match="bert-base-uncased is no folder with a BERT in it"): make("bert-base-uncased")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((bert[0] / "config.json").read_text())
    with pytest.raises(OSError): bert_encoder(empty, 2)
    assert not asked
    with pytest.raises(OSError, match="no network here"): socket.create_connection(("localhost", 9))
    assert asked


def test_without_transformers(bert, monkeypatch):
    """Everything else works; BERT says what is missing."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    for make in (bert_encoder, bert_tokenizer):
        with pytest.raises(ImportError, match=r"pip install 'musicssl\[bert\]'"): make(bert[0])
    assert small(train_wordpiece(SENTENCES, 120).vocab_size)(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 3, 4, 32)


def test_a_torchvision_for_another_torch_does_not_matter(bert, tmp_path):
    """transformers imports it wherever it is installed. The mutation: transformers is there already, and nothing was hidden from it."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (tmp_path / "torchvision-0.28.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.28.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    code = f"import sys; from musicssl.encoders.text import bert_tokenizer; bert_tokenizer({str(bert[0])!r}); assert 'torchvision' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    runs = [subprocess.Popen([sys.executable, "-c", start + code], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
            for start in ("", "import transformers; ")]
    errors = [run.communicate()[1] for run in runs]
    assert runs[0].returncode == 0, errors[0]
    assert runs[1].returncode == 1 and "musicssl[bert]" in errors[1]
