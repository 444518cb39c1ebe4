"""Figures, drawn from numbers that are already there: colours for every eye, line styles and markers for print.

    python report.py out/demo                        # loss.png, arms.png and rank.png
    python analyze_attention.py out/demo/reference --data_dir=data/demo    # attention.png and heads.png

Nothing here computes or reads a result: what calls these hands them the rows.
"""

import itertools
from pathlib import Path

import numpy as np

COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")  # Okabe and Ito
STYLES = ("-", "-", "--", ":", "-.")
MARKED = ("o-", "s--", "^:", "D-.")


def new_figure(columns: int = 1, *, size: tuple[float, float]):
    """pyplot without a display, a figure and its axes side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return plt, figure, axes[0]


def plot_losses(rows: list[dict], path: Path):
    """Validation loss against the tokens of each run's own training, mean over the seeds; dotted: the reference's.

    Of many models those with the most seeds are shown, as many as there are colours.
    """
    plt, figure, (axis,) = new_figure(size=(7.5, 4.5))
    shown = sorted(rows, key=lambda row: -len(row["paths"]))[: len(COLORS)]
    for i, row in enumerate(shown):
        tokens, losses = row["curve"]
        style = {"color": COLORS[i], "linestyle": STYLES[i % len(STYLES)]}
        axis.plot(tokens / 1e6, losses, label=f"{row['name']}: {row['loss']:.3f}", marker="o", ms=3, **style)
    axis.axhline(rows[0]["loss"], color="#000000", linewidth=0.8, linestyle=":")
    # the first evaluations of random weights would squeeze the part that matters
    highest = max(losses[min(2, len(losses) - 1)] for _, losses in (row["curve"] for row in shown))
    lowest = min(row["loss"] for row in shown)
    axis.set(xlabel="tokens of its own training, millions", ylabel="validation loss, nats a token")
    axis.set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.05 * (highest - lowest))
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_arms(rows: list[dict], path: Path):
    """Every model's difference to the reference with its 95% interval, best first; small rings: each seed's."""
    plt, figure, (axis,) = new_figure(size=(8, 1 + 0.3 * len(rows)))
    ordered = sorted(rows[1:], key=lambda row: -row["difference"])
    for y, row in enumerate(ordered):
        color = COLORS[1] if row["role"] == "target" else COLORS[0]
        axis.plot(row["each"], [y] * len(row["each"]), "o", ms=4, mfc="none", color="#999999")
        axis.errorbar(row["difference"], y, xerr=row["interval"], fmt="D", ms=5, capsize=3, color=color)
    labels = [f"{row['name']} ({row['n_layer']} layers, {row['own_tokens'] / 1e6:.1f} M tokens)" for row in ordered]
    axis.set_yticks(range(len(ordered)), labels)
    axis.axvline(0, color="#000000", linewidth=0.8, linestyle=":")
    axis.set(xlabel="validation loss minus the reference's, nats a token", title="left: better than the reference")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def conditions(result: dict, n: int | str) -> str:
    """What the numbers of a figure depend on; n is over how many sequences they are means."""
    bands = "of the mean matrix" if result["average_first"] else "bands: ± 1 standard error"
    return f"T = {result['T']}, τ = {result['tau']}, n = {n} sequences; {bands}"


def plot_layers(axes, lines: list[tuple[str, list[dict]]]):
    """Rank and columns by layer on two axes, a line with its error band for each (title, rows of summarize)."""
    for axis, name, label in zip(axes, ("max_rank", "max_columns"), ("rank k*", "columns c*"), strict=True):
        for (title, rows), color, style in zip(lines, COLORS, MARKED, strict=False):
            layers = [row["layer"] for row in rows]
            mean, error = (np.array([row[name + end] for row in rows]) for end in ("", "_se"))
            axis.plot(layers, mean, style, color=color, label=title, markersize=5)
            axis.fill_between(layers, mean - error, mean + error, color=color, alpha=0.25, linewidth=0)
        axis.set(xlabel="layer", ylabel=f"{label}, largest of the heads", ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(frameon=False)


def plot_attention(result: dict, path: Path):
    """Rank and columns by layer, with the control and the compared model, and a map of the rank of every head."""
    models = [model for model in (result, result["compared"]) if model]
    lines = [(model["name"], model["layers"]) for model in models]
    lines += [("untrained", result["untrained"])] if result["untrained"] else []
    plt, figure, axes = new_figure(2 + len(models), size=(9 + 3.6 * len(models), 3.8))
    plot_layers(axes[:2], lines)
    maps = [list(itertools.zip_longest(*model["heads"]["rank"], fillvalue=np.nan)) for model in models]  # (H, L)
    largest = max(np.nanmax(ranks) for ranks in maps)
    for axis, model, ranks in zip(axes[2:], models, maps, strict=True):
        image = axis.imshow(ranks, aspect="auto", cmap="viridis", vmin=1, vmax=largest)
        layers = [row["layer"] for row in model["layers"]]
        shown = range(0, len(layers), max(1, len(layers) // 8))
        axis.set_xticks(list(shown), [str(layers[i]) for i in shown])
        axis.set(xlabel="layer", ylabel="head", title=f"{model['name']}: mean rank of each head")
        axis.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes[2:], label="rank k*")
    figure.suptitle(conditions(result, " and ".join(dict.fromkeys(str(model["sequences"]) for model in models))))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_heads(result: dict, matrices: list[np.ndarray], path: Path):
    """The matrices (T, T) of the most and the least collapsed head, and how fast their energy adds up."""
    from matplotlib.colors import LogNorm

    plt, figure, axes = new_figure(3, size=(13, 4))
    for axis, entry, matrix, color, style in zip(axes, result["examples"], matrices, COLORS[1:], MARKED, strict=False):
        name = f"layer {entry['layer']}, head {entry['head']}"
        causal = np.ma.masked_where(np.triu(np.ones_like(matrix), 1) > 0, matrix)
        image = axis.imshow(causal, cmap="cividis", norm=LogNorm(1e-3, 1, clip=True), interpolation="nearest")
        axis.set(xlabel="position read", ylabel="position reading")
        axis.set_title(f"{entry['title']}: {name}\nmean k* = {entry['mean_rank']:.1f}", fontsize=11)
        axes[2].plot(range(1, len(entry["share"]) + 1), entry["share"], style, color=color, label=name, markersize=4)
    figure.colorbar(image, ax=axes[:2], label="attention (below 0.001 as 0.001)")
    axes[2].axhline(result["tau"], color="#000000", linewidth=0.8, linestyle=":", label=f"τ = {result['tau']}")
    axes[2].set(xlabel="directions k", ylabel="share of the energy in the first k", ylim=(0, 1.02), xscale="log")
    axes[2].xaxis.set_major_formatter("{x:.0f}")
    axes[2].legend(frameon=False, loc="lower right")
    which = "mean over all sequences" if result["average_first"] else "first sequence"
    figure.suptitle(f"T = {result['T']}; chosen by the mean rank over n = {result['sequences']} sequences; {which}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_ranks(attention: dict[str, dict], path: Path):
    """Rank and columns by layer of the reference, the target and the untrained control."""
    reference = attention["reference"]
    lines = [("reference", reference["layers"]), ("inherited target", attention["target"]["layers"])]
    plt, figure, axes = new_figure(2, size=(10, 4))
    plot_layers(axes, [*lines, ("untrained", reference["untrained"])])
    figure.suptitle(conditions(reference, reference["sequences"]))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_collapse(lines: list[dict], path: Path):
    """Rank and columns of every layer (down) as a training went on (across); the lines are metrics.jsonl's."""
    plt, figure, axes = new_figure(2, size=(10, 3.6))
    steps = [line["step"] for line in lines]
    for axis, name, label in zip(axes, ("max_rank", "max_columns"), ("rank k*", "columns c*"), strict=True):
        values = np.array([line[name] for line in lines]).T  # (L, evaluations)
        image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=1, interpolation="nearest")
        shown = sorted({0, len(steps) // 2, len(steps) - 1})
        axis.set_xticks(shown, [f"{steps[i]:,}" for i in shown])
        axis.set(xlabel="step", ylabel="layer", title=f"{label}, largest of the heads")
        axis.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axis)
    figure.suptitle("T = {T}, τ = {tau}, n = {sequences} sequences".format(**lines[0]))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def animate_collapse(lines: list[dict], path: Path):
    """A GIF: rank by layer, an image for each evaluation, the first one's rank dotted behind."""
    from matplotlib.animation import FuncAnimation, PillowWriter

    plt, figure, (axis,) = new_figure(size=(6, 3.6))
    first = np.array(lines[0]["max_rank"])
    layers, highest = np.arange(len(first)), max(max(line["max_rank"]) for line in lines)

    def draw(line: dict):
        axis.clear()
        axis.plot(layers, first, "k:", label=f"step {lines[0]['step']:,}")
        axis.bar(layers, line["max_rank"], color=COLORS[1], label=f"step {line['step']:,}")
        axis.set(xlabel="layer", ylabel="rank k*, largest of the heads", ylim=(0, 1.1 * highest), xticks=layers)
        axis.set_title("T = {T}, τ = {tau}, n = {sequences} sequences".format(**line))
        axis.legend(frameon=False, loc="upper right")

    FuncAnimation(figure, draw, frames=lines).save(path, writer=PillowWriter(fps=4), dpi=100)
    plt.close(figure)
