"""Does the rank of inherited layers predict the loss of the model, or does their cost? (paper, table 4)

    python analyze_attention.py out/study_cpu/seed-1/reference --data_dir=data/study --ablate
    python runs/which_layers.py out/study_cpu seed-1
    python runs/which_layers.py out/study_cpu seed-1 out/better/spread    # and runs made by hand

It compares the models that took whole layers of a recipe's reference and were trained for the same
steps. It prints a table and Spearman correlations, and writes which_layers.csv and which_layers.png into
the recipe's directory.
"""

import csv
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from ablation import spearman
from plumbing import configurator, figures, model_files, storage
from plumbing.configurator import UserError
from report import val_losses


def rows(recipe_dir: Path, seed: str, others: list[Path]) -> list[dict]:
    """name, layers, k, AvgRank, mean cost of the layers, loss: one row for each model."""
    recipe = storage.read_json(recipe_dir / "recipe.json")
    reference = recipe_dir / next(path for path in recipe["models"][0]["paths"] if path.startswith(seed))
    analysis = reference.parent / "attention/attention.json"
    measured = storage.read_json(analysis)["layers"] if analysis.is_file() else [{}]
    if "cost" not in measured[0]:
        raise UserError(f"{analysis} has no costs; run analyze_attention.py --ablate on {reference.parent}")
    max_steps = storage.read_json(reference / "trainer_state.json")["step"]
    paths, found = {}, []
    for model in recipe["models"]:
        for path in (each for each in model["paths"] if each.startswith(seed)):
            paths[model["name"]] = recipe_dir / path
    for name, path in (paths | {each.name: model_files.resolve(each) for each in others}).items():
        if not (path / "lineage.json").exists():  # random weights
            continue
        lineage = storage.read_json(path / "lineage.json")
        layers, state = lineage.get("layers", [None]), storage.read_json(path / "trainer_state.json")
        smaller = None not in layers and len(layers) < len(measured)
        whole = lineage["sha256"] == model_files.hashes(reference) and lineage.get("parts") == "all"
        same = state["step"] == max_steps and not state["settings"]["teacher"]
        if smaller and whole and same:
            found.append({
                "model": name,
                "layers": " ".join(map(str, layers)),
                "k": len(layers),
                "avg_rank": np.mean([measured[layer]["max_rank"] for layer in layers]),
                "cost": np.mean([measured[layer]["cost"] for layer in layers]),
                "loss": val_losses(path).mean(),
            })
    return sorted(found, key=lambda row: (row["k"], row["loss"]))


def main():
    recipe_dir, seed = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    found = rows(recipe_dir, seed, [Path(name) for name in sys.argv[3:]])
    for row in found:
        numbers = f"{row['avg_rank']:8.2f} {row['cost']:8.4f} {row['loss']:8.4f}"
        print(f"{row['model']:28s} {row['layers']:24s} {numbers}")
    with open(recipe_dir / "which_layers.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, found[0])
        table.writeheader()
        table.writerows(found)
    labels = {"avg_rank": "AvgRank of the layers", "cost": "mean cost of the layers, nats"}
    with figures.figure(recipe_dir / "which_layers.png", 2, size=(5.5, 4.2)) as axes:
        for axis, (key, label) in zip(axes, labels.items(), strict=True):
            for i, k in enumerate(sorted({row["k"] for row in found})):
                some = [row for row in found if row["k"] == k]
                x, y = ([row[name] for row in some] for name in (key, "loss"))
                rho, p = spearman(x, y)
                print(f"{k} layers, {len(some)} models: {label} with loss: rho {rho:+.2f}, p {p:.3f}")
                axis.plot(x, y, figures.MARKERS[i], color=figures.COLORS[i], label=f"{k} layers")
                for row in some:
                    at = (row[key], row["loss"])
                    axis.annotate(row["model"], at, (4, 3), textcoords="offset points", fontsize=7)
            axis.set(xlabel=label, ylabel="validation loss, nats per token")
            axis.legend(frameon=False)


if __name__ == "__main__":
    configurator.run(main)
