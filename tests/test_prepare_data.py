"""prepare_data.py and corpus.py on what the hub serves, in parts, after kills: all offline, with real files.

python -m pytest tests/test_prepare_data.py -q
"""

import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import select
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
from conftest import call_script, run_script

import corpus
import data
import prepare_data
from plumbing.configurator import UserError


def prepare(*arguments) -> int:
    return call_script(prepare_data, *arguments)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def small_parts(monkeypatch):
    """Parts and jobs so small that a small corpus has many."""
    monkeypatch.setattr(prepare_data, "PART_BYTES", 20_000)
    monkeypatch.setattr(prepare_data, "JOB_TOKENS", 2_000)
    monkeypatch.setattr(prepare_data, "SAMPLE_TOKENS", 2_000)


def token_files(folder) -> list[bytes]:
    return [(folder / f"{split}.bin").read_bytes() for split in ("train", "val")]


@pytest.fixture(scope="module")
def repository(tmp_path_factory, documents):
    """A dataset in parquet as the hub has them: shards in a folder for each config, named in the README's header."""
    import datasets

    folder = tmp_path_factory.mktemp("repository")
    header = ["---", "configs:"]
    for name, share in (("sample-10BT", 30), ("sample-100BT", 60)):
        path = folder / "sample" / name.removeprefix("sample-")
        path.mkdir(parents=True)
        for shard in range(3):
            rows = documents[:share][shard * share // 3 : (shard + 1) * share // 3]
            table = datasets.Dataset.from_dict({"text": rows, "id": [f"<urn:{row[:9]}>" for row in rows]})
            table.to_parquet(path / f"{shard:03d}_00000.parquet", batch_size=7)
        header += [f"- config_name: {name}", "  data_files:", "  - split: train", f"    path: sample/{path.name}/*"]
    (folder / "README.md").write_text("\n".join([*header, "---", ""]))
    return folder


@pytest.fixture
def small_openwebtext(monkeypatch, documents):
    """OpenWebText's entry, with the counts of `repository`'s larger config: 60 documents, of which one is val."""
    order = prepare_data.split(60, 0.0005, 2357)
    encoding = data.tokenizer("bytes")
    tokens = {name: sum(len(encoding.encode(documents[i])) + 1 for i in order[name]) for name in order}
    hub = dataclasses.replace(corpus.HUB["openwebtext"], documents=60, tokens=tuple(tokens.items()))
    monkeypatch.setitem(corpus.HUB, "openwebtext", hub)
    monkeypatch.setattr(prepare_data, "tokenizer", lambda name: data.tokenizer("bytes"))  # GPT-2's may not be here
    return tokens


# ---- the hub's corpora


def test_fineweb_edu_is_read_by_config_name_and_its_revision_recorded(tmp_path, repository, documents):
    arguments = ["fineweb-edu", f"--repository={repository}", "--tokenizer=bytes"]
    for name, share in (("sample-10BT", 30), ("sample-100BT", 60)):
        out = tmp_path / name
        assert prepare(*arguments, *[f"--config_name={name}"] * (share == 60), f"--out={out}") == 0  # 10BT: default
        order = prepare_data.split(share, 0.0005, 2357)
        expected = [b"".join(bytes(f"{documents[i]}", "utf-8") for i in order[split]) for split in ("train", "val")]
        written = [np.frombuffer(file, "<u2") for file in token_files(out)]
        assert [bytes(tokens[tokens != 256].tolist()) for tokens in written] == expected
        meta = data.verify(out)
        assert (meta["source"], meta["repository"], meta["config_name"]) == ("fineweb-edu", str(repository), name)
        assert len(meta["revision"]) == 40 and "permutation" in meta["split_rule"]


def test_a_config_that_the_repository_lacks_is_named_with_those_it_has(tmp_path, repository, capsys):
    assert (
        prepare(
            "fineweb-edu",
            f"--repository={repository}",
            "--config_name=sample-1BT",
            "--tokenizer=bytes",
            f"--out={tmp_path / 'o'}",
        )
        == 2
    )
    error = capsys.readouterr().err
    assert "sample-1BT" in error and "sample-10BT" in error and error.count("\n") == 1 and not (tmp_path / "o").exists()


def test_openwebtext_is_held_against_the_number_of_its_documents(tmp_path, repository, capsys):
    arguments = ["openwebtext", f"--repository={repository}", "--config_name=sample-100BT", "--tokenizer=bytes"]
    assert prepare(*arguments, f"--out={tmp_path / 'out'}") == 2
    error = capsys.readouterr().err.strip()
    assert "has 60 documents, expected 8,013,769" in error and "--repository=dvruette/openwebtext" in error
    assert error.count("\n") == 0 and not (tmp_path / "out").exists()


def test_openwebtext_is_held_against_the_number_of_its_tokens(
    tmp_path, repository, small_openwebtext, monkeypatch, capsys
):
    arguments = ["openwebtext", f"--repository={repository}", "--config_name=sample-100BT"]
    assert prepare(*arguments, f"--out={tmp_path / 'right'}") == 0
    assert data.verify(tmp_path / "right")["splits"]["train"]["tokens"] == small_openwebtext["train"]
    for split in ("val", "train"):
        wrong = tuple((small_openwebtext | {split: 1234}).items())
        monkeypatch.setitem(corpus.HUB, "openwebtext", dataclasses.replace(corpus.HUB["openwebtext"], tokens=wrong))
        assert prepare(*arguments, f"--out={tmp_path / split}") == 2
        error = capsys.readouterr().err
        assert f"{split} has {small_openwebtext[split]:,} tokens, expected 1,234" in error and "--revision" in error
        assert not (tmp_path / split / "meta.json").exists()
        assert (tmp_path / split / "train.bin").exists() == (split == "train")  # a wrong val is seen before train


def test_a_directory_of_the_same_name_with_other_documents_is_another_corpus(tmp_path, repository, documents):
    import datasets

    shutil.copytree(repository, tmp_path / "repository")
    arguments = ["fineweb-edu", f"--repository={tmp_path / 'repository'}", "--tokenizer=bytes", "--workers=1"]
    revisions = []
    for i in range(2):
        assert prepare(*arguments, f"--out={tmp_path / str(i)}") == 0
        revisions.append(data.verify(tmp_path / str(i))["revision"])
        path = tmp_path / "repository/sample/10BT/000_00000.parquet"
        datasets.Dataset.from_dict({"text": documents[50:60], "id": ["x"] * 10}).to_parquet(path)
    assert revisions[0] != revisions[1] and token_files(tmp_path / "0") != token_files(tmp_path / "1")


def test_the_first_place_that_loads_is_taken_and_named(tmp_path, repository, small_openwebtext, monkeypatch):
    places = ((str(tmp_path / "nothing here"), "main"), (str(repository), "main"))
    hub = dataclasses.replace(corpus.HUB["openwebtext"], places=places, config_name="sample-100BT")
    monkeypatch.setitem(corpus.HUB, "openwebtext", hub)
    assert prepare("openwebtext", f"--out={tmp_path / 'out'}") == 0
    assert data.verify(tmp_path / "out")["repository"] == str(repository)


def test_a_corpus_out_of_reach_names_every_place_and_the_remedy(tmp_path, capsys):
    arguments = ["openwebtext", "--tokenizer=bytes", f"--out={tmp_path / 'out'}"]
    assert prepare(*arguments) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in ("Skylion007/openwebtext at refs/pr/19", "dvruette/openwebtext", "HF_HOME"))
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert prepare(*arguments, "--repository=no/such", "--revision=abc") == 2
    error = capsys.readouterr().err
    assert "no/such at abc" in error and "dvruette" not in error


def test_a_corpus_that_changed_since_it_was_begun_is_refused(tmp_path, repository, capsys):
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(repository, copy)
    config = prepare_data.checked(prepare_data.PrepareConfig("fineweb-edu", repository=str(copy), workers=1))
    texts, origin = corpus.documents(config, None)
    assert corpus.documents(config, origin)[1] == origin and len(texts) == 30
    os.utime(copy / "sample/10BT/000_00000.parquet")
    with pytest.raises(UserError, match=f"found revision .*, expected {origin['revision']}"):
        corpus.documents(config, origin)
    assert not out.exists()


# ---- the result does not depend on workers, kills or max_tokens


def test_workers_and_parts_do_not_change_a_byte(tmp_path, repository, small_parts, monkeypatch):
    arguments = ["fineweb-edu", f"--repository={repository}", "--config_name=sample-100BT", "--tokenizer=bytes"]
    for workers in (1, 2, 3):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / f"cache{workers}")
        assert prepare(*arguments, f"--workers={workers}", f"--out={tmp_path / str(workers)}") == 0
    assert token_files(tmp_path / "1") == token_files(tmp_path / "2") == token_files(tmp_path / "3")
    described = [data.verify(tmp_path / str(workers))["splits"] for workers in (1, 2, 3)]
    assert described[0] == described[1] == described[2]


def test_max_tokens_cuts_train_between_documents_and_leaves_val(tmp_path, data_dir):
    arguments = ["files", data_dir.parent / "corpus.jsonl", "--val_fraction=0.1"]
    whole_train, whole_val = token_files(data_dir)
    tokens = np.frombuffer(whole_train, "<u2")
    third_end = int(np.flatnonzero(tokens == 256)[2]) + 1
    for limit, expected in ((third_end, third_end), (third_end + 1400, third_end), (10**9, len(tokens))):
        out = tmp_path / str(limit)
        assert prepare(*arguments, f"--max_tokens={limit}", f"--out={out}") == 0
        assert token_files(out) == [whole_train[: 2 * expected], whole_val]
        entry = data.verify(out)["splits"]["train"]
        assert entry["documents"] == int((tokens[:expected] == 256).sum()) and entry["max_id"] == 256


def test_no_whole_document_within_max_tokens_is_an_error_with_the_remedy(tmp_path, data_dir, capsys):
    arguments = ["files", data_dir.parent / "corpus.jsonl", f"--out={tmp_path / 'out'}"]
    assert prepare(*arguments, "--max_tokens=10") == 2
    assert "train 0, val 1; expected at least 1 each; raise --max_tokens" in capsys.readouterr().err
    assert prepare(*arguments) == 0  # what had failed is not in the way


def test_ten_kills_at_random_moments_leave_the_bytes_of_an_uninterrupted_run(tmp_path, documents, small_parts):
    """The main process alone is killed, as the system does when memory runs out: its workers must go by themselves."""
    lines = [json.dumps({"text": f"{i} {documents[i % 60]}"}) + "\n" for i in range(3000)]  # 4.5 MB, 450 parts
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    arguments = ["files", tmp_path / "corpus.jsonl", "--workers=2"]
    assert prepare(*arguments, f"--out={tmp_path / 'whole'}") == 0
    out, moments, kept = tmp_path / "out", random.Random(1337), [0]
    for _ in range(10):
        alive, held_open = os.pipe()
        process = multiprocessing.get_context("fork").Process(target=prepare, args=(*arguments, f"--out={out}"))
        process.start()
        os.close(held_open)  # by all but that process and its workers
        while tokens_recorded(out) == kept[-1] and process.is_alive():  # not killed before it has begun to work
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert select.select([alive], [], [], 10)[0] and os.read(alive, 1) == b"", "its workers are still there"
        os.close(alive)
        assert not (out / "meta.json").exists()
        kept.append(tokens_recorded(out))
    assert kept == sorted(set(kept)), "each life goes on where the one before was"
    assert prepare(*arguments, f"--out={out}") == 0
    assert token_files(out) == token_files(tmp_path / "whole") and not (out / "progress.json").exists()
    assert data.verify(out)["splits"] == data.verify(tmp_path / "whole")["splits"]


def tokens_recorded(out) -> int:
    if not (out / "progress.json").exists():
        return 0
    return json.loads((out / "progress.json").read_text())["splits"].get("train", {"tokens": 0})["tokens"]


@pytest.fixture
def unfinished(tmp_path, data_dir, small_parts, monkeypatch):
    """A preparation that was stopped halfway in train.bin, and the arguments that go on with it."""
    arguments = ["files", str(data_dir.parent / "corpus.jsonl"), "--val_fraction=0.1", f"--out={tmp_path / 'out'}"]
    record, calls = prepare_data.storage.replace_json, []

    def stop_at_the_third_part(path, value):
        record(path, value)
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data.storage, "replace_json", stop_at_the_third_part)
        assert prepare(*arguments, "--workers=1") == 130
    return tmp_path / "out", arguments


def test_what_is_done_is_not_done_again(unfinished, data_dir, monkeypatch):
    out, arguments = unfinished
    read = json.loads((out / "progress.json").read_text())["splits"]["train"]["read"]
    orders = []
    encoded = prepare_data.encoded
    monkeypatch.setattr(
        prepare_data,
        "encoded",
        lambda pool, order, *rest, **more: orders.append(len(order)) or encoded(pool, order, *rest, **more),
    )
    assert prepare(*arguments) == 0
    assert orders == [0, 54 - read] and 0 < read < 54 and token_files(out) == token_files(data_dir)


@pytest.mark.parametrize("change", ["flip", "cut", "remove"])
def test_a_part_that_is_not_what_was_recorded_is_written_again(unfinished, data_dir, change):
    out, arguments = unfinished
    content = bytearray((out / "train.bin").read_bytes())
    content[5000] ^= 1
    (out / "train.bin").write_bytes(content[:9000] if change == "cut" else content)
    if change == "remove":
        (out / "train.bin").unlink()
    assert prepare(*arguments) == 0 and token_files(out) == token_files(data_dir)


def test_an_unfinished_preparation_is_not_mixed_with_another(unfinished, capsys):
    out, arguments = unfinished
    before = (out / "train.bin").read_bytes()
    assert prepare(*arguments, "--seed=1") == 2 and "another seed" in capsys.readouterr().err
    assert (out / "train.bin").read_bytes() == before


def test_two_preparations_of_one_directory_do_not_meet(unfinished, capsys):
    out, arguments = unfinished
    with prepare_data.storage.lock(out):
        assert prepare(*arguments) == 2
    assert "in use by process" in capsys.readouterr().err


# ---- memory and disk


def test_jobs_in_memory_are_bounded():
    class Pool:
        waiting = most = 0

        def submit(self, _, indices):
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            return SimpleNamespace(result=lambda: self.take(indices))

        def take(self, indices):
            self.waiting -= 1
            return indices.tolist()

    pool = Pool()
    jobs = prepare_data.encoded(pool, np.arange(1003), 10, ahead=8)
    assert [i for job in jobs for i in job] == list(range(1003)) and pool.most == 8


def test_reading_a_table_leaves_no_pages_of_it_in_memory(tmp_path):
    import datasets

    config = prepare_data.checked(prepare_data.PrepareConfig("files", (str(tmp_path / "a.parquet"),), workers=1))
    datasets.Dataset.from_dict({"text": [f"{i} " * 2500 for i in range(4000)]}).to_parquet(config.paths[0])  # 46 MB
    texts, _ = corpus.documents(config, None)

    def mapped() -> int:
        """Megabytes of mapped files that this process holds."""
        status = open("/proc/self/status").read() if os.path.exists("/proc/self/status") else "RssFile: 0"  # noqa: SIM115
        return int(status.split("RssFile:")[1].split()[0]) // 1024

    before = mapped()
    assert [len(texts[i]) for i in range(0, 4000)] == [len(f"{i} " * 2500) for i in range(4000)]
    assert mapped() - before < 15
    assert pickle.loads(pickle.dumps(texts))[17] == texts[17]  # as a spawned worker gets it


def test_a_damaged_copy_of_a_table_names_the_file(tmp_path, repository, capsys):
    arguments = ["fineweb-edu", f"--repository={repository}", "--tokenizer=bytes", "--workers=1"]
    assert prepare(*arguments, f"--out={tmp_path / '0'}") == 0
    (arrow,) = (tmp_path / "cache").rglob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:20_000])
    assert prepare(*arguments, f"--out={tmp_path / '1'}") == 2
    error = capsys.readouterr().err
    assert "remove" in error and str(arrow.parent) in error and error.count("\n") == 1


@pytest.mark.parametrize("cached,words", [(False, "reading"), (True, "the token files")])
def test_what_does_not_fit_on_the_disk_is_not_begun(tmp_path, repository, monkeypatch, capsys, cached, words):
    """Neither the copy that `datasets` makes, nor, if that is there, the token files."""
    arguments = ["fineweb-edu", f"--repository={repository}", "--tokenizer=bytes"]
    if cached:
        assert prepare(*arguments, f"--out={tmp_path / 'other'}") == 0
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert prepare(*arguments, f"--out={tmp_path / 'out'}") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words}") and "where 0.00 GB are free; free some, set HF_HOME or --out" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_folders_on_one_disk_must_fit_there_together(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    corpus.check_disk("one", {str(tmp_path / "a/b"): 6e8})
    assert "one: needs about 0.60 GB in" in capsys.readouterr().out
    with pytest.raises(UserError, match="0.60 GB in .*/a/b and 0.50 GB in .*/c, where 1.00 GB are free"):
        corpus.check_disk("both", {str(tmp_path / "a/b"): 6e8, str(tmp_path / "c"): 5e8})


def test_the_disk_that_is_needed_is_said(tmp_path, data_dir, capsys):
    assert prepare("files", data_dir.parent / "corpus.jsonl", f"--out={tmp_path / 'out'}") == 0
    size = sum(map(len, token_files(tmp_path / "out")))
    assert f"the token files: needs about {size / 1e9:.2f} GB" in capsys.readouterr().out
    config = prepare_data.PrepareConfig("files")
    texts = corpus.TextFiles([str(data_dir.parent / "corpus.jsonl")], "line", "text")
    indices = prepare_data.split(60, 0.005, 2357)
    assert prepare_data.expected_size(config, texts, data.tokenizer("bytes"), "<u2", indices)[0] == size


# ---- tokenizers


def test_a_vocabulary_beyond_16_bits_is_written_in_32(tmp_path, monkeypatch):
    single = [bytes([i]) for i in range(256)]
    ranks = {word: rank for rank, word in enumerate([*single, *(a + b for a in single for b in single)])}
    special = {data.END_OF_TEXT: len(ranks)}
    large = tiktoken.Encoding("large", pat_str=r"(?s).", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"large": large}[name])
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "naïve"}) + "\n" + json.dumps({"text": "é"}) + "\n")
    assert (
        prepare("files", tmp_path / "a.jsonl", "--tokenizer=large", "--val_fraction=0.5", f"--out={tmp_path / 'o'}")
        == 0
    )
    meta = data.verify(tmp_path / "o")
    assert meta["dtype"] == "<u4" and meta["vocab_size"] == 65793 and meta["splits"]["train"]["max_id"] == 65792
    for split in ("train", "val"):
        tokens = data.open_tokens(tmp_path / "o", split, 1, 65793)
        assert large.decode(tokens[:-1].tolist()) in ("naïve", "é") and tokens[-1] == 65792


# ---- corpora with something wrong


@pytest.mark.parametrize(
    "name,content,words",
    [
        ("a.jsonl", b"", "documents: train 0, val 0"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{nonsense\n',
            "a.jsonl, line 2: expected a JSON object, found: Expecting property",
        ),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "a.jsonl, line 2: expected a JSON object, found: list"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\xff"}\n', "a.jsonl, line 2: expected a JSON object, found: 'utf-8'"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b"}\n',
            "a.jsonl, line 2: no column 'text'; found body; set --text_column",
        ),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": 7}\n',
            "a.jsonl, line 2: found int, expected text in 'text'",
        ),
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n\n', "documents with text: train 0, val 0"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "b"}\n{"text": null}\n',
            "val 0; expected at least 1 each; add documents or raise",
        ),
        ("a.txt", b"", "documents: train 0, val 1"),
        ("a.parquet", b"nonsense", "a.parquet: not readable as parquet: Parquet magic bytes not found"),
        ("a.parquet", b"CUT", "a.parquet: not readable as parquet"),
        ("a.parquet", b"NO ROWS", "parquet: found no rows in a split train"),
        ("a.parquet", b"NO COLUMN", "no column 'text'; found body"),
        ("a.parquet", b"NO TEXT", "column 'text' holds int64, expected text; choose another --text_column"),
    ],
)
def test_a_corpus_that_is_wrong_is_one_line_and_leaves_nothing_that_looks_finished(
    tmp_path, capfd, name, content, words
):
    import datasets

    if content.isupper():
        table = {
            "NO ROWS": {"text": []},
            "NO COLUMN": {"body": ["a", "b"]},
            "NO TEXT": {"text": [1, 2]},
            "CUT": {"text": ["a" * 999, "b"]},
        }
        datasets.Dataset.from_dict(table[content.decode()]).to_parquet(tmp_path / name)
        capfd.readouterr()
        if content == b"CUT":
            (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    else:
        (tmp_path / name).write_bytes(content)
    assert prepare("files", tmp_path / name, "--workers=1", f"--out={tmp_path / 'out'}") == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "meta.json").exists() and not (tmp_path / "out" / "progress.json").exists()


def test_what_datasets_logs_of_a_damaged_table_is_not_a_second_line(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"nonsense")
    done = run_script("prepare_data.py", "files", tmp_path / "a.parquet", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_bad_line_far_into_a_corpus_is_named_and_what_was_done_is_not_taken_for_finished(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(prepare_data, "SAMPLE_DOCUMENTS", 3)  # so that a worker meets it
    order = prepare_data.split(50, 0.005, 2357)["train"]
    lines = [json.dumps({"text": f"number {i}"}) for i in range(50)]
    lines[order[40]] = '{"text": '
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert prepare("files", tmp_path / "a.jsonl", f"--out={tmp_path / 'out'}") == 2
    error = capsys.readouterr().err
    assert f"a.jsonl, line {order[40] + 1}: expected a JSON object" in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "meta.json").exists()


def test_options_of_another_source_are_refused(tmp_path, capsys):
    for arguments, words in (
        (["python", "a.txt"], "paths are for: files"),
        (["files", "a.txt", "--revision=main"], "are for: openwebtext, fineweb-edu"),
        (["python", "--max_tokens=0"], "max_tokens 0; expected"),
        (["fineweb-edu", f"--repository={tmp_path}", "--revision=v1"], "is a directory and has none; leave it out"),
    ):
        assert prepare(*arguments, f"--out={tmp_path / 'out'}") == 2 and words in capsys.readouterr().err


def test_a_machine_without_datasets_reads_text_and_names_what_parquet_needs(tmp_path, data_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert prepare("files", data_dir.parent / "corpus.jsonl", "--val_fraction=0.1", f"--out={tmp_path / 'out'}") == 0
    assert token_files(tmp_path / "out") == token_files(data_dir)
    (tmp_path / "a.parquet").write_bytes(b"x")
    assert prepare("files", tmp_path / "a.parquet", f"--out={tmp_path / 'p'}") == 2
    assert "pip install -r requirements.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "cut,expected",
    [
        ("document", ["one\r\n\n\ntwo\nlines\n \nlast"]),
        ("paragraph", ["one", "", "two\nlines\n ", "last"]),
        ("line", ["one", "", "", "two", "lines", " ", "last"]),
    ],
)
def test_a_text_file_is_cut_into_documents(tmp_path, cut, expected):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"one\r\n\n\ntwo\nlines\n \nlast")
    texts = corpus.TextFiles([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], cut)
    assert [text for text in texts if text] == [text for text in expected if text]
