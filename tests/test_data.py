"""data.py and prepare_data.py: the order is frozen, damaged files are refused."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import prepare_data
from plumbing import storage
from plumbing.configurator import UserError
from plumbing.tokenizers import tokenizer
from train import TrainConfig


def read(data_dir, split="train"):
    return np.fromfile(data_dir / f"{split}.bin", dtype="<u2")


# ---- tokenizers


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_decode_to_the_text_they_came_from(text):
    encoding = tokenizer("bytes")
    ids = encoding.encode_ordinary(text)
    assert ids == list(text.encode()) and encoding.decode(ids) == text


def test_text_cannot_forge_an_end_of_text():
    encoding = tokenizer("bytes")
    assert encoding.n_vocab == 257 and encoding.eot_token == 256
    assert 256 not in encoding.encode_ordinary("a<|endoftext|>b\0")


def test_gpt2_has_its_vocabulary_and_roundtrips():
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("needs TIKTOKEN_CACHE_DIR with GPT-2's files, since tests use no network")
    encoding = tokenizer("gpt2")
    assert encoding.n_vocab == 50257 and encoding.decode(encoding.encode_ordinary("Hello, world")) == "Hello, world"


# ---- preparation


def test_documents_are_whole_in_the_order_of_the_split_with_one_end_of_text_each(data_dir, documents):
    order = prepare_data.split(len(documents), 0.1, 2357)
    for split, indices in order.items():
        expected = [token for i in indices for token in [*documents[i].encode(), 256]]
        assert read(data_dir, split).tolist() == expected
    assert sorted([*order["train"], *order["val"]]) == list(range(60)) and len(order["val"]) == 6


def test_the_split_is_that_of_datasets_as_nanogpt_calls_it():
    import datasets

    table = datasets.Dataset.from_dict({"i": list(range(5000))})
    theirs = table.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    ours = prepare_data.split(5000, 0.0005, 2357)
    assert theirs["test"]["i"] == ours["val"].tolist() and theirs["train"]["i"] == ours["train"].tolist()


# ---- token files


def flip(path, position=1000):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def damage(tmp_path, data_dir, change) -> object:
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    change(copy)
    return copy


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


EDITS = [('"<u2"', '"<f2"'), ('"<u2"', '"<i2"'), ('"max_id": ', '"max_id": -'), ('"eot": 256', '"eot": 10')]


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda d: (d / "meta.json").unlink(), "meta.json: .*no file"),
        (lambda d: (d / "meta.json").write_text("{"), "meta.json: "),
        (lambda d: (d / "manifest.json").unlink(), "manifest.json: No such file.*prepare one in a new place"),
        (lambda d: (d / "manifest.json").write_text("[]"), "expected a JSON object"),
        (lambda d: (d / "val.bin").unlink(), "val.bin: .*no file"),
        (lambda d: (d / "train.bin").write_bytes((d / "train.bin").read_bytes()[:-1]), "train.bin: sha256 mismatch"),
        (lambda d: (d / "train.bin").write_bytes((d / "train.bin").read_bytes() + b"ab"), "train.bin: sha256 mismatch"),
        (lambda d: flip(d / "train.bin"), "train.bin: sha256 mismatch"),
        (lambda d: flip(d / "val.bin"), "val.bin: sha256 mismatch"),
        *((lambda d, a=a, b=b: replace(d / "meta.json", a, b), "meta.json: sha256 mismatch") for a, b in EDITS),
    ],
)
def test_a_damaged_data_directory_is_refused(tmp_path, data_dir, change, words):
    with pytest.raises(UserError, match=words):
        data.read_meta(damage(tmp_path, data_dir, change), content=True)


def test_opening_tokens_does_not_read_ten_gigabytes_to_compare_them(data_dir, monkeypatch):
    read, sha256_of = [], storage.sha256_of
    monkeypatch.setattr(storage, "sha256_of", lambda path: read.append(path.name) or sha256_of(path))
    data.open_tokens(data_dir, "train", 32, 257)
    assert "meta.json" in read and not {"train.bin", "val.bin"} & set(read)
    data.read_meta(data_dir, content=True)
    assert {"train.bin", "val.bin"} <= set(read)


def test_tokens_that_do_not_fit_the_model_are_refused(data_dir):
    with pytest.raises(UserError, match="largest token id 256, .* below vocab_size 256"):
        data.open_tokens(data_dir, "train", 32, 256)
    n_val = len(read(data_dir, "val"))
    with pytest.raises(UserError, match=f"{n_val} tokens; expected .* at least {n_val + 1} tokens"):
        data.open_tokens(data_dir, "val", n_val, 257)
    assert len(data.open_tokens(data_dir, "val", n_val - 1, 257)) == n_val


# ---- the order


@settings(max_examples=60)
@given(n=st.integers(9, 400), T=st.integers(1, 8), seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 7))
def test_an_epoch_takes_each_window_once_and_never_leaves_the_file(n, T, seed, batch):
    n_windows = max(1, (n - 1) // T - 1)
    starts = np.concatenate([data.train_starts(n, T, seed, s, batch) for s in range(-(-3 * n_windows // batch))])
    assert starts.min() >= 0 and starts.max() + T + 1 <= n
    for epoch in range(3):
        one = np.sort(starts[epoch * n_windows : (epoch + 1) * n_windows])
        assert (np.diff(one) == T).all() and one[0] < max(T, 2)


def test_the_order_depends_on_seed_and_step_alone_and_never_changes():
    """Frozen: a run that was stopped last year must resume with the same data."""
    assert data.train_starts(1000, 10, 1337, 0, 4).tolist() == FROZEN_STEP_0
    assert data.train_starts(1000, 10, 1337, 60, 4).tolist() == FROZEN_STEP_60
    joined = np.concatenate([data.train_starts(1000, 10, 7, step, 3) for step in range(4)])
    assert (joined == data.train_starts(1000, 10, 7, 0, 12)).all()
    assert (joined != data.train_starts(1000, 10, 8, 0, 12)).any()


FROZEN_STEP_0 = [672, 802, 342, 872]
FROZEN_STEP_60 = [301, 181, 101, 851]


def test_targets_are_the_inputs_one_later():
    tokens = np.arange(100, dtype="<u2")
    x, y = data.windows(tokens, np.array([0, 50]), 8)
    assert torch.equal(x, torch.arange(8) + torch.tensor([[0], [50]])) and torch.equal(y, x + 1)
    assert x.dtype == torch.int64


@pytest.mark.parametrize("n,T,expected", [(9, 8, [0]), (16, 8, [0]), (17, 8, [0, 8]), (24, 8, [0, 8])])
def test_validation_walks_every_whole_window_in_order(n, T, expected):
    assert data.val_starts(n, T).tolist() == expected


def test_every_micro_batch_process_and_step_has_dropout_masks_of_its_own(data_dir):
    tokens, seeds = data.open_tokens(data_dir, "train", 32, 257), []
    config = TrainConfig(**TINY | {"dropout": 0.5})
    for place in ((0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2), (0, 0, 1)):  # step, rank, world_size
        seeds += [torch.initial_seed() for _ in data.step_batches(tokens, config, *place, torch.device("cpu"))]
    assert seeds[-2] == seeds[0] and len(set(seeds)) == len(seeds) - 1 == 5  # the first one was made again
