"""Figures, drawn from numbers that are already there: colours for every eye, line styles and markers for print.

    python report.py out/demo                # loss.png, arms.png and rank.png
    python inheritune.py config/demo.toml    # and all that they show

Nothing here computes or reads a result: what calls these hands them the rows.
"""

from pathlib import Path

import numpy as np

COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")  # Okabe and Ito
STYLES = ("-", "-", "--", ":", "-.")


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


def plot_ranks(attention: dict[str, dict], path: Path):
    """Rank and columns by layer of the reference, the target and the untrained control."""
    from matplotlib.ticker import MaxNLocator

    reference = attention["reference"]
    lines = [("reference", reference["layers"]), ("inherited target", attention["target"]["layers"])]
    lines.append(("untrained", reference["untrained"]))
    plt, figure, axes = new_figure(2, size=(10, 4))
    for axis, measure, label in zip(axes, ("max_rank", "max_columns"), ("rank k*", "columns c*"), strict=True):
        for i, (name, layers) in enumerate(lines):
            x = [row["layer"] for row in layers]
            mean, error = (np.array([row[measure + end] for row in layers]) for end in ("", "_se"))
            style = {"color": COLORS[i], "linestyle": ("-", "-", "--")[i], "marker": "os^"[i]}
            axis.plot(x, mean, label=name, **style)
            axis.fill_between(x, mean - error, mean + error, color=COLORS[i], alpha=0.2, linewidth=0)
        axis.set(xlabel="layer", ylabel=f"{label}, largest of the heads", ylim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(frameon=False)
    figure.suptitle(f"T = {reference['T']}, τ = {reference['tau']}, n = {reference['sequences']} sequences, ± 1 s.e.")
    figure.savefig(path, dpi=120)
    plt.close(figure)
