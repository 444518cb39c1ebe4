"""All figures, from finished numbers, in colours for colour-blind readers and styles for print.

python report.py out/demo                                              # loss, differences, rank
python analyze_attention.py out/demo/reference --data_dir=data/demo    # attention, heads
python report.py out/tracked --animate                                 # collapse
"""

import contextlib
from pathlib import Path

import numpy as np

# Okabe and Ito's colours
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
STYLES, MARKERS = ("-", "--", ":", "-."), "os^D"
DOTTED = {"color": "#000000", "linewidth": 0.8, "linestyle": ":"}


@contextlib.contextmanager
def figure(path: Path, panels: int = 1, *, size: tuple[float, float], title: str = ""):
    """The axes of a figure, saved to `path` at the end. size: of a panel, inches."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot as plt

    columns = 2 if panels == 4 else min(panels, 3)
    rows = -(-panels // columns)
    inches = (size[0] * columns, size[1] * rows)
    drawing, axes = plt.subplots(rows, columns, figsize=inches, layout="constrained", squeeze=False)
    for i, axis in enumerate(axes.flat):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_visible(i < panels)
    drawing.suptitle(title)
    yield list(axes.flat[:panels])
    if path.suffix != ".gif":
        drawing.savefig(path, dpi=120)
    plt.close(drawing)


def plot_losses(rows: list[dict], path: Path):
    """Validation loss by the tokens of each model's own training. Dotted: the reference's last."""
    rows = rows[: len(COLORS)]
    with figure(path, size=(7.5, 4.5)) as (axis,):
        for i, (row, color) in enumerate(zip(rows, COLORS, strict=False)):
            label = f"{row['name']}: {row['loss']:.3f}"
            millions = np.asarray(row["curve"][0]) / 1e6
            axis.plot(millions, row["curve"][1], "o" + STYLES[i % 4], c=color, label=label, ms=3)
        axis.axhline(rows[0]["loss"], **DOTTED)
        # the first losses of random weights would squeeze the part that matters
        lowest = min(row["loss"] for row in rows)
        highest = max(row["curve"][1][:3][-1] for row in rows)
        margin = 0.05 * (highest - lowest) + 1e-3
        axis.set_ylim(lowest - margin, highest + margin)
        axis.set(xlabel="tokens of its own training, millions", ylabel="loss, nats per token")
        axis.legend(frameon=False)


def plot_differences(rows: list[dict], path: Path):
    """Loss minus the reference's with its 95% interval, best at the top; rings: single seeds."""
    ordered, names = sorted(rows[1:], key=lambda row: -row["difference"]), []
    with figure(path, size=(8, 1 + 0.3 * len(rows))) as (axis,):
        for y, row in enumerate(ordered):
            color = COLORS[1] if row["role"] == "target" else COLORS[0]
            axis.plot(row["each"], [y] * len(row["each"]), "o", ms=4, mfc="none", color="#999999")
            axis.errorbar(row["difference"], y, xerr=row["interval"], fmt="D", capsize=3, c=color)
            tokens = f"{row['own_tokens'] / 1e6:.1f} M tokens"
            names.append(f"{row['name']} ({row['n_layer']} layers, {tokens})")
        axis.set_yticks(range(len(ordered)), names)
        axis.axvline(0, **DOTTED)
        axis.set(xlabel="loss minus the reference's (nats per token)")


def conditions(result: dict) -> str:
    """What the numbers of an analysis depend on."""
    return f"T = {result['T']}, τ = {np.ravel(result['tau'])[0]}, {result['sequences']} sequences"


def draw_layers(axes, models: list[dict], measures: dict[str, str]):
    """An axis for each measure {key: label}: a line over the layers of each model, ± 1 s. e."""
    for axis, (key, label) in zip(axes, measures.items(), strict=True):
        for i, model in enumerate(models):
            table = [[row[k] for row in model["layers"]] for k in ("layer", key, f"{key}_se")]
            layers, mean, error = map(np.array, table)
            axis.plot(layers, mean, STYLES[i] + MARKERS[i], color=COLORS[i], label=model["name"], ms=5)
            axis.fill_between(layers, mean - error, mean + error, color=COLORS[i], alpha=0.25, lw=0)
        axis.set(xlabel="layer", ylabel=label, ylim=(0, None))
        axis.locator_params(axis="x", integer=True)
    axes[0].legend(frameon=False)


def draw_costs(axis, model: dict, cheap: float):
    """A point for each layer: its MaxRank and the loss that it costs to leave it out, ± 1 s. e."""
    for row in model["layers"]:
        point = row["max_rank"], row["cost"]
        axis.errorbar(*point, yerr=row["cost_se"], fmt="o", ms=4, color=COLORS[1])
        axis.annotate(row["layer"], point, (4, 3), textcoords="offset points")
    axis.axhline(cheap, **DOTTED)
    axis.set_yscale("symlog", linthresh=max(cheap, 1e-3))  # a cost may be below zero
    costs = [row["cost"] for row in model["layers"]]
    axis.set_ylim(min(-cheap, 2 * min(costs)), 3 * max(cheap, *costs))  # room for the labels
    title = f"{model['name']}: cheap below the dotted line"
    axis.set(xlabel="MaxRank", ylabel="cost of the layer, nats", title=title)


def draw_map(axis, values, norm=None, **labels):
    """A colour for each of the values (rows, columns)."""
    image = axis.imshow(values, norm=norm, aspect="auto", interpolation="nearest")
    axis.figure.colorbar(image, ax=axis)
    axis.set(**labels)
    axis.locator_params(integer=True)


def plot_attention(result: dict, path: Path):
    """Every measure by layer of all models, each head's rank, and costs if they were measured."""
    models = [model for model in (result, result["compared"]) if model]
    costly, n = [model for model in models if "ablation" in model], len(result["measures"])
    panels = n + len(models) + len(costly)
    with figure(path, panels, size=(4.4, 3.4), title=conditions(result)) as axes:
        draw_layers(axes[:n], [*models, result["untrained"]], result["measures"])
        for axis, model in zip(axes[n:], models, strict=False):
            heads = model["heads"]["rank"]
            ranks = np.full((max(map(len, heads)), model["n_layer"]), np.nan)  # (H, L)
            for row, of_heads in zip(model["layers"], heads, strict=True):
                ranks[: len(of_heads), row["layer"]] = of_heads  # no attention: blank
            title = f"{model['name']}: rank of each head"
            draw_map(axis, ranks, title=title, xlabel="layer", ylabel="head")
        for axis, model in zip(axes[n + len(models) :], costly, strict=True):
            draw_costs(axis, model, result["cheap_below"])


def plot_heads(pictures: list[dict], result: dict, path: Path):
    """The attention matrices (T, T) of some heads on one sequence."""
    from matplotlib.colors import LogNorm

    title = f"{result['name']}: attention on one sequence, T = {result['T']}; below 0.001 as 0.001"
    with figure(path, len(pictures), size=(4.6, 4), title=title) as axes:
        for axis, picture in zip(axes, pictures, strict=True):
            matrix = picture["matrix"]
            causal = np.where(np.tri(len(matrix), dtype=bool), matrix, np.nan)
            name = f"layer {picture['layer']}, head {picture['head']}: rank {picture['rank']:.1f}"
            labels = {"title": name, "xlabel": "key position", "ylabel": "query position"}
            draw_map(axis, causal, LogNorm(1e-3, 1, clip=True), **labels)


def plot_collapse(lines: list[dict], path: Path):
    """Every tracked measure by layer (down) and step (across), from the lines of metrics.jsonl."""
    labels = [label for label in lines[-1] if all(isinstance(line.get(label), list) for line in lines)]
    shown = sorted({0, len(lines) // 2, len(lines) - 1})
    with figure(path, len(labels), size=(4.6, 3.2), title=conditions(lines[0])) as axes:
        for axis, label in zip(axes, labels, strict=True):
            values = np.array([line[label] for line in lines]).T  # (L, evaluations)
            draw_map(axis, values, title=label, xlabel="step", ylabel="layer")
            axis.set_xticks(shown, [f"{lines[i]['step']:,}" for i in shown])


def animate_collapse(lines: list[dict], path: Path):
    """A GIF of MaxRank by layer, a frame for each evaluation. Dotted: the first evaluation."""
    from matplotlib.animation import FuncAnimation

    highest = max(max(line["MaxRank"]) for line in lines)
    with figure(path, size=(6, 3.6)) as (axis,):

        def draw(line: dict):
            axis.clear()
            axis.plot(lines[0]["MaxRank"], "k:")
            axis.bar(range(len(line["MaxRank"])), line["MaxRank"], color=COLORS[1])
            axis.set(xlabel="layer", ylabel="MaxRank", ylim=(0, 1.1 * highest))
            axis.set_title(f"step {line['step']:,}; {conditions(line)}")

        FuncAnimation(axis.figure, draw, frames=lines).save(path, writer="pillow", fps=4)
