"""tokenizers.py: transformers reads from a checkpoint the ids that the model was trained on."""

import json
import os

import numpy as np
import pytest
import tiktoken
import torch
from conftest import call_script, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoders import save
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

import data
import prepare_data
from inherit import inherit
from plumbing import checkpoint, pretrained, storage, tokenizers
from plumbing.configurator import UserError

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
ODD = st.sampled_from(
    ["<|endoftext|>", "<|endoftext", "'re", "'RE", "  ", "\r\n", "\x00", "\u00a0", "----", "aaaaa", "é", "日本", "😀"]
)
TEXTS = st.one_of(st.text(), st.lists(st.one_of(ODD, st.text(max_size=3)), max_size=12).map("".join))


def load(folder, encoding, name: str):
    """transformers' tokenizer of the files written for an encoding, beside a config.json as in a checkpoint."""
    storage.write_json(folder / "config.json", checkpoint.hf_config(random_model().config, name, encoding.eot_token))
    tokenizers.write_files(encoding, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["bytes", "gpt2", "small"])
def pair(request, tmp_path_factory):
    """data.py's tokenizer and transformers'; `small` is made like GPT-2's, with 300 merges, and needs no file."""
    if request.param == "gpt2" and not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("needs TIKTOKEN_CACHE_DIR with GPT-2's files, since tests use no network")
    if request.param != "small":
        encoding = tokenizers.tokenizer(request.param)
        return encoding, load(tmp_path_factory.mktemp(request.param), encoding, request.param)
    encoding = small_encoding(request.getfixturevalue("documents"))[0]
    return encoding, load(tmp_path_factory.mktemp("small"), encoding, "gpt2")


def small_encoding(documents) -> tuple[tiktoken.Encoding, list[str]]:
    """A byte pair encoding learned from the documents by tokenizers, as tiktoken has it, and its merges."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(documents, trainers.BpeTrainer(vocab_size=556, initial_alphabet=alphabet))
    model = json.loads(learner.to_str())["model"]
    byte = {letter: bytes([i]) for i, letter in enumerate(tokenizers.byte_letters())}
    ranks = {b"".join(byte[letter] for letter in token): rank for token, rank in model["vocab"].items()}
    special = {tokenizers.END_OF_TEXT: len(ranks)}
    encoding = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return encoding, [" ".join(merge) for merge in model["merges"]]


def test_the_letters_of_the_bytes_are_those_of_tokenizers():
    assert sorted(tokenizers.byte_letters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("a", " ", "\n", "é", "😀", "\x7f", "\xad"):
        expected = "".join(tokenizers.byte_letters()[byte] for byte in text.encode())
        assert words.pre_tokenize_str(text)[0][0] == expected


def test_the_merges_hold_those_that_were_learned(documents, tmp_path):
    encoding, merges = small_encoding(documents)
    tokenizers.write_files(encoding, tmp_path)
    written = storage.read_json(tmp_path / "tokenizer.json")["model"]["merges"]
    assert len(merges) == 300 and set(merges) <= set(map(" ".join, written))


@settings(max_examples=300)
@given(text=TEXTS)
def test_any_text_has_the_ids_of_the_training_data_and_comes_back(pair, text):
    encoding, tokenizer = pair
    ids = tokenizer.encode(text)
    assert ids == encoding.encode_ordinary(text) and tokenizer.decode(ids) == text


def test_end_of_text_is_that_of_the_model(pair):
    encoding, tokenizer = pair
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == encoding.eot_token
    assert tokenizer.decode([encoding.eot_token]) == tokenizers.END_OF_TEXT
    assert len(tokenizer) == encoding.n_vocab


def test_a_trained_checkpoint_reads_text_as_it_was_trained_and_passes_that_on(reference, tmp_path):
    path = storage.latest(reference)
    inherit(path, "0:2", tmp_path / "two")
    for directory in (path, tmp_path / "two"):
        storage.verify(directory)
        assert AutoTokenizer.from_pretrained(directory).encode("naïve") == list("naïve".encode())


def test_a_vocabulary_padded_beyond_the_tokenizer_s_is_no_matter(tmp_path, data_dir):
    model = random_model(vocab_size=320, dtype=torch.float32)
    checkpoint.save(tmp_path / "padded", model, "bytes", 256, data_dir=data_dir)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "padded")
    assert len(tokenizer) == 257 and model(tokenizer("abc", return_tensors="pt").input_ids).shape == (1, 3, 320)


def test_a_tokenizer_without_a_known_file_is_a_warning(tmp_path, capsys, documents):
    encoding = small_encoding(documents)[0]
    encoding.name = "cl100k_base"
    tokenizers.write_files(encoding, tmp_path)
    assert "no tokenizer.json is known for 'cl100k_base'" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_gpt2_s_own_files_name_no_end_of_text(tmp_path, documents):
    """tokenizer_config.json of gpt2-medium on the hub holds nothing but model_max_length."""
    encoding = small_encoding(documents)[0]
    tokenizers.write_files(encoding, tmp_path)
    storage.write_json(tmp_path / "tokenizer_config.json", {"model_max_length": 1024})
    found = tokenizers.tokenizer(tmp_path)
    assert found.eot_token == encoding.eot_token and found.encode_ordinary("def") == encoding.encode_ordinary("def")


@pytest.mark.parametrize("bos", [True, False])
def test_the_tokenizer_of_a_model_begins_documents_as_it_was_trained_and_cannot_be_forged(tmp_path, documents, bos):
    path = save(tmp_path / "model", "Llama", documents, bos=bos)
    ours, theirs = tokenizers.tokenizer(path), AutoTokenizer.from_pretrained(path)
    for text in documents[:5]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode_ordinary(text) == ours.encode_to_numpy(text).tolist() == ids and ours.decode(ids) == text
    assert ours.begin == ([1] if bos else []) and ours.eot_token == theirs.eos_token_id == 0
    assert 0 not in ours.encode_ordinary("a <end> b") and ours.decode(ours.encode_ordinary("<end>")) == "<end>"

    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    arguments = ["files", str(tmp_path / "corpus.jsonl"), f"--tokenizer={path}", "--val_fraction=0.1"]
    assert call_script(prepare_data, *arguments, f"--out={tmp_path / 'data'}") == 0
    meta, tokens = data.read_meta(tmp_path / "data"), data.open_tokens(tmp_path / "data", "val", 1, 300)
    assert meta["begin"] == ours.begin and tokens[-1] == 0
    starts = [0, *(np.flatnonzero(tokens == 0)[:-1] + 1)]  # of the documents
    assert len(starts) == 6 and ((tokens[starts] == 1).all() if bos else 1 not in tokens)
    assert pretrained.check_tokenizer(path, meta) is None  # the files beside the tokens are the model's


@pytest.mark.parametrize("lacks", ["tokenizer.json", "eos_token"])
def test_a_tokenizer_without_its_file_or_an_end_of_text_is_one_line(tmp_path, documents, lacks):
    path = save(tmp_path / "model", "Llama", documents, bos=False)
    if lacks == "eos_token":
        settings = storage.read_json(path / "tokenizer_config.json")
        storage.write_json(path / "tokenizer_config.json", settings | {"eos_token": None})
    else:
        (path / lacks).unlink()
    with pytest.raises(UserError, match=lacks if lacks == "eos_token" else "is no checkpoint"):
        tokenizers.tokenizer(path)
