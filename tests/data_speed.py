"""prepare_data.py against nanoGPT's own pipeline and bare tiktoken: speed, equal tokens, memory. Minutes; not a test.

    python tests/data_speed.py CORPUS.parquet NANOGPT/data/openwebtext/prepare.py        # 200 MB of text, 3 times
    python tests/data_speed.py CORPUS.parquet NANOGPT/data/openwebtext/prepare.py 1000 1

The corpus is repeated to so many MB, in shards and row groups like the hub's. Each contender is a process of its own
with an empty cache, timed from its start to its end, in turn; nanoGPT's script is run as it is, but for the data set
it loads and, since it needs 1,024 documents in a split, the number of batches it writes. bare tiktoken is two
processes that encode documents they hold in memory and keep nothing: neither start nor reading counts, so that what
prepare_data.py says of its encoding is set against it too. In brackets: seconds, seconds of the processors. Memory is
measured in another run: the sum over the processes of what each has to itself and its share of the rest (PSS).
"""

import contextlib
import hashlib
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parent.parent
BARE = """
import multiprocessing, sys, time, pyarrow.parquet, tiktoken
texts = [text for path in sys.argv[1:] for text in pyarrow.parquet.read_table(path).column("text").to_pylist()]
encoding = tiktoken.get_encoding("gpt2")
def encode_half(k):
    started, processor = time.time(), time.process_time()
    for text in texts[k::2]:
        encoding.encode_ordinary(text)
    return started, time.time(), time.process_time() - processor
with multiprocessing.get_context("fork").Pool(2) as pool:
    begun, ended, processor = zip(*pool.map(encode_half, range(2), chunksize=1))
print(max(ended) - min(begun), sum(processor))
"""


def repeat(corpus: str, megabytes: float, folder: Path) -> tuple[list[str], int]:
    """Write a corpus again and again, in shards of about 100 MB; return these and how many bytes of text they hold."""
    texts = pq.read_table(corpus, columns=["text"])
    size = sum(len(text.encode()) for text in texts.column("text").to_pylist())
    copies = -(-int(megabytes * 1e6) // size)
    shards, a_shard = [], max(1, round(100e6 / size))
    for begin in range(0, copies, a_shard):
        shards.append(str(folder / f"{begin:05d}.parquet"))
        tables = [texts] * min(a_shard, copies - begin)
        pq.write_table(pa.concat_tables(tables), shards[-1], row_group_size=1000)
    return shards, copies * size


def ours(shards: list[str], out: Path) -> list[str]:
    command = [sys.executable, str(ROOT / "prepare_data.py"), "files", *shards, "--tokenizer=gpt2", "--workers=2"]
    return [*command, "--val_fraction=0.0005", f"--out={out}"]


def nanogpt(script: str, shards: list[str], out: Path) -> list[str]:
    """nanoGPT's script beside the files it will write, with another data set to load."""
    text = Path(script).read_text()
    line = next(line for line in text.splitlines() if "load_dataset(" in line and "=" in line.split("load_dataset(")[0])
    text = text.replace(line, line.replace('"openwebtext"', f'"parquet", data_files={{"train": {shards!r}}}'))
    text = text.replace("total_batches = 1024", "total_batches = min(1024, len(dset))")  # it fails on an empty batch
    out.mkdir()
    (out / "prepare.py").write_text(text)
    return [sys.executable, str(out / "prepare.py")]


def environment(cache: Path) -> dict:
    return os.environ | {"HF_HOME": str(cache), "HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


def timed(command: list[str], cache: Path) -> tuple[float, float, str]:
    """Seconds by the clock and of the processors that a command took, and what it printed."""
    begun, cpu = time.perf_counter(), sum(os.times()[2:4])
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(cache)
    )
    return time.perf_counter() - begun, sum(os.times()[2:4]) - cpu, done.stdout


def descendants(pid: int) -> list[int]:
    children = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            children += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return [pid, *(pid for child in children for pid in descendants(child))]


def peak_memory(command: list[str], cache: Path) -> dict[str, float]:
    """The largest sum over a command's processes, in GB: of their shares (Pss); with shared pages for each (Rss)."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(cache))
    peak = {"Pss": 0, "Rss": 0}
    while process.poll() is None:
        sums = dict.fromkeys(peak, 0)
        for pid in descendants(process.pid):
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
                    name, value = line.split(":")
                    sums[name] = sums.get(name, 0) + int(value.split()[0])
        peak = {name: max(peak[name], sums[name]) for name in peak}
        time.sleep(0.1)
    assert process.returncode == 0
    return {name: value * 1024 / 1e9 for name, value in peak.items()}


def killed(command: list[str], out: Path, cache: Path, seconds: float) -> list[int]:
    """Kill a command ten times at random and let it end; return how much of train.bin was recorded at each kill.

    Every other time the clock starts with the command, else when it has begun to write.
    """
    moments, recorded, progress = random.Random(1337), [], out / "progress.json"
    while len(recorded) < 10:
        before = progress.stat().st_mtime_ns if progress.exists() else 0
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(cache)
        )
        while len(recorded) % 2 and (progress.stat().st_mtime_ns if progress.exists() else 0) == before:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, seconds))
        process.kill()
        process.wait()
        if (out / "meta.json").exists():  # it ended before it was killed
            shutil.rmtree(out)
            continue
        splits = json.loads(progress.read_text())["splits"] if progress.exists() else {}
        recorded.append(splits.get("train", {"tokens": 0})["tokens"])
    timed(command, cache)
    return recorded


def hashes(folder: Path) -> list[str]:
    return [hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest()[:12] for split in ("train", "val")]


def main():
    corpus, script, *numbers = sys.argv[1:]
    megabytes, repetitions = float((numbers or [200])[0]), int((numbers[1:] or [3])[0])
    folder = Path(tempfile.mkdtemp(prefix="inheritune-data-"))
    shards, n_bytes = repeat(corpus, megabytes, folder)
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{n_bytes / 1e6:.0f} MB of text in {len(shards)} files, {machine}", flush=True)
    seconds: dict[str, list] = {"ours": [], "nanoGPT": [], "bare tiktoken": [], "ours, encoding": []}
    for i in range(repetitions):
        load = os.getloadavg()[0]
        commands = {"ours": ours(shards, folder / f"ours{i}")}
        commands["nanoGPT"] = nanogpt(script, shards, folder / f"nanogpt{i}")
        for name, command in commands.items():
            *took, printed = timed(command, folder / "cache")
            seconds[name].append(took)
            shutil.rmtree(folder / "cache")
            if name == "ours":
                tokens, speed = re.search(r"train\.bin: ([\d,]+) .* ([\d,]+) tokens a second", printed).groups()
                seconds["ours, encoding"].append([int(tokens.replace(",", "")) / int(speed.replace(",", ""))])
        bare = subprocess.run([sys.executable, "-c", BARE, *shards], check=True, capture_output=True)
        seconds["bare tiktoken"].append([*map(float, bare.stdout.split())])
        assert hashes(folder / f"ours{i}") == hashes(folder / f"nanogpt{i}") == hashes(folder / "ours0")
        print(
            f"load {load:.1f}:", {name: [round(x, 1) for x in took[-1]] for name, took in seconds.items()}, flush=True
        )
    tokens = sum((folder / "ours0" / f"{split}.bin").stat().st_size for split in ("train", "val")) // 2
    print(f"tokens equal: {tokens:,}; sha256 of train.bin, val.bin: {' '.join(hashes(folder / 'ours0'))}")
    clock = {name: statistics.median(took[0] for took in values) for name, values in seconds.items()}
    processor = {name: statistics.median(took[-1] for took in values) for name, values in seconds.items()}
    print(*(f"{name}: {tokens / value / 1e6:.2f} M tokens a second" for name, value in clock.items()), sep="\n")
    print(
        f"nanoGPT / ours: {clock['nanoGPT'] / clock['ours']:.2f} by the clock, "
        f"{processor['nanoGPT'] / processor['ours']:.2f} of the processors\n"
        f"bare tiktoken / ours: {clock['bare tiktoken'] / clock['ours, encoding']:.2f} encoding, "
        f"{clock['bare tiktoken'] / clock['ours']:.2f} with start and reading"
    )

    memory = peak_memory(ours(shards, folder / "memory"), folder / "cache")
    print(f"peak memory: {memory['Pss']:.2f} GB, {memory['Rss']:.2f} GB with shared pages counted for each process")
    a_while = clock["ours"] / 4
    found = killed(ours(shards, folder / "killed"), folder / "killed", folder / "cache", a_while)
    print(f"killed ten times; tokens of train.bin kept at each kill: {found}")
    print(f"the same bytes: {hashes(folder / 'killed') == hashes(folder / 'ours0')}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
