"""data.py and prepare_data.py: nothing lost or doubled, the order frozen, wrong files refused."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import call_script, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

import corpus
import data
import prepare_data
from plumbing.configurator import UserError


def read(data_dir, split="train"):
    return np.fromfile(data_dir / f"{split}.bin", dtype="<u2")


# ---- tokenizers


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_decode_to_the_text_they_came_from(text):
    encoding = data.tokenizer("bytes")
    ids = encoding.encode_ordinary(text)
    assert ids == list(text.encode()) and encoding.decode(ids) == text


def test_text_cannot_forge_an_end_of_text():
    encoding = data.tokenizer("bytes")
    assert encoding.n_vocab == 257 and encoding.eot_token == 256
    assert 256 not in encoding.encode_ordinary("a<|endoftext|>b\0")


def test_gpt2_has_its_vocabulary_and_roundtrips():
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("needs TIKTOKEN_CACHE_DIR with GPT-2's files, since tests use no network")
    encoding = data.tokenizer("gpt2")
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


def test_the_number_of_workers_does_not_change_a_byte(tmp_path, data_dir):
    corpus = data_dir.parent / "corpus.jsonl"
    arguments = ["files", corpus, "--val_fraction=0.1", "--workers=1", f"--out={tmp_path / 'one'}"]
    assert call_script(prepare_data, *arguments) == 0
    for split in ("train", "val"):
        assert (tmp_path / "one" / f"{split}.bin").read_bytes() == (data_dir / f"{split}.bin").read_bytes()
    entry = json.loads((tmp_path / "one" / "meta.json").read_text())
    assert entry["splits"] == json.loads((data_dir / "meta.json").read_text())["splits"]


def test_txt_and_parquet_give_the_tokens_that_jsonl_gives(tmp_path, documents, data_dir):
    import datasets

    datasets.Dataset.from_dict({"content": documents}).to_parquet(tmp_path / "corpus.parquet")
    paths = []
    for i, text in enumerate(documents):
        paths.append(tmp_path / f"{i:03d}.txt")
        paths[-1].write_text(text)
    for out, arguments in (("p", [tmp_path / "corpus.parquet", "--text_column=content"]), ("t", paths)):
        assert call_script(prepare_data, "files", *arguments, "--val_fraction=0.1", f"--out={tmp_path / out}") == 0
        assert (read(tmp_path / out) == read(data_dir)).all()


def test_preparing_again_does_nothing_and_preparing_otherwise_is_refused(data_dir, capsys):
    arguments = ["files", data_dir.parent / "corpus.jsonl", f"--out={data_dir}"]
    before = (data_dir / "train.bin").stat().st_mtime_ns
    assert call_script(prepare_data, *arguments, "--val_fraction=0.1") == 0
    assert "up to date" in capsys.readouterr().out
    assert call_script(prepare_data, *arguments, "--val_fraction=0.2") == 2
    assert "another val_fraction" in capsys.readouterr().err
    assert (data_dir / "train.bin").stat().st_mtime_ns == before


def test_the_embedded_corpus_needs_nothing_but_python(tmp_path):
    done = run_script("prepare_data.py", "python", f"--out={tmp_path / 'python'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    meta = data.read_meta(tmp_path / "python")
    assert meta["splits"]["train"]["tokens"] > 5_000_000 and meta["dtype"] == "<u2"
    assert meta["splits"]["train"]["tokens"] == len(read(tmp_path / "python"))
    described = run_script("data.py", tmp_path / "python")
    assert f"{meta['splits']['val']['tokens']:,}" in described.stdout
    first = bytes(read(tmp_path / "python")[:30].tolist()).decode()
    assert f"train {first!r}"[:-1] in described.stdout  # as a person reads it


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["files"], "no path"),
        (["files", "nowhere.txt"], "nowhere.txt: no such file"),
        (["files", "config"], "config: a directory, expected its files, such as config/*.txt"),
        (["files", "README.md"], ".md"),
        (["files", "CORPUS", "--text_column=body"], "no column 'body'"),
        (["files", "CORPUS", "--tokenizer=gpt7"], "unknown tokenizer 'gpt7'"),
        (["files", "CORPUS", "--val_fraction=1.5"], "val_fraction is 1.5"),
        (["books"], "books"),
        (["python", "--tokeniser=gpt2"], "did you mean 'tokenizer'"),
    ],
)
def test_a_mistake_in_preparing_is_one_line_and_leaves_nothing(tmp_path, data_dir, capsys, arguments, words):
    arguments = [str(data_dir.parent / "corpus.jsonl") if a == "CORPUS" else a for a in arguments]
    assert call_script(prepare_data, *arguments, f"--out={tmp_path / 'out'}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and words in error
    assert not (tmp_path / "out" / "meta.json").exists()


def test_one_document_cannot_be_split_and_the_remedy_is_named(tmp_path, capsys):
    (tmp_path / "one.txt").write_text("first\n\nsecond\n\nthird\n")
    arguments = ["files", tmp_path / "one.txt", f"--out={tmp_path / 'out'}"]
    assert call_script(prepare_data, *arguments) == 2
    error = capsys.readouterr().err
    assert "train 0, val 1" in error and "or cut the files into more of them with --sample_by=paragraph" in error
    assert call_script(prepare_data, *arguments, "--sample_by=paragraph") == 0
    assert data.read_meta(tmp_path / "out")["splits"]["train"]["documents"] == 2


@given(ids=st.lists(st.integers(0, 70_000), min_size=1, max_size=5))
def test_an_id_outside_the_dtype_is_refused_and_never_wrapped(ids):
    class Encoding:
        eot_token = 1

        def encode_to_numpy(self, _, disallowed_special):
            return np.array(ids, np.uint32)

    for dtype in ("<u2", "<u4"):
        if max(ids) <= np.iinfo(dtype).max:
            assert prepare_data.encode(["text"], Encoding(), dtype, [0])[0].tolist() == [*ids, 1]
        else:
            with pytest.raises(OverflowError, match=f"token id {max(ids)} does not fit <u2"):
                prepare_data.encode(["text"], Encoding(), dtype, [0])


def test_odd_documents_are_taken_as_they_are_and_empty_ones_are_skipped():
    texts = ["", None, "a\0b", "\ud800 alone", "<|endoftext|>", "x" * 1_000_000]
    ids, lengths = prepare_data.encode(texts, data.tokenizer("bytes"), "<u2", range(len(texts)))
    expected = [b"a\0b", "\ufffd alone".encode(), b"<|endoftext|>", b"x" * 1_000_000]
    assert ids.tolist() == [token for text in expected for token in [*text, 256]]
    assert lengths.tolist() == [0, 0, *(len(text) + 1 for text in expected)]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\n\ufefftwo\n".encode())  # the second is text: a zero-width space
    assert list(corpus.TextFiles([tmp_path / "a.txt"], "line")) == ["one", "\ufefftwo"]


def test_an_edited_corpus_is_not_up_to_date(tmp_path, capsys):
    arguments = ["files", tmp_path / "a.txt", "--sample_by=line", "--val_fraction=0.3", f"--out={tmp_path / 'out'}"]
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    assert call_script(prepare_data, *arguments) == 0
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\nfour\n")
    assert call_script(prepare_data, *arguments) == 2
    assert "was prepared with another paths" in capsys.readouterr().err


def test_what_is_damaged_is_prepared_again(tmp_path):
    arguments = ["files", tmp_path / "a.txt", "--sample_by=line", "--val_fraction=0.3", f"--out={tmp_path / 'out'}"]
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    assert call_script(prepare_data, *arguments) == 0
    flip(tmp_path / "out" / "train.bin", 3)
    assert call_script(prepare_data, *arguments) == 0
    data.verify(tmp_path / "out")


# ---- token files


def flip(path, position=1000):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def damage(tmp_path, data_dir, change) -> object:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("train.bin", "val.bin", "meta.json"):
        (copy / name).write_bytes((data_dir / name).read_bytes())
    change(copy)
    return copy


def set_meta(directory, **changes):
    meta = json.loads((directory / "meta.json").read_text())
    (directory / "meta.json").write_text(json.dumps(meta | changes))


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda d: (d / "meta.json").unlink(), "meta.json is missing"),
        (lambda d: (d / "meta.json").write_text("{"), "unreadable"),
        (lambda d: (d / "val.bin").unlink(), "found no file"),
        (lambda d: (d / "train.bin").write_bytes((d / "train.bin").read_bytes()[:-1]), "expected"),
        (lambda d: (d / "train.bin").write_bytes((d / "train.bin").read_bytes() + b"ab"), "expected"),
        (
            lambda d: (d / "meta.json").write_text((d / "meta.json").read_text().replace('"format": 1', '"format": 9')),
            "not of format 1",
        ),
        (lambda d: (d / "meta.json").write_text("[]"), "not of format 1"),
        (lambda d: (d / "meta.json").write_text('{"format": 1, "splits": {}}'), "meta.json is damaged"),
        (lambda d: (d / "meta.json").write_text('{"format": 1, "splits": []}'), "meta.json is damaged"),
        (lambda d: set_meta(d, eot="256"), "meta.json is damaged"),
        (lambda d: set_meta(d, tokenizer=None), "meta.json is damaged"),
        (lambda d: set_meta(d, splits={"train": {"tokens": 1, "sha256": ""}, "val": {}}), "meta.json is damaged"),
        (lambda d: flip(d / "train.bin"), "train.bin: sha256 mismatch"),
        (lambda d: flip(d / "val.bin"), "val.bin: sha256 mismatch"),
    ],
)
def test_a_damaged_data_directory_is_refused(tmp_path, data_dir, change, words):
    with pytest.raises(UserError, match=words):
        data.verify(damage(tmp_path, data_dir, change))


def test_tokens_that_do_not_fit_the_model_are_refused(data_dir):
    with pytest.raises(UserError, match="largest token id 256 >= vocab_size 256"):
        data.open_tokens(data_dir, "train", 32, 256)
    n_val = len(read(data_dir, "val"))
    with pytest.raises(UserError, match=f"val.bin has {n_val} tokens, block_size {n_val} needs at least {n_val + 1}"):
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
    """Frozen: a run that was stopped last year must go on with the same data."""
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
