"""All figures, drawn from finished numbers, in colours for colour-blind readers and styles for print.

python report.py out/demo                                              # loss, differences and rank
python analyze_attention.py out/demo/reference --data_dir=data/demo    # attention.png and heads.png
python report.py out/tracked --animate                                 # collapse.png and collapse.gif
"""

import contextlib
from pathlib import Path

import numpy as np

# Okabe and Ito's colours
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
STYLES, MARKERS = ("-", "--", ":", "-."), "os^D"
DOTTED = {"color": "#000000", "linewidth": 0.8, "linestyle": ":"}


@contextlib.contextmanager
def figure(
    path: Path | None, panels: int = 1, *, size: tuple[float, float], title: str = "", per_row: int = 3
):
    """The axes of a figure, which is saved to `path` at the end. size: of one panel, inches."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot as plt

    columns = panels if panels <= 3 else 2 if panels == 4 else 3
    rows = -(-panels // columns)
    inches = {"figsize": (size[0] * columns, size[1] * rows), "layout": "constrained", "squeeze": False}
    drawing, axes = plt.subplots(rows, columns, **inches)
    for i, axis in enumerate(axes.flat):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_visible(i < panels)
    yield list(axes.flat[:panels])
    drawing.suptitle(title)
    if path:
        drawing.savefig(path, dpi=120)
    plt.close(drawing)


def plot_losses(rows: list[dict], path: Path):
    """Validation loss by the tokens of each model's own training. Dotted: the reference's last loss."""
    shown = rows[: len(COLORS)]
    with figure(path, size=(7.5, 4.5)) as (axis,):
        for i, (row, color) in enumerate(zip(shown, COLORS, strict=False)):
            label = f"{row['name']}: {row['loss']:.3f}"
            millions = np.asarray(row["curve"][0]) / 1e6
            axis.plot(millions, row["curve"][1], STYLES[i % 4], color=color, label=label, marker="o", ms=3)
        axis.axhline(rows[0]["loss"], **DOTTED)
        # the first losses of random weights would squeeze the part that matters
        lowest, highest = min(row["loss"] for row in shown), max(row["curve"][1][:3][-1] for row in shown)
        margin = 0.05 * (highest - lowest) + 1e-3
        axis.set_ylim(lowest - margin, highest + margin)
        axis.set(xlabel="tokens of its own training, millions", ylabel="validation loss, nats per token")
        axis.legend(frameon=False)


def plot_differences(rows: list[dict], path: Path):
    """Each model's loss minus the reference's with its 95% interval, best at the top; rings: single seeds."""
    ordered, name = sorted(rows[1:], key=lambda row: -row["difference"]), "{} ({} layers, {:.1f} M tokens)"
    with figure(path, size=(8, 1 + 0.3 * len(rows))) as (axis,):
        for y, row in enumerate(ordered):
            color = COLORS[1] if row["role"] == "target" else COLORS[0]
            axis.plot(row["each"], [y] * len(row["each"]), "o", ms=4, mfc="none", color="#999999")
            axis.errorbar(row["difference"], y, xerr=row["interval"], fmt="D", ms=5, capsize=3, color=color)
        names = [name.format(row["name"], row["n_layer"], row["own_tokens"] / 1e6) for row in ordered]
        axis.set_yticks(range(len(ordered)), names)
        axis.axvline(0, **DOTTED)
        axis.set(xlabel="loss minus the reference's (nats per token)")


def conditions(result: dict) -> str:
    """What the numbers of an analysis depend on."""
    return f"T = {result['T']}, τ = {np.atleast_1d(result['tau'])[0]}, {result['sequences']} sequences"


def draw_layers(axes, models: list[tuple[str, dict]], measures: dict[str, str]):
    """An axis for each measure {key: label}: a line over the layers of each model, ± 1 standard error."""
    for axis, (key, label) in zip(axes, measures.items(), strict=True):
        for i, (name, model) in enumerate(models):
            table = [[row[k] for row in model["layers"]] for k in ("layer", key, f"{key}_se")]
            layers, mean, error = map(np.array, table)
            axis.plot(layers, mean, STYLES[i % 4] + MARKERS[i % 4], color=COLORS[i], label=name, ms=5)
            axis.fill_between(layers, mean - error, mean + error, color=COLORS[i], alpha=0.25, linewidth=0)
        axis.set(xlabel="layer", ylabel=label, ylim=(0, None))
        axis.locator_params(axis="x", integer=True)
    axes[0].legend(frameon=False)


def draw_costs(axis, model: dict, cheap: float):
    """A point for each layer: its MaxRank and the loss that it costs to leave it out, ± 1 standard error."""
    rank, cost, error = ([row[key] for row in model["layers"]] for key in ("max_rank", "cost", "cost_se"))
    axis.errorbar(rank, cost, yerr=error, fmt="o", ms=4, color=COLORS[1])
    for row in model["layers"]:
        axis.annotate(row["layer"], (row["max_rank"], row["cost"]), (4, 3), textcoords="offset points")
    axis.axhline(cheap, **DOTTED)
    axis.set_yscale("symlog", linthresh=max(cheap, 1e-3))  # linear around zero: a cost may be below it
    title = f"{model['name']}: cheap below the dotted line"
    axis.set(xlabel="MaxRank", ylabel="cost of the layer, nats", title=title)
    axis.set_ylim(2 * min(0, *np.subtract(cost, error)), 2 * max(cheap, 1e-3, *cost))


def draw_map(axis, values, largest=None, **labels):
    """A colour for each of the values (rows, columns)."""
    axis.figure.colorbar(axis.imshow(values, aspect="auto", interpolation="nearest", vmax=largest), ax=axis)
    axis.set(**labels)
    axis.locator_params(integer=True)


def plot_attention(result: dict, path: Path):
    """Every measure by layer of all models; but for the control, each head's rank, and costs if measured."""
    maps, n = [model for model in (result, result["compared"]) if model], len(result["measures"])
    costly = [model for model in maps if "ablation" in model]
    lines = [(model["name"], model) for model in maps]
    lines += [("untrained", result["untrained"])] if result["untrained"] else []
    largest = max(max(map(max, model["heads"]["rank"])) for model in maps)
    with figure(path, n + len(maps + costly), size=(4.4, 3.4), title=conditions(result)) as axes:
        draw_layers(axes[:n], lines, result["measures"])
        for axis, model in zip(axes[n + len(maps) :], costly, strict=True):
            draw_costs(axis, model, result["cheap_below"])
        for axis, model in zip(axes[n:], maps, strict=False):
            ranks = np.full((max(map(len, model["heads"]["rank"])), model["n_layer"]), np.nan)  # (H, L)
            for row, of_heads in zip(model["layers"], model["heads"]["rank"], strict=True):
                ranks[: len(of_heads), row["layer"]] = of_heads  # a layer without attention stays blank
            title = f"{model['name']}: rank of each head"
            draw_map(axis, ranks, largest, title=title, xlabel="layer", ylabel="head")


def plot_ranks(attention: dict[str, dict], path: Path):
    """Every measure by layer of {"reference": result, "target": result} and of the reference's control."""
    lines, first = list(attention.items()), attention["reference"]
    lines += [("untrained", first["untrained"])] if first["untrained"] else []
    with figure(path, len(first["measures"]), size=(4.6, 3.2), title=conditions(first)) as axes:
        draw_layers(axes, lines, first["measures"])


def plot_heads(pictures: list[dict], result: dict, path: Path):
    """The attention matrices (T, T) of some heads on one sequence."""
    from matplotlib.colors import LogNorm

    title = f"{result['name']}: attention on one sequence, T = {result['T']}; below 0.001 as 0.001"
    with figure(path, len(pictures), size=(4.6, 4), title=title) as axes:
        for axis, picture in zip(axes, pictures, strict=True):
            causal = np.ma.masked_where(np.triu(np.ones_like(picture["matrix"]), 1) > 0, picture["matrix"])
            image = axis.imshow(causal, norm=LogNorm(1e-3, 1, clip=True), interpolation="nearest")
            name = f"layer {picture['layer']}, head {picture['head']}: rank {picture['rank']:.1f}"
            axis.set(xlabel="key position", ylabel="query position", title=name)
            axis.figure.colorbar(image, ax=axis)


def plot_collapse(lines: list[dict], path: Path):
    """Every tracked measure by layer (down) and step (across). The lines are those of metrics.jsonl."""
    labels = [label for label, value in lines[0].items() if isinstance(value, list)]
    shown = sorted({0, len(lines) // 2, len(lines) - 1})
    with figure(path, len(labels), size=(4.6, 3.2), title=conditions(lines[0])) as axes:
        for axis, label in zip(axes, labels, strict=True):
            values = np.array([line[label] for line in lines]).T  # (L, evaluations)
            draw_map(axis, values, title=label, xlabel="step", ylabel="layer")
            axis.set_xticks(shown, [f"{lines[i]['step']:,}" for i in shown])


def animate_collapse(lines: list[dict], path: Path):
    """A GIF of MaxRank by layer, a frame for each evaluation. Dotted: the first evaluation."""
    from matplotlib.animation import FuncAnimation, PillowWriter

    highest = max(max(line["MaxRank"]) for line in lines)
    with figure(None, size=(6, 3.6)) as (axis,):

        def draw(line: dict):
            ranks, axis_title = line["MaxRank"], f"step {line['step']:,}; {conditions(line)}"
            axis.clear()
            axis.plot(lines[0]["MaxRank"], "k:")
            axis.bar(range(len(ranks)), ranks, color=COLORS[1])
            axis.set(xlabel="layer", ylabel="MaxRank", ylim=(0, 1.1 * highest), title=axis_title)

        FuncAnimation(axis.figure, draw, frames=lines).save(path, writer=PillowWriter(fps=4), dpi=100)
