"""Tables and figures from what the runs of a recipe left behind: report.md, loss.png and rank.png.

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

import checkpoint
import configurator
import data
import storage
from configurator import UserError

COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")  # Okabe and Ito
STYLES = ("-", "-", "--", ":", "-.")


@dataclass
class ReportConfig:
    """Write the report of a recipe from what its runs left behind."""

    out_dir: tyro.conf.Positional[str]  # the recipe's out_dir


# ----------------------------------------------------------------------------------------------------------
# Numbers


def val_losses(path: Path) -> np.ndarray:
    """The losses of every validation window (windows,) that a run's last checkpoint keeps, in nats a token."""
    return np.array(storage.read_json(path / "val_losses.json")["losses"])


def paired_difference(path: Path, reference: Path) -> tuple[float, float]:
    """Mean difference of two models' losses on the same windows, and half the width of its 95% interval, in nats.

    Pairing takes out what makes a window hard for both. The interval takes the windows as independent; windows of
    one document are not quite, so the true one is somewhat wider. Raises UserError for other windows.
    """
    ours, theirs = val_losses(path), val_losses(reference)
    tokens = [storage.read_json(p / "val_losses.json").get("data") for p in (path, reference)]
    if ours.shape != theirs.shape or tokens[0] != tokens[1]:
        raise UserError(f"{path} ({len(ours)} windows) and {reference} ({len(theirs)}) were evaluated on other data")
    mean, error = data.mean_and_error(ours - theirs)
    return mean, 1.96 * error


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


def rows_of(recipe: dict, out_dir: Path) -> list[dict]:
    """A row of the table for each model of a recipe, the reference first."""
    reference = out_dir / recipe["models"][0]["path"]
    rows = []
    for model in recipe["models"]:
        path = out_dir / model["path"]
        config, (loss, error) = checkpoint.read_config(path), data.mean_and_error(val_losses(path))
        difference, interval = paired_difference(path, reference)
        rows.append(
            {
                "name": model["name"], "path": path, "n_layer": config.n_layer, "n_params": config.num_params(),
                "own_tokens": storage.read_json(path / "trainer_state.json")["tokens"], **checkpoint.cost(path),
                "loss": loss, "error": error,
                "difference": difference, "interval": interval, "latency": relative_latency(path, reference),
                "verdict": "reference" if path == reference else verdict(difference, interval, recipe["tolerance"]),
            }
        )  # fmt: skip
    return rows


def curve(run_dir: Path) -> tuple[list[int], list[float]]:
    """Tokens and validation loss of every evaluation of a run."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [line for line in lines if "val_loss" in line]
    return [line["tokens"] for line in evaluations], [line["val_loss"] for line in evaluations]


# ----------------------------------------------------------------------------------------------------------
# Text


def table(rows: list[dict]) -> str:
    """The comparison as a Markdown table whose columns line up in a terminal too."""
    cells = [
        ["model", "layers", "parameters", "tokens, with reference's", "FLOPs, with reference's", "val loss, nats",
         "difference to reference, 95%", "latency", "verdict"]
    ]  # fmt: skip
    for row in rows:
        cells.append(
            [row["name"], str(row["n_layer"]), f"{row['n_params'] / 1e6:.2f} M",
             f"{row['tokens'] / 1e6:.2f} M", f"{row['flops']:.2e}",
             f"{row['loss']:.4f} ± {row['error']:.4f}", f"{row['difference']:+.4f} ± {row['interval']:.4f}",
             f"{row['latency']:.2f}", row["verdict"]]
        )  # fmt: skip
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in cells)


def claims(rows: list[dict], recipe: dict, attention: dict) -> str:
    """What each claim of the paper came to here."""
    by_role = {model["role"]: row for model, row in zip(recipe["models"], rows, strict=True)}
    reference, target = by_role["reference"], by_role["target"]
    ranks = [row["max_rank"] for row in attention["layers"]]
    half = (len(ranks) + 1) // 2
    early, late = np.mean(ranks[:half]), np.mean(ranks[half:] or ranks)
    lazy = sum(row["lazy"] for row in attention["layers"][half:])
    untrained = np.mean([row["max_rank"] for row in attention["untrained"]])
    smaller = target["n_layer"] < reference["n_layer"] and target["difference"] <= recipe["tolerance"]
    lines = [
        f"- *Deep layers are lazy*: {'yes' if lazy else 'no'}. {lazy} of the {len(ranks) - half} layers in the second "
        f"half of the reference have no head of rank {attention['lazy_below']} or more. The largest head rank is "
        f"{early:.1f} on average in the first half, {late:.1f} in the second, {untrained:.1f} in an untrained model; "
        f"full is {attention['T']}.",
        f"- *A smaller inherited model matches the reference*: {'yes' if smaller else 'no'}. "
        f"{target['n_layer']} of {reference['n_layer']} layers, difference {target['difference']:+.4f} ± "
        f"{target['interval']:.4f} nats. It saw {target['tokens'] / reference['tokens']:.1f} times the tokens "
        "that the reference saw, these included.",
    ]
    for model, row in zip(recipe["models"], rows, strict=True):
        if model["role"] == "arm":
            difference, interval = paired_difference(target["path"], row["path"])
            answer = "within noise" if abs(difference) <= interval else "yes" if difference < 0 else "no"
            lines.append(
                f"- *The inherited model is better than {row['name']}*: {answer}. Difference {difference:+.4f} ± "
                f"{interval:.4f} nats; tokens of its own {target['own_tokens'] / 1e6:.2f} M against "
                f"{row['own_tokens'] / 1e6:.2f} M."
            )
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------
# Figures


def plot_losses(rows: list[dict], out_dir: Path):
    """Validation loss against the tokens of each run's own training; a dotted line where the reference ended."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for i, row in enumerate(rows):
        tokens, losses = curve(row["path"].parent)
        style = {"color": COLORS[i % len(COLORS)], "linestyle": STYLES[i % len(STYLES)]}
        axis.plot(np.array(tokens) / 1e6, losses, label=f"{row['name']}: {row['loss']:.3f}", marker="o", ms=3, **style)
    axis.axhline(rows[0]["loss"], color="#000000", linewidth=0.8, linestyle=":")
    # the first evaluations of random weights would squeeze the part that matters
    highest = max(curve(row["path"].parent)[1][1] for row in rows)  # each has a first and a last evaluation
    lowest = min(row["loss"] for row in rows)
    axis.set(xlabel="tokens of its own training, millions", ylabel="validation loss, nats a token")
    axis.set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.05 * (highest - lowest))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out_dir / "loss.png", dpi=120)
    plt.close(figure)


def plot_ranks(attention: dict[str, dict], path: Path):
    """Rank and columns by layer of the reference, the target and the untrained control."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    reference = attention["reference"]
    lines = [("reference", reference["layers"]), ("inherited target", attention["target"]["layers"])]
    lines.append(("untrained", reference["untrained"]))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, measure, label in zip(axes, ("max_rank", "max_columns"), ("rank k*", "columns c*"), strict=True):
        for i, (name, layers) in enumerate(lines):
            x = [row["layer"] for row in layers]
            mean, error = (np.array([row[measure + end] for row in layers]) for end in ("", "_se"))
            style = {"color": COLORS[i], "linestyle": ("-", "-", "--")[i], "marker": "os^"[i]}
            axis.plot(x, mean, label=name, **style)
            axis.fill_between(x, mean - error, mean + error, color=COLORS[i], alpha=0.2, linewidth=0)
        axis.set(xlabel="layer", ylabel=f"{label}, largest of the heads", ylim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle(f"T = {reference['T']}, τ = {reference['tau']}, n = {reference['sequences']} sequences, ± 1 s.e.")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(out_dir: str | Path) -> Path:
    """Write report.md and its figures; return its path. Raises UserError where a recipe is not complete."""
    out_dir = Path(out_dir)
    if not (out_dir / "recipe.json").is_file():
        raise UserError(f"{out_dir}/recipe.json: not found; finish the recipe with: python inheritune.py PRESET.toml")
    recipe = storage.read_json(out_dir / "recipe.json")
    attention = {
        model["role"]: storage.read_json((out_dir / model["path"]).parent / "attention" / "attention.json")
        for model in recipe["models"]
        if model["role"] in ("reference", "target")
    }
    rows = rows_of(recipe, out_dir)
    plot_losses(rows, out_dir)
    plot_ranks(attention, out_dir / "rank.png")
    made_by = ", ".join(f"{key} {value}" for key, value in recipe["made_by"].items())
    target = next(Path(model["path"]).parent for model in recipe["models"] if model["role"] == "target")
    text = f"""# {out_dir.name}

{table(rows)}

Loss: over {len(val_losses(rows[0]["path"]))} fixed validation windows of {attention["reference"]["T"]} tokens, ±
standard error. Difference: paired over the windows, with its 95% interval. Matched: a mean difference of at most
{recipe["tolerance"]} nats. Tokens and FLOPs (6 for each weight and token, and attention) count the reference's
training wherever a model inherits from it. Latency: a forward pass of one sequence on the CPU, the reference's being 1.

## What the paper's claims came to here

{claims(rows, recipe, attention["reference"])}

## Validation loss

![validation loss against tokens](loss.png)

## Attention rank and columns by layer

![rank and columns by layer](rank.png)

k*: the least number of singular directions with {attention["reference"]["tau"]:.0%} of the squared singular values.
c*: the fewest columns with that share of the squared entries, our reading of the paper's "90% total mass". Both
depend on T. Per head: [reference](reference/attention/attention.png), [target]({target}/attention/attention.png).

Made by: {made_by}.
"""
    path = out_dir / "report.md"
    path.write_text(text, encoding="utf-8")
    print(f"\n{table(rows)}\n\n{claims(rows, recipe, attention['reference'])}\n\nreport: {path}")
    return path


def main():
    report(configurator.load(ReportConfig).out_dir)


if __name__ == "__main__":
    configurator.run(main)
