"""Tables and figures of a recipe: report.md, loss.png, differences.png, rank.png.

    python report.py out/demo            # writes out/demo/report.md again; inheritune.py ends with it
    python report.py out/gpt2-medium --paper=medium   # beside the paper's results
    python report.py out/mine --animate  # one run trained with --track_rank: its ranks by step and layer

It reads out_dir/recipe.json (written by inheritune.py), each run's metrics.jsonl and last checkpoint, and the
results of analyze_attention.py. Every checkpoint is verified before it is read.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

import data
from baselines import PAPER
from plumbing import checkpoint, configurator, figures, resume, storage
from plumbing.configurator import UserError

NOTES = """Loss: nats per token, the mean over all validation windows ± its standard error. Difference: loss
minus the reference's, paired over windows, ± 95% interval, which is about other text, not about other seeds.
Spread: standard deviation over the seeds. Tokens, all: with those of the models it was inherited from or
taught by. FLOPs: 6 for each weight and token, and attention. Reached: the share of its own steps after which
it had the reference's final loss. Latency: one sequence forward on the CPU, relative to the reference."""


@dataclass
class ReportConfig:
    """Write the report of a recipe from what its runs left behind."""

    out_dir: tyro.conf.Positional[str]  # of a recipe; or of one run that was trained with --track_rank
    animate: bool = False  # for one run, write collapse.gif too
    paper: str = ""  # put these results of the paper beside a recipe's: small, medium, medium-200k, large, xl


# ---- numbers


def val_losses(path: Path) -> np.ndarray:
    """The loss of every validation window (windows,), in nats per token, that a checkpoint keeps."""
    return np.array(storage.read_json(path / "val_losses.json")["losses"])


def window_differences(path: Path, reference: Path) -> np.ndarray:
    """Loss of one model minus loss of the other on every validation window (windows,). Raises UserError."""
    ours, theirs = (storage.read_json(p / "val_losses.json") for p in (path, reference))
    if ours["data"] != theirs["data"] or len(ours["losses"]) != len(theirs["losses"]):
        raise UserError(f"{path} and {reference} were evaluated on different windows; use the same data")
    return np.array(ours["losses"]) - np.array(theirs["losses"])


def paired_difference(paths: list[Path], references: list[Path]) -> tuple[float, float | None]:
    """Mean difference of two models' losses on the same windows, in nats, and half its 95% interval.

    One path per seed, paired with that seed's reference; the mean over seeds comes first. Pairing removes
    what makes a window hard for both models. One window gives no interval.
    """
    pairs = zip(paths, references, strict=False)  # a baseline may have fewer seeds
    differences = np.mean([window_differences(*pair) for pair in pairs], axis=0)  # (windows,)
    mean, error = data.mean_and_error(differences)
    return mean, 1.96 * error if len(differences) > 1 else None


def verdict(difference: float, interval: float | None, tolerance: float) -> str:
    """Matched: a mean difference of at most the tolerance. Better or worse: the interval excludes 0."""
    matched = "matched" if difference <= tolerance else "not matched"
    if interval is None:
        return f"{matched}, one window: no interval"
    if abs(difference) <= interval:
        return f"{matched}, within noise"
    return f"{matched}, {'better' if difference < 0 else 'worse'}"


def curve(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and validation loss of every evaluation, the mean over the seeds' runs."""
    logs = [storage.read_log(path.parent / "metrics.jsonl") for path in paths]
    runs = [{line["tokens"]: line["val_loss"] for line in log if "val_loss" in line} for log in logs]
    tokens = sorted(set.intersection(*map(set, runs)))
    return np.array(tokens), np.array([np.mean([run[t] for run in runs]) for t in tokens])


def spent(model: dict, recipe: dict, out_dir: Path) -> dict | None:
    """Tokens and FLOPs of the first seed's model and of all it was made from. None if one is unknown."""
    of_run = {str(Path(path).parent): m for m in recipe["models"] for path in m["paths"]}
    open_paths, runs = [model["paths"][0]], {}
    while open_paths:
        path = open_paths.pop()
        run, state = str(Path(path).parent), storage.read_json(out_dir / path / "trainer_state.json")
        if state["step"] == 0:  # a model that was trained elsewhere
            return None
        if run not in runs or runs[run]["tokens"] < state["tokens"]:  # each run once, at its latest step
            runs[run] = {key: state[key] for key in ("tokens", "flops")}
            open_paths += of_run[run]["sources"] if run in of_run else []
    return {key: sum(run[key] for run in runs.values()) for key in ("tokens", "flops")}


@torch.no_grad()
def latency(path: Path, reference: Path, repeats: int = 15) -> float:
    """Median time of a forward pass of one sequence, relative to the reference's. The two take turns."""
    models = [checkpoint.load_model(each) for each in (path, reference)]
    idx, ratios = torch.zeros(1, models[0].config.block_size, dtype=torch.long), []
    for _ in range(repeats + 2):
        marks = [time.perf_counter()]
        for model in models:
            model(idx)
            marks.append(time.perf_counter())
        ratios.append((marks[1] - marks[0]) / (marks[2] - marks[1]))
    return float(np.median(ratios[2:]))  # the first passes warm up


def rows_of(recipe: dict, out_dir: Path) -> list[dict]:
    """A row of the comparison for each model of a recipe, the reference first. Verifies every checkpoint."""
    references, rows, latencies = [out_dir / path for path in recipe["models"][0]["paths"]], [], {}
    for model in recipe["models"]:
        paths = [out_dir / path for path in model["paths"]]
        for path in paths:
            storage.verify(path)
        config, state = checkpoint.read_config(paths[0]), resume.read_state(paths[0])
        losses = np.array([val_losses(path) for path in paths])  # (seeds, windows)
        each = [float(window_differences(*pair).mean()) for pair in zip(paths, references, strict=False)]
        difference, interval = paired_difference(paths, references)
        tokens, values = curve(paths)
        reached = tokens[values <= val_losses(references[0]).mean()]
        if str(config) not in latencies:  # it depends on the shape alone
            latencies[str(config)] = latency(paths[0], references[0])
        rows.append({
            "name": model["name"], "role": model["role"], "paths": paths, "n_layer": config.n_layer,
            "n_params": config.num_params(), "own_tokens": state["tokens"],
            "spent": spent(model, recipe, out_dir),
            "loss": float(losses.mean()), "error": data.mean_and_error(losses.mean(0))[1], "each": each,
            "difference": difference, "interval": interval, "curve": (tokens, values),
            "spread": float(np.std(each if rows else losses.mean(1), ddof=1)) if len(paths) > 1 else None,
            "reached": float(reached[0] / tokens[-1]) if len(reached) and tokens[-1] else None,
            "latency": latencies[str(config)],
            "verdict": verdict(difference, interval, recipe["tolerance"]) if rows else "reference",
        })
    return rows


# ---- tables


def table(cells: list[list[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too. The first row is the heading."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [cells[0], ["-" * width for width in widths], *cells[1:]]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def plus_minus(difference: float, interval: float | None) -> str:
    return f"{difference:+.4f}" + (f" ± {interval:.4f}" if interval is not None else " (one window)")


def comparison(rows: list[dict]) -> str:
    """The table of models."""
    cells = [["model", "layers", "parameters", "tokens, own", "tokens, all", "FLOPs, all", "val loss",
              "difference ± 95%", "spread, seeds", "reached", "latency", "verdict"]]
    for row in rows:
        cost, reached = row["spent"], row["reached"]
        cells.append([
            row["name"], str(row["n_layer"]), f"{row['n_params'] / 1e6:.2f} M",
            f"{row['own_tokens'] / 1e6:.2f} M",
            f"{cost['tokens'] / 1e6:.2f} M" if cost else "?", f"{cost['flops']:.2e}" if cost else "?",
            f"{row['loss']:.4f} ± {row['error']:.4f}", plus_minus(row["difference"], row["interval"]),
            f"{row['spread']:.4f}, {len(row['paths'])}" if row["spread"] is not None else "one seed",
            f"{reached:.0%}" if reached is not None else "never" if row["own_tokens"] else "-",
            f"{row['latency']:.2f}", row["verdict"],
        ])
    return table(cells)


def claims(rows: list[dict], recipe: dict) -> str:
    """The table of claims whose two models are in the recipe."""
    by_name = {name: row for row in rows for name in (row["name"], row["role"])}
    cells = [["claim", "better", "worse", "difference ± 95%", "seeds", "holds"]]
    for claim in recipe["claims"]:
        if not {claim["better"], claim["worse"]} <= by_name.keys():
            continue
        better, worse = by_name[claim["better"]], by_name[claim["worse"]]
        difference, interval = paired_difference(better["paths"], worse["paths"])
        pairs = zip(better["paths"], worse["paths"], strict=False)
        lower = [bool(window_differences(*pair).mean() < 0) for pair in pairs]
        holds = "yes" if difference < 0 else "no"
        if interval is None or abs(difference) <= interval:
            holds = "within noise"
        elif len(set(lower)) > 1:
            holds = "depends on the seed"
        cells.append([claim["text"], better["name"], worse["name"], plus_minus(difference, interval),
                      f"{sum(lower)} of {len(lower)}", holds])
    return table(cells)


def paper_table(rows: list[dict], key: str) -> str:
    """The losses here beside the paper's, for the models that both have. Raises UserError."""
    configurator.check_key(key, PAPER, "paper")
    losses = [(row["name"], row["loss"], PAPER[key].get(row["name"])) for row in rows]
    cells = [["model", "val loss here", f"in the paper ({key})", "difference"]]
    cells += [[name, f"{a:.4f}", f"{b:.2f}", f"{a - b:+.4f}"] for name, a, b in losses if b]
    return table(cells)


def attention_table(results: dict[str, dict]) -> str:
    """Ranks and lazy layers of the reference, the target and an untrained model (paper, section 2)."""
    columns = {**results, "untrained": results["reference"]["untrained"]}
    cells = [["", *columns]]
    depth = max(len(result["layers"]) for result in columns.values())
    for i in range(depth):
        rows = [result["layers"][i : i + 1] for result in columns.values()]
        cells.append([f"MaxRank, layer {i}", *(f"{row[0]['max_rank']:.2f}" if row else "" for row in rows)])
    for text, key in (("lazy, floor(MaxRank) = 1", "lazy"), ("lazy, MaxRank = 1", "strictly_lazy")):
        cells.append([text, *(str(sum(row[key] for row in r["layers"])) for r in columns.values())])
    cells.append(["heads near rank one", *(f"{r['near_rank_one']:.0%}" for r in columns.values())])
    return table(cells)


# ---- the report


def report_run(run_dir: Path, animate: bool) -> str:
    """Draw how the attention of one run developed. Raises UserError if it was not tracked."""
    lines = [line for line in storage.read_log(run_dir / "metrics.jsonl") if "MaxRank" in line]
    if not lines:
        raise UserError(f"{run_dir}: its attention was not tracked; train with --track_rank")
    figures.plot_collapse(lines, run_dir / "collapse.png")
    if animate:
        figures.animate_collapse(lines, run_dir / "collapse.gif")
    return f"{run_dir}/collapse.png"


def report(out_dir: str | Path, animate: bool = False, paper: str = "") -> str:
    """Write report.md and its figures. Returns the tables as text. Raises UserError."""
    out_dir = Path(out_dir)
    if (out_dir / "metrics.jsonl").is_file():  # one run, not a recipe
        return report_run(out_dir, animate)
    if not (out_dir / "recipe.json").is_file():
        raise UserError(f"{out_dir}: no recipe.json and no metrics.jsonl; train a recipe with inheritune.py")
    recipe = storage.read_json(out_dir / "recipe.json")
    rows = rows_of(recipe, out_dir)
    attention = {
        row["role"]: storage.read_json(row["paths"][0].parent / "recipe_attention" / "attention.json")
        for row in rows
        if row["role"] in ("reference", "target")
    }
    states = [resume.read_state(path) for row in rows for path in row["paths"]]
    first, made_by = attention["reference"], states[0]["versions"]
    commits = ", ".join(sorted({state["versions"]["commit"] for state in states}))
    seeds = ", ".join(sorted({str(state["settings"]["seed"]) for state in states}))
    windows = len(val_losses(rows[0]["paths"][0]))
    sections = [comparison(rows), claims(rows, recipe), attention_table(attention)]
    paper = paper or recipe.get("paper", "")
    beside = [f"## Beside the paper\n\n{paper_table(rows, paper)}\n"] if paper else []
    text = f"""# {out_dir.name}

{sections[0]}

{NOTES} {windows} windows{"" if windows >= 10 else ": too few for an interval to mean much"}.

## Claims

{sections[1]}

## Attention

T = {first["T"]}, tau = {first["tau"][0]}, {first["sequences"]} sequences. MaxRank: paper, section 2.

{sections[2]}

![every measure by layer](rank.png)

{"".join(beside)}
## Validation loss

![validation loss against tokens](loss.png)

![difference to the reference of every model](differences.png)

Commit {commits}; seeds {seeds}; python {made_by["python"]}, torch {made_by["torch"]}, {made_by["device"]}.
Command: `python {made_by["command"]}`
"""
    tables = "\n\n".join(sections + beside)
    try:
        storage.write_text(out_dir / "report.md", text)
        figures.plot_losses(rows, out_dir / "loss.png")
        figures.plot_differences(rows, out_dir / "differences.png")
        figures.plot_ranks(attention, out_dir / "rank.png")
    except OSError as error:
        raise UserError(f"{tables}\n{out_dir}: {error.strerror}; free space on the disk", 1) from None
    return f"\n{tables}\n\nreport: {out_dir}/report.md"


def main():
    print(report(**vars(configurator.load(ReportConfig))))


if __name__ == "__main__":
    configurator.run(main)
