"""All figures, drawn from finished numbers. Colours are safe for colour-blind readers; lines differ in print too.

    python report.py out/demo                                              # loss, differences and rank
    python analyze_attention.py out/demo/reference --data_dir=data/demo    # attention.png and heads.png
    python report.py out/tracked --animate                                 # collapse.png and collapse.gif
"""

import itertools
from pathlib import Path

import numpy as np

COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")  # Okabe and Ito
STYLES = ("-", "--", ":", "-.")
MARKERS = "os^D"


def new_figure(panels: int = 1, *, size: tuple[float, float], per_row: int = 3):
    """pyplot without a display, a figure, and its axes in rows; size is one panel's, in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns, rows = min(panels, per_row), -(-panels // per_row)
    figure, axes = plt.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows), layout="constrained", squeeze=False
    )
    for i, axis in enumerate(axes.flat):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_visible(i < panels)
    return plt, figure, list(axes.flat[:panels])


def finish(plt, figure, path: Path, title: str = ""):
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_losses(rows: list[dict], path: Path):
    """Validation loss by the tokens of each model's own training. Dotted: the reference's last loss."""
    plt, figure, (axis,) = new_figure(size=(7.5, 4.5))
    shown = rows[: len(COLORS)]
    for i, row in enumerate(shown):
        tokens, losses = row["curve"]
        label, style = f"{row['name']}: {row['loss']:.3f}", STYLES[i % len(STYLES)]
        axis.plot(np.asarray(tokens) / 1e6, losses, style, color=COLORS[i], label=label, marker="o", ms=3)
    axis.axhline(rows[0]["loss"], color="#000000", linewidth=0.8, linestyle=":")
    # the losses of random weights would squeeze the part that matters: start at the third evaluation
    highest = max(losses[min(2, len(losses) - 1)] for _, losses in (row["curve"] for row in shown))
    lowest = min(row["loss"] for row in shown)
    margin = 0.05 * max(highest - lowest, 1e-3)
    axis.set(xlabel="tokens of its own training, millions", ylabel="validation loss, nats per token")
    axis.set_ylim(lowest - margin, highest + margin)
    axis.legend(frameon=False)
    finish(plt, figure, path)


def plot_differences(rows: list[dict], path: Path):
    """Each model's loss minus the reference's with its 95% interval, best at the top; rings: single seeds."""
    ordered = sorted(rows[1:], key=lambda row: -row["difference"])
    plt, figure, (axis,) = new_figure(size=(8, 1 + 0.3 * len(rows)))
    for y, row in enumerate(ordered):
        color = COLORS[1] if row["role"] == "target" else COLORS[0]
        axis.plot(row["each"], [y] * len(row["each"]), "o", ms=4, mfc="none", color="#999999")
        axis.errorbar(row["difference"], y, xerr=row["interval"], fmt="D", ms=5, capsize=3, color=color)
    labels = [f"{row['name']} ({row['n_layer']} layers, {row['own_tokens'] / 1e6:.1f} M tokens)" for row in ordered]
    axis.set_yticks(range(len(ordered)), labels)
    axis.axvline(0, color="#000000", linewidth=0.8, linestyle=":")
    axis.set(xlabel="validation loss minus the reference's, nats per token", title="left: better than the reference")
    finish(plt, figure, path)


def conditions(result: dict) -> str:
    """What the numbers of an analysis depend on."""
    tau = result["tau"][0] if isinstance(result["tau"], list) else result["tau"]
    return f"T = {result['T']}, τ = {tau}, {result['sequences']} sequences"


def plot_layers(axes, lines: list[tuple[str, list[dict]]], measures: dict[str, str]):
    """An axis for each measure {key: label}, by layer: a line with its standard error for each (name, layers)."""
    for axis, (key, label) in zip(axes, measures.items(), strict=True):
        for i, (name, rows) in enumerate(lines):
            layers = [row["layer"] for row in rows]
            mean, error = (np.array([row[key + end] for row in rows]) for end in ("", "_se"))
            axis.plot(layers, mean, STYLES[i % 4] + MARKERS[i % 4], color=COLORS[i], label=name, markersize=5)
            axis.fill_between(layers, mean - error, mean + error, color=COLORS[i], alpha=0.25, linewidth=0)
        axis.set(xlabel="layer", ylabel=label, ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(frameon=False)


def plot_attention(result: dict, path: Path):
    """Every measure by layer, with the control and the compared model, and a map of the mean rank of every head."""
    models = [model for model in (result, result["compared"]) if model]
    lines = [(model["name"], model["layers"]) for model in (*models, result["untrained"]) if model]
    n = len(result["measures"])
    plt, figure, axes = new_figure(n + len(models), size=(4.4, 3.5))
    plot_layers(axes[:n], lines, result["measures"])
    maps = [list(itertools.zip_longest(*model["heads"]["rank"], fillvalue=np.nan)) for model in models]  # (H, L)
    largest = max(np.nanmax(ranks) for ranks in maps)
    for axis, model, ranks in zip(axes[n:], models, maps, strict=True):
        image = axis.imshow(ranks, aspect="auto", cmap="viridis", vmin=1, vmax=largest)
        layers = [row["layer"] for row in model["layers"]]
        shown = range(0, len(layers), -(-len(layers) // 12))
        axis.set_xticks(list(shown), [str(layers[i]) for i in shown])
        axis.set(xlabel="layer", ylabel="head", title=f"{model['name']}: mean rank of each head")
        axis.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axis)
    finish(plt, figure, path, conditions(result) + "; bands: ± 1 standard error")


def plot_ranks(attention: dict[str, dict], path: Path):
    """MaxRank and the other measures by layer, of {"reference": result, "target": result} and the control."""
    lines = [(f"{role} ({result['name']})", result["layers"]) for role, result in attention.items()]
    reference = attention["reference"]
    lines += [("untrained", reference["untrained"]["layers"])] if reference["untrained"] else []
    plt, figure, axes = new_figure(len(reference["measures"]), size=(4.6, 3.4), per_row=2)
    plot_layers(axes, lines, reference["measures"])
    finish(plt, figure, path, conditions(reference) + "; bands: ± 1 standard error")


def plot_heads(pictures: list[dict], result: dict, path: Path):
    """Attention matrices (T, T) of some heads on one sequence, and the energy that their first k directions hold."""
    from matplotlib.colors import LogNorm

    plt, figure, (*axes, last) = new_figure(len(pictures) + 1, size=(4.3, 3.9))
    for i, (axis, picture) in enumerate(zip(axes, pictures, strict=True)):
        name, matrix = f"layer {picture['layer']}, head {picture['head']}", picture["matrix"]
        causal = np.ma.masked_where(np.triu(np.ones_like(matrix), 1) > 0, matrix)
        image = axis.imshow(causal, cmap="cividis", norm=LogNorm(1e-3, 1, clip=True), interpolation="nearest")
        axis.set(xlabel="key position", ylabel="query position")
        axis.set_title(f"{name}: Rank = {picture['rank']:.1f}", fontsize=11)
        energy = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
        share = np.cumsum(energy) / energy.sum()
        last.plot(range(1, len(share) + 1), share, STYLES[i % 4], color=COLORS[1 + i], label=name)
    figure.colorbar(image, ax=axes[-1], label="attention (smallest: 0.001)")
    last.axhline(result["tau"][0], color="#000000", linewidth=0.8, linestyle=":", label=f"τ = {result['tau'][0]}")
    last.set(xlabel="k", ylabel="energy in the first k directions", ylim=(0, 1.02), xscale="log")
    last.legend(frameon=False, loc="lower right")
    finish(plt, figure, path, f"{result['name']}: one sequence, T = {result['T']}")


def plot_collapse(lines: list[dict], path: Path):
    """Every tracked measure by layer (down) and step (across). The lines are those of metrics.jsonl."""
    labels = [label for label, value in lines[0].items() if isinstance(value, list)]
    steps = [line["step"] for line in lines]
    plt, figure, axes = new_figure(len(labels), size=(4.6, 3.2), per_row=2)
    for axis, label in zip(axes, labels, strict=True):
        values = np.array([line[label] for line in lines]).T  # (L, evaluations)
        image = axis.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
        shown = sorted({0, len(steps) // 2, len(steps) - 1})
        axis.set_xticks(shown, [f"{steps[i]:,}" for i in shown])
        axis.set(xlabel="step", ylabel="layer", title=label)
        axis.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axis)
    finish(plt, figure, path, conditions(lines[0]))


def animate_collapse(lines: list[dict], path: Path):
    """A GIF of MaxRank by layer, a frame for each evaluation; dotted: the first evaluation."""
    from matplotlib.animation import FuncAnimation, PillowWriter

    plt, figure, (axis,) = new_figure(size=(6, 3.6))
    first, highest = lines[0]["MaxRank"], max(max(line["MaxRank"]) for line in lines)

    def draw(line: dict):
        axis.clear()
        axis.plot(first, "k:", label=f"step {lines[0]['step']:,}")
        axis.bar(range(len(first)), line["MaxRank"], color=COLORS[1], label=f"step {line['step']:,}")
        axis.set(xlabel="layer", ylabel="MaxRank", ylim=(0, 1.1 * highest), title=conditions(line))
        axis.legend(frameon=False, loc="upper right")

    FuncAnimation(figure, draw, frames=lines).save(path, writer=PillowWriter(fps=4), dpi=100)
    plt.close(figure)
