"""Tables and figures from what the runs of a recipe left behind: report.md, loss.png, arms.png and rank.png.

    python report.py out/mine --animate  # of one run that was trained with --track_rank: its rank by step and layer
    python report.py out/demo            # writes out/demo/report.md again, from the checkpoints and metrics there
    python inheritune.py config/demo.toml  # makes all of it, and ends with this report

It reads out_dir/recipe.json (which models there are, written by inheritune.py), each run's metrics.jsonl, its last
checkpoint and the results of analyze_attention.py.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from plumbing import checkpoint
from plumbing import configurator
import data
from plumbing import storage
from plumbing.configurator import UserError
from plumbing.figures import animate_collapse, plot_arms, plot_collapse, plot_losses, plot_ranks


@dataclass
class ReportConfig:
    """Write the report of a recipe from what its runs left behind."""

    out_dir: tyro.conf.Positional[str]  # of a recipe; or of one run that was trained with --track_rank
    animate: bool = False  # write collapse.gif too: the rank of every layer as the training went on


# ----------------------------------------------------------------------------------------------------------
# Numbers


def val_losses(path: Path) -> np.ndarray:
    """The losses of every validation window (windows,) that a run's last checkpoint keeps, in nats a token."""
    return np.array(storage.read_json(path / "val_losses.json")["losses"])


def window_differences(path: Path, reference: Path) -> np.ndarray:
    """Loss of one model minus loss of the other on every validation window (windows,). Raises UserError."""
    ours, theirs = val_losses(path), val_losses(reference)
    tokens = [storage.read_json(p / "val_losses.json").get("data") for p in (path, reference)]
    if ours.shape != theirs.shape or tokens[0] != tokens[1]:
        raise UserError(f"{path} ({len(ours)} windows) and {reference} ({len(theirs)}) were evaluated on other data")
    return ours - theirs


def paired_difference(paths: list[Path], references: list[Path]) -> tuple[float, float]:
    """Mean difference of two models' losses on the same windows, and half the width of its 95% interval, in nats.

    One path for each seed, each paired with that seed's reference; a window's difference is the mean over the seeds.
    Pairing takes out what makes a window hard for both. The interval is about the windows, taken as independent:
    those of one document are not quite, and other seeds would differ by what `spread` says. Raises UserError.
    """
    pairs = zip(paths, references, strict=False)  # an arm may have been trained with fewer seeds
    mean, error = data.mean_and_error(np.mean([window_differences(*pair) for pair in pairs], axis=0))
    return mean, 1.96 * error


def spread(paths: list[Path], references: list[Path] | None = None) -> float | None:
    """Standard deviation over the seeds of the loss, or of its difference to the reference's; None for one seed."""
    if len(paths) == 1:
        return None
    losses = [val_losses(path).mean() for path in paths]
    theirs = [val_losses(path).mean() for path in references or []] or [0.0] * len(paths)
    return float(np.std([a - b for a, b in zip(losses, theirs, strict=False)], ddof=1))


@torch.no_grad()
def relative_latency(path: Path, reference: Path, repeats: int = 15) -> float:
    """Median time of a forward pass (one sequence of block_size, float32, not compiled), the reference's being 1.

    The two take turns, so that a machine that slows down slows both.
    """
    models = [checkpoint.load_model(p) for p in (path, reference)]
    idx = torch.zeros(1, models[0].config.block_size, dtype=torch.long)
    ratios = []
    for _ in range(repeats + 2):
        times = []
        for model in models:
            t0 = time.perf_counter()
            model(idx)
            times.append(time.perf_counter() - t0)
        ratios.append(times[0] / times[1])
    return float(np.median(ratios[2:]))  # the first passes warm up


def verdict(difference: float, interval: float, tolerance: float) -> str:
    """In words: matched is a mean difference of at most the tolerance; better or worse if the interval excludes 0."""
    matched = "matched" if difference <= tolerance else "not matched"
    if abs(difference) <= interval:
        return f"{matched}, within noise"
    return f"{matched}, {'better' if difference < 0 else 'worse'}"


def metrics(run_dir: Path, key: str) -> list[dict]:
    """The lines of a run's metrics.jsonl that have a key."""
    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if key in line]


def curve(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and validation loss of every evaluation of a checkpoint's run."""
    lines = metrics(path.parent, "val_loss")
    return np.array([line["tokens"] for line in lines]), np.array([line["val_loss"] for line in lines])


def share_until(path: Path, loss: float) -> float | None:
    """The share of its own steps after which a run was first seen at a validation loss or below; None: never."""
    tokens, losses = curve(path)
    return tokens[losses <= loss][0] / tokens[-1] if (losses <= loss).any() else None


def shares_until(paths: list[Path], others: list[Path]) -> list[float]:
    """`share_until` the final loss of the other model, for each seed in which it was seen there."""
    shares = [share_until(a, val_losses(b).mean()) for a, b in zip(paths, others, strict=False)]
    return [share for share in shares if share is not None]


def mean_curve(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the seeds of `curve`, at the tokens where all were evaluated."""
    curves = [dict(zip(*curve(path), strict=True)) for path in paths]
    tokens = sorted(set.intersection(*map(set, curves)))
    return np.array(tokens), np.array([np.mean([each[t] for each in curves]) for t in tokens])


def rows_of(recipe: dict, out_dir: Path) -> list[dict]:
    """A row of the table for each model of a recipe, the reference first."""
    references = [out_dir / path for path in recipe["models"][0]["paths"]]
    rows, kept = [], out_dir / "latency.json"  # measured once
    latency = storage.read_json(kept) if kept.exists() else {}
    for model in recipe["models"]:
        paths = [out_dir / path for path in model["paths"]]
        config, own = checkpoint.read_config(paths[0]), storage.read_json(paths[0] / "trainer_state.json")
        loss, error = data.mean_and_error(np.mean([val_losses(path) for path in paths], axis=0))
        difference, interval = paired_difference(paths, references)
        if str(config) not in latency:  # it depends on the shape alone
            latency[str(config)] = relative_latency(paths[0], references[0])
            storage.replace_json(kept, latency)
        rows.append(
            {
                "name": model["name"], "role": model["role"], "paths": paths, "n_layer": config.n_layer,
                "n_params": config.num_params(), "own_tokens": own["tokens"], "own_flops": own["flops"],
                "cost": checkpoint.cost(paths[0]), "loss": loss, "error": error,
                "spread": spread(paths, references if rows else None), "difference": difference, "interval": interval,
                "curve": mean_curve(paths), "each": [
                    window_differences(*pair).mean() for pair in zip(paths, references, strict=False)
                ],
                "until": shares_until(paths, references), "latency": latency[str(config)],
                "verdict": verdict(difference, interval, recipe["tolerance"]) if rows else "reference",
            }
        )  # fmt: skip
    return rows


# ----------------------------------------------------------------------------------------------------------
# Text


def table(rows: list[dict]) -> str:
    """The comparison as a Markdown table whose columns line up in a terminal too."""
    cells = [
        ["model", "layers", "parameters", "tokens, own", "tokens, all", "FLOPs, all", "val loss, nats",
         "difference to reference, 95%", "spread, seeds", "reference's loss after", "latency", "verdict"]
    ]  # fmt: skip
    for row in rows:
        cost, share = row["cost"], np.mean(row["until"]) if row["until"] else None
        some = f" ({len(row['until'])} of {len(row['paths'])})" if len(row["until"]) < len(row["paths"]) else ""
        reached = "never" if share is None else (
            f"{share:.0%}: {share * row['own_tokens'] / 1e6:.2f} M, {share * row['own_flops']:.1e}{some}"
        )  # fmt: skip
        cells.append(
            [row["name"], str(row["n_layer"]), f"{row['n_params'] / 1e6:.2f} M", f"{row['own_tokens'] / 1e6:.2f} M",
             f"{cost['tokens'] / 1e6:.2f} M" if cost else "?", f"{cost['flops']:.2e}" if cost else "?",
             f"{row['loss']:.4f} ± {row['error']:.4f}", f"{row['difference']:+.4f} ± {row['interval']:.4f}",
             f"{row['spread']:.4f}, {len(row['paths'])}" if row["spread"] is not None else "one seed",
             reached, f"{row['latency']:.2f}", row["verdict"]]
        )  # fmt: skip
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in cells)


def claims(rows: list[dict], recipe: dict, attention: dict) -> str:
    """What each claim of the paper came to here."""
    by_name = {row["role"] if row["role"] in ("reference", "target") else row["name"]: row for row in rows}
    reference, target = by_name["reference"], by_name["target"]
    ranks = [row["max_rank"] for row in attention["layers"]]
    half = (len(ranks) + 1) // 2
    early, late = np.mean(ranks[:half]), np.mean(ranks[half:] or ranks)
    lazy = sum(row["lazy"] for row in attention["layers"][half:])
    untrained = np.mean([row["max_rank"] for row in attention["untrained"]])
    smaller = target["n_layer"] < reference["n_layer"] and target["difference"] <= recipe["tolerance"]
    ratio = f"{target['cost']['tokens'] / reference['cost']['tokens']:.1f}" if target["cost"] else "?"
    lines = [
        f"- *Deep layers are lazy*: {'yes' if lazy else 'no'}. {lazy} of the {len(ranks) - half} layers in the second "
        f"half of the reference have no head of rank {attention['lazy_below']} or more. The largest head rank is "
        f"{early:.1f} on average in the first half, {late:.1f} in the second, {untrained:.1f} in an untrained model; "
        f"full is {attention['T']}.",
        f"- *A smaller inherited model matches the reference*: {'yes' if smaller else 'no'}. "
        f"{target['n_layer']} of {reference['n_layer']} layers, difference {target['difference']:+.4f} ± "
        f"{target['interval']:.4f} nats. It saw {ratio} times the tokens that the reference saw, these included.",
    ]
    stated = recipe["claims"] or [
        {"text": f"The inherited model is better than {row['name']}", "better": "target", "worse": row["name"]}
        for row in rows
        if row["role"] == "arm"
    ]
    for claim in stated:
        if not {claim["better"], claim["worse"]} <= by_name.keys():
            continue  # an arm that is still to come
        better, worse = by_name[claim["better"]], by_name[claim["worse"]]
        difference, interval = paired_difference(better["paths"], worse["paths"])
        pairs = list(zip(better["paths"], worse["paths"], strict=False))
        lower = sum(val_losses(a).mean() < val_losses(b).mean() for a, b in pairs)
        answer = "yes" if difference < 0 else "no"
        if len(pairs) == 1:
            answer += ", with one seed"
        if abs(difference) <= interval:
            answer = "within noise"
        elif 0 < lower < len(pairs):
            answer = "it depends on the seed"
        shares = shares_until(better["paths"], worse["paths"])
        when = f"after {np.mean(shares):.0%} of its steps at" if len(shares) == len(pairs) else "not with every seed at"
        lines.append(
            f"- *{claim['text']}*: {answer}. {better['name']} against {worse['name']}: {difference:+.4f} ± "
            f"{interval:.4f} nats, lower with {lower} of {len(pairs)} seed{'s' * (len(pairs) > 1)}, at "
            f"{better['own_tokens'] / 1e6:.2f} M against {worse['own_tokens'] / 1e6:.2f} M tokens of its own; "
            f"{when} the other's final loss."
        )
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------
# The report


def report_collapse(run_dir: Path, out_dir: Path, animate: bool) -> str:
    """Draw how the attention of a run that tracked it changed; Markdown that shows it, empty for another run."""
    lines = metrics(run_dir, "max_rank")
    if not lines:
        return ""
    plot_collapse(lines, out_dir / "collapse.png")
    if animate:
        animate_collapse(lines, out_dir / "collapse.gif")
    moving = "\n\n![the same, moving](collapse.gif)" if animate else ""
    return f"\n## Rank and columns as {run_dir.name} was trained\n\n![rank by step and layer](collapse.png){moving}\n"


def report(out_dir: str | Path, animate: bool = False) -> str:
    """Write report.md and its figures; return its numbers as text. Raises UserError where there is no target yet."""
    out_dir = Path(out_dir)
    if (out_dir / "metrics.jsonl").is_file():  # one run, not a recipe
        if not report_collapse(out_dir, out_dir, animate):
            raise UserError(f"{out_dir}: its attention was not tracked; train with --track_rank")
        return f"{out_dir}/collapse.png"
    if not (out_dir / "recipe.json").is_file():
        raise UserError(
            f"{out_dir}/recipe.json: not found, nor a run's metrics.jsonl; finish the recipe with inheritune.py"
        )
    recipe = storage.read_json(out_dir / "recipe.json")
    if "paths" not in recipe["models"][0]:
        raise UserError(
            f"{out_dir}/recipe.json is of an older version; run the recipe again, which trains nothing anew"
        )
    run_of = {model["role"]: Path(model["paths"][0]).parent for model in recipe["models"]}  # of the first seed
    attention = {
        role: storage.read_json(out_dir / run_of[role] / "attention" / "attention.json")
        for role in ("reference", "target")
    }
    rows = rows_of(recipe, out_dir)
    plot_losses(rows, out_dir / "loss.png")
    plot_arms(rows, out_dir / "arms.png")
    plot_ranks(attention, out_dir / "rank.png")
    states = [storage.read_json(path / "trainer_state.json") for row in rows for path in row["paths"]]
    commits = ", ".join(sorted({state["versions"]["commit"] for state in states}))
    seeds = ", ".join(map(str, sorted({state["settings"]["seed"] for state in states})))
    made_by = ", ".join(f"{key} {value}" for key, value in states[0]["versions"].items() if key != "commit")
    text = f"""# {out_dir.name}

{table(rows)}

Loss: over {len(val_losses(rows[0]["paths"][0]))} fixed validation windows of {attention["reference"]["T"]} tokens, ±
standard error. Difference: paired over the windows, with its 95% interval: of these models on other text, not of others
trained with other seeds. Spread: the standard deviation over the seeds of the difference (reference: of its loss).
Matched: a mean difference of at most {recipe["tolerance"]} nats. Own: what a model was trained on; all: with what it
was inherited or distilled from. FLOPs: 6 for each weight and token, and attention. Reference's loss after: the share of
its own steps, tokens and FLOPs at which a model was first seen at that loss. Latency: one sequence forward on the CPU,
the reference's being 1. All models of a seed get the same batches from step 0 on: what inherits sees again what its
source saw; a random model with twice the steps sees as much, but each text once.

## What the paper's claims came to here

{claims(rows, recipe, attention["reference"])}

## Validation loss

![validation loss against tokens, of the models with the most seeds](loss.png)

![difference to the reference of every model](arms.png)

## Attention rank and columns by layer

![rank and columns by layer](rank.png)

k*: the least number of singular directions with {attention["reference"]["tau"]:.0%} of the squared singular values.
c*: the fewest columns with that share of the squared entries, our reading of the paper's "90% total mass". Both depend
on T. Per head: [reference]({run_of["reference"]}/attention/attention.png),
[target]({run_of["target"]}/attention/attention.png).

Trained at commit {commits}, with seeds {seeds}; {made_by}.
"""
    path = out_dir / "report.md"
    path.write_text(text, encoding="utf-8")
    return f"\n{table(rows)}\n\n{claims(rows, recipe, attention['reference'])}\n\nreport: {path}"


def main():
    print(report(**vars(configurator.load(ReportConfig))))


if __name__ == "__main__":
    configurator.run(main)
