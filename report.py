"""Tables and figures of a recipe: report.md, loss.png, differences.png, rank.png.

    python report.py out/demo            # writes its report.md again; inheritune.py ends with it
    python report.py out/gpt2-medium --paper=medium   # beside the paper's results
    python report.py out/mine --animate  # one run trained with --track_rank: its ranks by step

It reads recipe.json (written by inheritune.py), each run's metrics.jsonl and last checkpoint, and
the results of analyze_attention.py. Every checkpoint is verified before it is read.
"""

from plumbing import configurator  # isort: skip  # before the slow imports: a quiet Ctrl-C

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.utils.benchmark import Timer

import data
from baselines import CLAIMS, PAPER
from plumbing import figures, pretrained, resume, storage
from plumbing.configurator import UserError

NOTES = """
- Loss: nats per token, the mean over {windows} validation windows ± its standard error.
- Difference: loss minus the reference's, paired by window and seed: a model of one seed is compared
  with the reference of that seed. The 95% interval covers the choice of text, not that of the seed.
  Spread: its standard deviation over the seeds.
- Tokens, all: its own and those of the models it began from or was taught by, not other rounds'.
- FLOPs: 6 for each weight of a matrix product and token, and attention.
- Reached: the share of its own steps after which it had the reference's final loss.
- Latency: one sequence forward on the CPU, relative to the reference.
- Verdict: matched if the difference is at most {tolerance:g} nats (the recipe's tolerance).
  Within noise: the interval contains 0."""


@dataclass
class ReportConfig:
    """Write the report of a recipe from what its runs left behind."""

    out_dir: tyro.conf.Positional[str]  # of a recipe, or of one run trained with --track_rank
    animate: bool = False  # for one run, write collapse.gif too
    paper: str = ""  # the paper's results to put beside: small, medium, medium-200k, large, xl


# ---- numbers


def val_losses(path: Path) -> np.ndarray:
    """The loss of every validation window (windows,), in nats per token, of a checkpoint."""
    return np.array(storage.read_json(path / "val_losses.json")["losses"])


def seed_differences(paths: list[Path], others: list[Path]) -> np.ndarray:
    """Loss of one model minus the other's, seed by seed (seeds, windows). Raises UserError."""
    pairs = zip(paths, others, strict=False)  # a baseline may have fewer seeds
    losses = [(val_losses(path), val_losses(other)) for path, other in pairs]
    if len({len(each) for pair in losses for each in pair}) > 1:
        raise UserError(f"{paths[0]} and {others[0]} were evaluated on different windows")
    return np.array([ours - theirs for ours, theirs in losses])


def paired_difference(paths: list[Path], others: list[Path]) -> tuple[float, float]:
    """Mean difference of two models' losses on the same windows, and half its 95% interval.

    The mean over seeds comes first. Pairing removes what makes a window hard for both models.
    """
    differences = seed_differences(paths, others).mean(0)  # (windows,)
    mean, error = data.mean_and_error(differences)
    return mean, 1.96 * error if len(differences) > 1 else math.inf


def verdict(difference: float, interval: float, tolerance: float) -> str:
    """Matched: a difference of at most the tolerance. Better or worse: the interval excludes 0."""
    matched = "matched" if difference <= tolerance else "not matched"
    if abs(difference) <= interval:
        return f"{matched}, within noise"
    return f"{matched}, {'better' if difference < 0 else 'worse'}"


def curve(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and validation loss of every evaluation, the mean over the seeds' runs."""
    runs = []
    for path in paths:
        log = resume.read_log(path.parent / "metrics.jsonl")
        runs.append({line["tokens"]: line["val_loss"] for line in log if "val_loss" in line})
        runs[-1][resume.read_state(path)["tokens"]] = val_losses(path).mean()  # lines may be lost
    tokens = sorted(set.intersection(*map(set, runs)))
    return np.array(tokens), np.array([np.mean([run[t] for run in runs]) for t in tokens])


def spent(model: dict, recipe: dict, out_dir: Path) -> list[str]:
    """Tokens and FLOPs of the first seed's model and of all it was made from. "?": unknown."""
    sources = {Path(each["paths"][0]).parent: each["sources"] for each in recipe["models"]}
    paths = [model["paths"][0]]
    for path in paths:  # the list grows while it is walked
        paths += sources[Path(path).parent]
    latest = {Path(path).parent: path for path in sorted(paths)}  # of each run, its latest step
    states = [resume.read_state(out_dir / path) for path in latest.values()]
    if any(state["step"] == 0 for state in states):  # a model that was trained elsewhere
        return ["?", "?"]
    tokens, flops = (sum(state[key] for state in states) for key in ("tokens", "flops"))
    return [f"{tokens / 1e6:.2f} M", f"{flops:.2e}"]


@torch.no_grad()
def latency(path: Path, reference: Path) -> float:
    """Time of a forward pass of one sequence, relative to the reference's. The two take turns."""
    timers, threads = [], torch.get_num_threads()
    for model in map(pretrained.load_model, (path, reference)):
        idx = torch.zeros(1, model.config.block_size, dtype=torch.long)
        timers.append(Timer("model(idx)", globals={"model": model, "idx": idx}, num_threads=threads))
    times = np.array([[timer.timeit(1).mean for timer in timers] for _ in range(15)])
    return float(np.median(times[:, 0] / times[:, 1]))


def rows_of(recipe: dict, out_dir: Path) -> list[dict]:
    """A row for each model, the reference first. Verifies every checkpoint. Raises UserError."""
    references = [out_dir / path for path in recipe["models"][0]["paths"]]
    rows, latencies = [], {}  # of each shape: nothing else decides it
    for model in recipe["models"]:
        paths = [out_dir / path for path in model["paths"]]
        for path in paths:
            storage.verify(path)
        config, own = pretrained.read_config(paths[0]), resume.read_state(paths[0])["tokens"]
        losses = np.mean([val_losses(path) for path in paths], axis=0)  # (windows,)
        loss, error = data.mean_and_error(losses)
        each, n = seed_differences(paths, references).mean(1), len(paths)
        difference, interval = paired_difference(paths, references)
        if str(config) not in latencies:
            latencies[str(config)] = latency(paths[0], references[0])
        tokens, values = curve(paths)
        reached = tokens[values <= np.mean([val_losses(p).mean() for p in references[: len(paths)]])]
        tokens_spent, flops_spent = spent(model, recipe, out_dir)
        cells = {
            "model": model["name"],
            "layers": str(config.n_layer),
            "parameters": f"{config.num_params() / 1e6:.2f} M",
            "tokens, own": f"{own / 1e6:.2f} M",
            "tokens, all": tokens_spent,
            "FLOPs, all": flops_spent,
            "val loss": f"{loss:.4f} ± {error:.4f}",
            "difference ± 95%": f"{difference:+.4f} ± {interval:.4f}",
            "spread, seeds": f"{each.std(ddof=1):.4f}, {n}" if n > 1 else "one seed",
            "reached": f"{reached[0] / max(1, tokens[-1]):.0%}" if len(reached) else "never",
            "latency": f"{latencies[str(config)]:.2f}",
            "verdict": verdict(difference, interval, recipe["tolerance"]) if rows else "reference",
        }
        if model["role"] == "target" and len(rows) > 1 and config.n_layer == rows[0]["n_layer"]:  # rounds
            cells["verdict"] += "; no smaller target matched"
        rows.append({
            "name": model["name"], "role": model["role"], "paths": paths, "cells": cells,
            "n_layer": config.n_layer, "own_tokens": own, "loss": loss, "each": each,
            "difference": difference, "interval": interval, "curve": (tokens, values),
        })
    return rows


# ---- tables


def table(cells: list[list[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too. The first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [cells[0], ["-" * width for width in widths], *cells[1:]]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def claims(rows: list[dict]) -> str:
    """The table of claims whose two models are in the recipe."""
    by_name = {name: row for row in rows for name in (row["name"], row["role"])}
    cells = [["claim", "better", "worse", "difference ± 95%", "seeds", "holds"]]
    for text, *pair in CLAIMS:
        if not set(pair) <= by_name.keys():
            continue
        better, worse = (by_name[name] for name in pair)
        difference, interval = paired_difference(better["paths"], worse["paths"])
        lower = seed_differences(better["paths"], worse["paths"]).mean(1) < 0
        holds = "yes" if difference < 0 else "no"
        if abs(difference) <= interval:
            holds = "within noise"
        elif lower.any() != lower.all():
            holds = "depends on the seed"
        cells.append([
            text, better["name"], worse["name"], f"{difference:+.4f} ± {interval:.4f}",
            f"{lower.sum()} of {len(lower)}", holds,
        ])
    return table(cells)


def paper_table(rows: list[dict], key: str) -> str:
    """The losses here beside the paper's, for the models that both have. Raises UserError."""
    configurator.check_key(key, PAPER, "paper")
    cells = [["model", "val loss here", f"in the paper ({key})", "difference"]]
    k = next(row["n_layer"] for row in rows if row["role"] == "target")
    same_k = k == PAPER[key].get("k", k)  # else baselines have other sizes than the paper's
    for row in rows:
        if (theirs := PAPER[key].get(row["name"])) and (same_k or row["role"] != "baseline"):
            difference = row["loss"] - theirs
            cells.append([row["name"], f"{row['loss']:.4f}", f"{theirs:.2f}", f"{difference:+.4f}"])
    return table(cells)


def attention_table(reference: dict) -> str:
    """Ranks and lazy layers of the reference, the target and an untrained model."""
    results = [reference, reference["compared"], reference["untrained"]]
    columns = [result["layers"] for result in results]
    cells = [["", "reference", "target", "untrained"]]
    for layer in range(reference["n_layer"]):
        ranks = [[row["max_rank"] for row in rows if row["layer"] == layer] for rows in columns]
        cells.append([f"MaxRank, layer {layer}", *(f"{r[0]:.2f}" if r else "" for r in ranks)])
    lazy = {"lazy, floor(MaxRank) = 1": "lazy", "lazy, MaxRank = 1": "strictly_lazy"}
    for text, key in lazy.items():
        cells.append([text, *(str(sum(row[key] for row in rows)) for rows in columns)])
    cells.append(["heads near rank one", *(f"{r['near_rank_one']:.0%}" for r in results)])
    thirds = [[f"{g['layers']} {g['avg_rank']:.2f}" for g in result["groups"]] for result in results]
    cells.append(["AvgRank of the thirds", *map(", ".join, thirds)])
    return table(cells)


# ---- the report


def report_run(run_dir: Path, animate: bool) -> str:
    """Draw how the attention of one run developed. Raises UserError if it was not tracked."""
    lines = [line for line in resume.read_log(run_dir / "metrics.jsonl") if "MaxRank" in line]
    if not lines:
        raise UserError(f"{run_dir}: its attention was not tracked; train with --track_rank")
    figures.plot_collapse(lines, run_dir / "collapse.png")
    if animate:
        figures.animate_collapse(lines, run_dir / "collapse.gif")
    return f"{run_dir}/collapse.png"


def report(out_dir: str | Path, animate: bool = False, paper: str = ""):
    """Print the tables, then write report.md and its figures. Raises UserError."""
    out_dir = Path(out_dir)
    if (out_dir / "metrics.jsonl").is_file():  # one run, not a recipe
        return configurator.say(report_run(out_dir, animate))
    recipe = storage.read_json(out_dir / "recipe.json")
    rows = rows_of(recipe, out_dir)
    target = next(row["paths"][0] for row in rows if row["role"] == "target")
    attention = storage.read_json(target.parent / "recipe_attention/attention.json")
    models = [list(rows[0]["cells"]), *(list(row["cells"].values()) for row in rows)]
    tables = [table(models), claims(rows), attention_table(attention)]
    paper = paper or recipe["paper"]
    beside = f"## Beside the paper\n\n{paper_table(rows, paper)}\n" if paper else ""
    configurator.say("\n\n".join(["", *tables, beside]))  # first: the disk may be full
    states = [resume.read_state(path) for row in rows for path in row["paths"]]
    commits = ", ".join(sorted({state["versions"]["commit"] for state in states}))
    seeds = ", ".join(sorted({str(state["settings"]["seed"]) for state in states}))
    made_by = states[0]["versions"]
    text = f"""# {out_dir.resolve().name}

{tables[0]}

{NOTES.format(windows=len(val_losses(rows[0]["paths"][0])), tolerance=recipe["tolerance"])}

## Claims

{tables[1]}

## Attention

{figures.conditions(attention)}. MaxRank: paper, section 2.

{tables[2]}

![every measure by layer](rank.png)

{beside}
## Validation loss

![validation loss against tokens](loss.png)

![difference to the reference of every model](differences.png)

Commit {commits}; seeds {seeds}.
Python {made_by["python"]}, torch {made_by["torch"]}, {made_by["device"]}.
Command: `python {made_by["command"]}`
"""
    storage.write_text(out_dir / "report.md", text)
    figures.plot_losses(rows, out_dir / "loss.png")
    figures.plot_differences(rows, out_dir / "differences.png")
    figures.plot_attention(attention, out_dir / "rank.png")
    configurator.say(f"report: {out_dir}/report.md; target: {target}")


def main():
    report(**vars(configurator.load(ReportConfig)))


if __name__ == "__main__":
    configurator.run(main)
