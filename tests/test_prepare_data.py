"""prepare_data.py: the same bytes however it is run, complete or absent, every format. Offline, real files.

python -m pytest tests/test_prepare_data.py -q
"""

import contextlib
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, call_script, run_script
from hypothesis import given
from hypothesis import strategies as st

import data
import prepare_data
from plumbing import storage, tokenizers
from plumbing.configurator import UserError
from plumbing.tokenizers import END_OF_TEXT, tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def prepare(*arguments) -> int:
    return call_script(prepare_data, *arguments)


def token_files(folder) -> list[bytes]:
    return [(folder / f"{split}.bin").read_bytes() for split in ("train", "val")]


def texts_of(folder, end: int = 256) -> list[str]:
    """The documents of both splits, sorted."""
    written = b"".join(token_files(folder))
    pieces = np.split(ids := np.frombuffer(written, "<u2"), np.flatnonzero(ids == end) + 1)
    assert not len(pieces.pop())  # the last document has its end-of-text too
    return sorted(bytes(piece[:-1].tolist()).decode() for piece in pieces)


def last_line(capsys, code: int, expected: int = 2) -> str:
    """The error of a call that ended with that exit code: one line."""
    error = capsys.readouterr().err
    assert code == expected and error.startswith("error: ") and error.count("\n") == 1, error
    return error


# ---- the split and the bytes


def test_the_split_is_that_of_datasets_as_nanogpt_calls_it():
    import datasets

    table = datasets.Dataset.from_dict({"i": list(range(5000))})
    theirs = table.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    ours = prepare_data.split(5000, 0.0005, 2357)
    assert theirs["test"]["i"] == ours["val"].tolist() and theirs["train"]["i"] == ours["train"].tolist()


def test_each_document_is_written_once_in_the_order_of_the_split_with_one_end_of_text(data_dir, documents):
    for name, order in prepare_data.split(len(documents), 0.1, 2357).items():
        expected = [token for i in order for token in [*documents[i].encode(), 256]]
        assert np.fromfile(data_dir / f"{name}.bin", "<u2").tolist() == expected
    meta = data.read_meta(data_dir)
    assert (meta["eot"], meta["vocab_size"], meta["dtype"]) == (256, 257, "<u2")
    assert [meta["splits"][name]["documents"] for name in ("train", "val")] == [54, 6]


def test_the_number_of_workers_does_not_change_a_byte(tmp_path, data_dir):
    for workers in (1, 2, 5):
        arguments = ["files", data_dir.parent / "corpus.jsonl", "--val_fraction=0.1", f"--workers={workers}"]
        assert prepare(*arguments, f"--out={tmp_path / str(workers)}") == 0
        assert token_files(tmp_path / str(workers)) == token_files(data_dir)


def test_few_documents_are_encoded_ahead_of_the_one_that_is_written():
    class Items:
        read = 0

        def __getitem__(self, i):
            self.read += 1
            return np.array([i])

    items = Items()
    for written, ids in enumerate(prepare_data.in_order(items, np.arange(5000), lambda item: item, 2)):
        assert ids == [written] and items.read - written <= 1000
    assert written == 4999


def test_max_tokens_ends_train_after_a_complete_document_and_leaves_val(tmp_path, data_dir):
    train, val = token_files(data_dir)
    ends = np.flatnonzero(np.frombuffer(train, "<u2") == 256) + 1
    for limit, n_documents in ((ends[2], 3), (ends[3] - 1, 3), (10**9, 54)):
        out = tmp_path / str(limit)
        arguments = ["files", data_dir.parent / "corpus.jsonl", "--val_fraction=0.1", f"--out={out}"]
        assert prepare(*arguments, f"--max_tokens={limit}") == 0
        assert token_files(out) == [train[: 2 * ends[n_documents - 1]], val]
        assert data.read_meta(out)["splits"]["train"]["documents"] == n_documents


@given(ids=st.lists(st.integers(0, 70_000), min_size=1, max_size=5))
def test_an_id_outside_the_dtype_is_refused_and_never_wrapped(ids):
    class Encoding:
        eot_token = 1

        def encode_to_numpy(self, _, disallowed_special):
            return np.array(ids, np.uint32)

    for dtype in ("<u2", "<u4"):
        if max(ids) <= np.iinfo(dtype).max:
            assert prepare_data.encode_document("text", str, Encoding(), dtype).tolist() == [*ids, 1]
        else:
            with pytest.raises(UserError, match="could not cast 'same_value'"):
                prepare_data.encode_document("text", str, Encoding(), dtype)


def test_a_vocabulary_beyond_16_bits_is_written_in_32(tmp_path, monkeypatch):
    single = [bytes([i]) for i in range(256)]
    ranks = {word: rank for rank, word in enumerate([*single, *(a + b for a in single for b in single)])}
    special = {END_OF_TEXT: len(ranks)}
    large = tiktoken.Encoding("large", pat_str=r"(?s).", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tokenizers, "KNOWN", ["large"])
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"large": large}[name])
    (tmp_path / "a.txt").write_text("naïve\né\n")
    options = ["--tokenizer=large", "--val_fraction=0.5", "--sample_by=line", f"--out={tmp_path / 'o'}"]
    assert prepare("files", tmp_path / "a.txt", *options) == 0
    assert data.read_meta(tmp_path / "o")["dtype"] == "<u4"
    for split in ("train", "val"):
        tokens = data.open_tokens(tmp_path / "o", split, 1, 65793)
        assert large.decode(tokens[:-1].tolist()) in ("naïve", "é") and tokens[-1] == 65792


# ---- odd documents


def test_odd_documents_are_encoded_as_they_are_and_empty_ones_are_skipped(tmp_path):
    """A text that spells a special token gets no special id, and a lone surrogate becomes U+FFFD."""
    texts = ["", None, "a\0b", "\ud800 alone", "<|endoftext|>", "x" * 200_000, "\ufeffBOM", "2024-01-01"]
    lines = [json.dumps({"text": text, "meta": {f"key {i}": i}}) for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "  ", '{"text": "b", "other": 1}']))
    assert prepare("files", tmp_path / "a.jsonl", "--val_fraction=0.2", f"--out={tmp_path / 'out'}") == 0
    expected = ["a\0b", "\ufffd alone", "<|endoftext|>", "x" * 200_000, "\ufeffBOM", "2024-01-01", "b"]
    assert texts_of(tmp_path / "out") == sorted(expected)


@pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="needs GPT-2's files, and tests use no network"
)
def test_a_million_spaces_are_encoded_in_pieces():
    """Where tiktoken can encode a text, the pieces give the same ids, since each is cut before a space."""
    encoding = tokenizer("gpt2")
    text = "a table" + " " * 1_100_000 + "its end"
    ids = prepare_data.encode(text, encoding)
    assert (
        encoding.decode(ids.tolist()) == text
        and ids[-3:].tolist() == encoding.encode_ordinary("  its end")[-3:]
    )
    words = "some words, 12 of\n\n them;   " * 20_000
    pieces = prepare_data.re.findall(rf"(?s).{{1,{prepare_data.PIECE}}}(?=\s|\Z)", words)
    assert len(pieces) > 5 and "".join(pieces) == words


def test_a_document_that_cannot_be_encoded_is_named(tmp_path, capsys, monkeypatch):
    def fail(text, encoding):
        raise ValueError("Max stack size exceeded")

    monkeypatch.setattr(prepare_data, "encode", fail)
    (tmp_path / "a.txt").write_text("two words\n")
    error = last_line(capsys, prepare("files", tmp_path / "a.txt", f"--out={tmp_path / 'out'}"))
    assert "document 'two words\\n': ValueError: Max stack size exceeded" in error


# ---- formats


def write_files(folder):
    """Three documents in every format, with different other columns, and an empty file of each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": "one", "id": 1}, {"text": 'two\n\nlines, "quoted"', "id": 2}]
    third, texts = {"other": [1.5], "text": "three"}, ["one", "three", rows[1]["text"]]
    for kind in ("jsonl", "json", "csv", "parquet", "txt", "md", "gz"):
        (folder / kind).mkdir(parents=True)
        (folder / kind / f"empty.{kind}").write_bytes(b"")
    (folder / "gz/empty.gz").rename(folder / "gz/empty.jsonl.gz")
    (folder / "jsonl/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "jsonl/b.jsonl").write_text(json.dumps(third))
    (folder / "json/a [1].json").write_text(json.dumps([*rows, third], indent=1))
    (folder / "csv/a.csv").write_text('id,text\n1,one\n2,"two\n\nlines, ""quoted"""\n')
    (folder / "csv/b.csv").write_text("text\nthree\n")
    pq.write_table(pa.Table.from_pylist(rows), folder / "parquet/a.parquet")
    pq.write_table(
        pa.table({"text": pa.array(["three"], pa.large_string()), "x": [0]}), folder / "parquet/b.parquet"
    )
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "parquet/c.parquet")
    for kind in ("txt", "md"):
        for name, text in zip("abc", texts, strict=True):
            (folder / kind / f"{name}.{kind}").write_text(text)
    with gzip.open(folder / "gz/a.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in [*rows, third]))
    (folder / "notes.docx").write_bytes(b"not a text")
    return sorted(texts)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "txt", "md", "gz"])
def test_every_format_gives_its_documents_from_paths_folders_and_globs(tmp_path, kind):
    texts = write_files(tmp_path / "in")
    folder = tmp_path / "in" / kind
    for i, paths in enumerate(([folder], [f"{folder}/*.*"], sorted(folder.iterdir()))):
        assert prepare("files", *paths, "--val_fraction=0.3", f"--out={tmp_path / str(i)}") == 0
        assert texts_of(tmp_path / str(i)) == texts
    assert token_files(tmp_path / "0") == token_files(tmp_path / "1") == token_files(tmp_path / "2")


@pytest.mark.parametrize(
    "cut,expected",
    [("document", ["last", "one\n\ntwo\nlines\n"]), ("paragraph", ["last", "one", "two\nlines\n"]),
     ("line", ["last", "lines", "one", "two"])],
)  # fmt: skip
def test_a_text_file_is_cut_into_documents(tmp_path, cut, expected):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\nlines\n")
    (tmp_path / "B.TXT").write_bytes(b"last")
    (tmp_path / "folder.txt").mkdir()
    options = [f"--sample_by={cut}", "--val_fraction=0.2", f"--out={tmp_path / 'out'}"]
    assert prepare("files", tmp_path, *options) == 0 and texts_of(tmp_path / "out") == expected


def test_a_parquet_column_of_bytes_is_read_as_utf8(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["eins", "zwei ü", "drei"]
    pq.write_table(pa.table({"text": pa.array([text.encode() for text in texts], pa.binary())}), tmp_path / "a.parquet")
    assert prepare("files", tmp_path / "a.parquet", "--val_fraction=0.3", f"--out={tmp_path / 'out'}") == 0
    assert texts_of(tmp_path / "out") == sorted(texts)


def test_a_cache_that_cannot_be_written_is_named_and_no_file_is_blamed(tmp_path, capsys, monkeypatch):
    import datasets

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system", "/cache/datasets")

    monkeypatch.setattr(datasets, "load_dataset_builder", read_only)
    write_files(tmp_path / "in")
    error = last_line(capsys, prepare("files", tmp_path / "in/parquet", f"--out={tmp_path / 'out'}"), 1)
    assert error == "error: /cache/datasets (set HF_HOME): Read-only file system\n"


def test_files_of_one_name_or_an_edited_file_are_not_mixed_up_in_the_cache(tmp_path):
    for i, folder in enumerate(("a", "b", "a")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "x.txt").write_text(f"{i}1\n{i}2\n")
        options = ["--sample_by=line", "--val_fraction=0.5", f"--out={tmp_path / str(i)}"]
        assert prepare("files", tmp_path / folder / "x.txt", *options) == 0
        assert texts_of(tmp_path / str(i)) == [f"{i}1", f"{i}2"]


@pytest.mark.parametrize(
    "name,content,words",
    [
        ("b.jsonl", '{"text": "a"}\n{nonsense\n', "document '{nonsense': JSONDecodeError"),
        ("b.jsonl", '{"text": "a"}\n{"body": "b"}\n', "KeyError: 'text'; fix it, or set --text_column"),
        ("b.jsonl", '{"text": "a"}\n{"text": 7}\n', "'{\"text\": 7}': AttributeError"),
        ("b.jsonl", '{"text": "a"}\n'.encode("utf-16"), "b.jsonl: not read as .jsonl"),
        ("b.jsonl", gzip.compress(b"\xff\xfe\x00", mtime=0), "b.jsonl: not read as .jsonl"),
        ("b.txt", "text\n".encode("utf-16"), "b.txt: not read as .txt"),
        ("b.json", '[{"text":', "b.json: not read as .json"),
        ("b.json", "[]", "b.json: not read as .json"),
        ("b.json", '[{"body": "b"}]', "set --text_column"),
        ("b.csv", "body\nb\n", "b.csv: not read as .csv with 'text'"),
        ("b.parquet", "nonsense", "b.parquet: not read as .parquet with 'text': ArrowInvalid"),
        ("b.txt", "", "found kinds none"),
        ("b.jsonl", '{"text": ""}\n{"text": null}\n\n', "val: found 0 tokens in 1 of "),
        ("b.docx", "x", "found no file of .txt"),
    ],
)
def test_a_corpus_that_is_wrong_is_one_line_and_leaves_nothing_that_looks_finished(
    tmp_path, capsys, name, content, words
):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = ["files", tmp_path / name, "--val_fraction=0.2", f"--out={tmp_path / 'out'}"]
    error = last_line(capsys, prepare(*arguments))
    assert words in error and not (tmp_path / "out").exists() and not (tmp_path / ".tmp-out").exists()


def test_of_several_files_the_one_at_fault_is_named(tmp_path, capsys):
    write_files(tmp_path / "in")
    (tmp_path / "in/parquet/bad.parquet").write_bytes(b"nonsense")
    (tmp_path / "in/txt/bad.txt").write_bytes("text".encode("utf-16"))
    for kind in ("parquet", "txt"):
        code = prepare("files", tmp_path / "in" / kind, f"--out={tmp_path / 'out'}")
        assert f"in/{kind}/bad.{kind}: not read as .{kind}" in last_line(capsys, code)


def test_the_same_file_by_two_spellings_and_files_of_two_kinds_are_refused(tmp_path, capsys):
    write_files(tmp_path / "in")
    a, link = tmp_path / "in/txt/a.txt", tmp_path / "link.txt"
    link.symlink_to(a)
    for paths in ([a, a], [a, link], [a, f"{tmp_path}/in/md/../txt/*.txt"]):
        assert "1 named more than once" in last_line(
            capsys, prepare("files", *paths, f"--out={tmp_path / 'out'}")
        )
    error = last_line(capsys, prepare("files", tmp_path / "in", f"--out={tmp_path / 'out'}"))
    assert "found kinds .csv .json .jsonl .md .parquet .txt" in error


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["files"], "paths ()"),
        (["files", "nowhere.txt"], "nowhere.txt: found no file"),
        (["python", "a.txt"], "only files has paths"),
        (["python", "--data_files=a*"], "data_files a*; only files has paths, only hub corpora have data_files"),
        (["python", "--tokenizer=gpt7"], "tokenizer 'gpt7': "),
        (["python", "--val_fraction=0"], "val_fraction 0.0; expected workers >= 1, 0 < val_fraction < 1"),
        (["python", "--val_fraction=1.5"], "val_fraction 1.5; expected workers >= 1, 0 < val_fraction < 1"),
        (["python", "--workers=0"], "workers 0, val_fraction 0.005; expected workers >= 1"),
        (["python", "--max_tokens=0"], "train: found 0 tokens in "),
    ],
)
def test_a_mistake_in_the_command_is_one_line(tmp_path, capsys, arguments, words):
    assert words in last_line(capsys, prepare(*arguments, f"--out={tmp_path / 'out'}"))


# ---- complete or absent


def test_the_default_corpus_needs_nothing_but_python_and_no_torch(tmp_path):
    script = f"import sys, prepare_data; sys.argv = ['', 'python', '--out={tmp_path}/out']; prepare_data.main()"
    script += "; print({'torch', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("set()\n"), done.stderr
    assert data.read_meta(tmp_path / "out")["splits"]["train"]["tokens"] > 5_000_000
    first = bytes(np.fromfile(tmp_path / "out/train.bin", "<u2", 30).tolist()).decode()
    assert repr(first)[1:-1] in done.stdout  # a person sees what was read


def test_a_second_run_is_up_to_date_and_other_arguments_or_files_are_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    arguments = [
        "files",
        tmp_path / "a.txt",
        "--sample_by=line",
        "--val_fraction=0.3",
        f"--out={tmp_path / 'out'}",
    ]
    assert prepare(*arguments) == 0
    before = (tmp_path / "out/train.bin").stat().st_mtime_ns
    capsys.readouterr()
    assert prepare(*arguments, "--workers=1") == 0 and "is up to date" in capsys.readouterr().out
    assert "different val_fraction, seed;" in last_line(
        capsys, prepare(*arguments, "--val_fraction=0.5", "--seed=1")
    )
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\nfour\n")
    assert "different paths" in last_line(capsys, prepare(*arguments))
    assert (tmp_path / "out/train.bin").stat().st_mtime_ns == before and data.read_meta(tmp_path / "out")


def test_nothing_that_is_there_is_overwritten(tmp_path, data_dir, capsys):
    """A damaged data directory, another one's, a model's: only a person can tell whether it may go."""
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    (copy / "train.bin").write_bytes(b"\1" + token_files(data_dir)[0][1:])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for out, words in ((copy, "copy is damaged; .* in a new place"), (tmp_path / "model", "manifest.json: No such file")):
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        arguments = ["files", data_dir.parent / "corpus.jsonl", "--val_fraction=0.1", f"--out={out}"]
        assert re.search(words, last_line(capsys, prepare(*arguments)))
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_two_preparations_of_one_directory_do_not_meet(tmp_path, data_dir, capsys):
    arguments = ["files", data_dir.parent / "corpus.jsonl", f"--out={tmp_path / 'out'}"]
    with storage.lock(tmp_path / ".lock-out"):
        assert "in use by another process" in last_line(capsys, prepare(*arguments))


def test_kills_at_random_moments_leave_the_bytes_of_an_uninterrupted_run(tmp_path, documents):
    lines = [json.dumps({"text": f"{i} {documents[i % 60]}"}) + "\n" for i in range(8000)]  # 12 MB
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    arguments = ["prepare_data.py", "files", tmp_path / "corpus.jsonl", f"--out={tmp_path / 'out'}"]
    moments = random.Random(1337)
    for _ in range(3):
        process = subprocess.Popen(
            map(str, [sys.executable, *arguments]), cwd=ROOT, stdout=subprocess.DEVNULL
        )
        while not list(tmp_path.glob(".tmp-out/*.bin")) and process.poll() is None:  # until it writes
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "out").exists()
    assert run_script(*arguments).returncode == 0
    assert prepare(*arguments[1:-1], f"--out={tmp_path / 'whole'}") == 0
    assert token_files(tmp_path / "out") == token_files(tmp_path / "whole")
    assert not (tmp_path / ".tmp-out").exists()  # what a kill had left
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "meta.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "train.bin",
        "val.bin",
    ]


def test_a_full_disk_is_one_line_and_leaves_nothing_that_looks_finished(tmp_path, data_dir, capsys, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "fsync", full)
    code = prepare("files", data_dir.parent / "corpus.jsonl", f"--out={tmp_path / 'out'}")
    assert "No space left on device" in last_line(capsys, code, 1)
    assert [path.name for path in tmp_path.glob("*out*")] == [".lock-out"]


# ---- the hub's corpora, from a directory laid out like a repository


@pytest.fixture(scope="module")
def repository(tmp_path_factory, documents):
    """Shards of parquet in a folder for each config, which the README's header names, as the hub has them."""
    import datasets

    folder = tmp_path_factory.mktemp("repository")
    header = ["---", "configs:"]
    for name, share in (("10BT", 30), ("100BT", 60)):
        (folder / name).mkdir()
        for shard in range(3):
            rows = documents[:share][shard * share // 3 : (shard + 1) * share // 3]
            table = datasets.Dataset.from_dict({"text": rows, "id": [f"<urn:{row[:9]}>" for row in rows]})
            table.to_parquet(folder / name / f"{shard:03d}_00000.parquet")
        header += [f"- config_name: sample-{name}", f"  data_files: {name}/*.parquet"]
    (folder / "README.md").write_text("\n".join([*header, "---", ""]))
    return folder


def test_fineweb_edu_is_read_by_config_name(tmp_path, repository, documents):
    for options, share in ([], 30), (["--config_name=sample-100BT"], 60):
        out = tmp_path / str(share)
        arguments = [
            "fineweb-edu",
            f"--repository={repository}",
            "--tokenizer=bytes",
            "--workers=2",
            *options,
        ]
        assert prepare(*arguments, f"--out={out}") == 0
        assert texts_of(out) == sorted(documents[:share])
        meta = data.read_meta(out)
        assert meta["config_name"] == f"sample-{'10BT' if share == 30 else '100BT'}" and meta["revision"]
        assert meta["splits"]["val"]["documents"] == 1  # nanoGPT's 0.0005


def test_an_empty_directory_is_filled_and_what_is_there_is_verified_without_writing_beside_it(tmp_path, data_dir):
    (tmp_path / "empty").mkdir()
    arguments = ["files", data_dir.parent / "corpus.jsonl", "--val_fraction=0.1", f"--out={tmp_path / 'empty'}"]
    assert prepare(*arguments) == 0 and token_files(tmp_path / "empty") == token_files(data_dir)
    (tmp_path / ".lock-empty" / ".lock").unlink(missing_ok=True)
    (tmp_path / ".lock-empty").rmdir()
    assert prepare(*arguments) == 0 and [path.name for path in tmp_path.glob("*empty*")] == ["empty"]


def test_a_link_that_leads_nowhere_is_refused_before_anything_is_encoded(tmp_path, data_dir, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    code = prepare("files", data_dir.parent / "corpus.jsonl", f"--out={tmp_path / 'link'}")
    assert "expected a data directory" in last_line(capsys, code) and "train:" not in capsys.readouterr().out


def test_some_files_of_a_repository_can_be_read_alone(tmp_path, repository, documents):
    arguments = ["fineweb-edu", f"--repository={repository}", "--tokenizer=bytes", f"--out={tmp_path / 'out'}"]
    assert prepare(*arguments, "--data_files=10BT/00[01]*.parquet") == 0  # two of three: twenty documents of thirty
    assert texts_of(tmp_path / "out") == sorted(documents[:20])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux's /proc lists a process's children")
def test_no_other_process_works_for_a_preparation(tmp_path, repository):
    """A pool of processes, one of which is killed by the system, waits for ever. Threads alone encode and read."""
    command = ["prepare_data.py", "fineweb-edu", f"--repository={repository}", "--tokenizer=bytes", "--workers=2"]
    command = [sys.executable, *command, f"--out={tmp_path / 'out'}"]
    children = set()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for task in Path(f"/proc/{process.pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):  # a thread that has ended
                    children |= set(task.read_text().split())
    assert process.returncode == 0 and children == set()


def test_a_directory_of_the_same_name_with_other_documents_is_a_different_corpus(
    tmp_path, repository, documents
):
    import datasets

    copy = shutil.copytree(repository, tmp_path / repository.name)
    datasets.Dataset.from_dict({"text": ["new"], "id": ["x"]}).to_parquet(copy / "10BT/000_00000.parquet")
    for folder, expected in ((repository, documents[:30]), (copy, ["new", *documents[10:30]])):
        out = folder.parent / "out"
        assert prepare("fineweb-edu", f"--repository={folder}", "--tokenizer=bytes", f"--out={out}") == 0
        assert texts_of(out) == sorted(expected)


def test_the_first_place_with_openwebtext_is_taken_and_its_counts_are_checked(
    tmp_path, repository, documents, monkeypatch, capsys
):
    order = prepare_data.split(60, 0.0005, 2357)
    tokens = {name: sum(len(documents[i].encode()) + 1 for i in order[name]) for name in order}
    in_bytes = tokenizer("bytes")
    monkeypatch.setattr(prepare_data.tokenizers, "tokenizer", lambda name: in_bytes)  # GPT-2's may not be here
    monkeypatch.setitem(prepare_data.HUB, "openwebtext", [("no/such", "main"), (str(repository), "main")])
    arguments = ["openwebtext", "--config_name=sample-100BT"]
    error = last_line(capsys, prepare(*arguments, "--repository=no/such", f"--out={tmp_path / 'none'}"))
    assert "no/such at main: " in error and "--repository" in error

    assert f"val: found {tokens['val']} tokens in 1 of 60 documents, expected 4434897" in last_line(
        capsys, prepare(*arguments, f"--out={tmp_path / 'wrong'}")
    )
    monkeypatch.setattr(prepare_data, "N_TOKENS", tokens)
    assert prepare(*arguments, f"--out={tmp_path / 'right'}") == 0
    assert data.read_meta(tmp_path / "right")["repository"] == str(repository)
    monkeypatch.setattr(prepare_data, "N_TOKENS", tokens | {"train": 7})
    assert "train: found" in last_line(capsys, prepare(*arguments, f"--out={tmp_path / 'wrong'}"))
    assert prepare(*arguments, "--max_tokens=9000", f"--out={tmp_path / 'cut'}") == 0


def test_a_config_that_the_repository_lacks_is_named_with_those_it_has(tmp_path, repository, capsys):
    arguments = ["fineweb-edu", f"--repository={repository}", "--config_name=sample-1BT", "--tokenizer=bytes"]
    error = last_line(capsys, prepare(*arguments, f"--out={tmp_path / 'out'}"))
    assert "sample-1BT" in error and "sample-10BT" in error


def test_files_in_the_output_folder_are_no_source(tmp_path, capsys):
    (tmp_path / "novels").mkdir()
    (tmp_path / "novels" / "a.txt").write_text("one two\n\nthree four\n" * 50)
    command = ["files", tmp_path / "novels", "--sample_by=paragraph", f"--out={tmp_path / 'novels/data'}"]
    assert prepare(*command, "--val_fraction=0.1") == 0
    assert prepare(*command, "--val_fraction=0.1") == 0 and "is up to date" in capsys.readouterr().out
