"""Rank and column mass of attention matrices, by layer and head (paper, section 2, appendix C).

    python analyze_attention.py out/demo/reference --data_dir=data/demo --compare=out/demo/random-3
    python analyze_attention.py some/llama --data_dir=data/llama --heads=7.16    # any decoder
    python analyze_attention.py out/demo/reference --data_dir=data/demo --ablate    # costs too

A is the causal attention matrix of a layer, head and sequence: T x T, each row sums to 1. The
control is an untrained model of the same shape. H heads, S sequences (the paper's N), B of them at a
time: a tensor called values_HS has the shape (H, S).
"""

from plumbing import configurator  # isort: skip  # before the slow imports: a quiet Ctrl-C

import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from tqdm import tqdm

import data
from plumbing import model_files, pretrained, storage
from plumbing.configurator import UserError
from plumbing.fast_rank import fast_rank
from plumbing.machine import pick_device


@dataclass
class AnalyzeConfig:
    """Measure the attention of every layer and head of a model on validation text."""

    model: tyro.conf.Positional[str]  # a checkpoint, a run directory or a name on the hub
    compare: str = ""  # a second model to put beside it
    data_dir: str = "data/python"  # made by prepare_data.py, with the model's tokenizer
    out: str = ""  # of the results; default MODEL/attention, out/MODEL/attention for a hub name
    seq_len: int = 100  # T; the model's block_size if that is shorter
    sequences: int = 100  # N random windows of the validation text; fewer if the text is short
    tau: str = "0.9"  # comma-separated: MaxRank at each; the main one is 0.9, else the largest
    groups: str = ""  # layer ranges for AvgRank, such as 0:4,4:8,8:12; default: thirds of the depth
    heads: str = ""  # to draw (layer.head), such as 7.16,29.16; default: most and least collapsed
    ablate: bool = False  # the loss without each layer, attention, head: a pass for each
    cheap_below: float = 0.02  # ablate: nats per token below which a layer counts as cheap
    micro_batch: int = 10  # sequences at a time; affects memory only
    device: str = "auto"
    seed: int = 0  # of the random windows


# ---- the definitions


def k_star(attention: torch.Tensor, tau: float = 0.90) -> torch.Tensor:
    """Definition G.1: the least k whose k largest sigma² reach tau · the sum of all: (..., T, T) -> (...).

    The reference for plumbing/fast_rank.py, which computes the same number faster.
    """
    energy = torch.linalg.svdvals(attention.double()).square()  # sigma_i², largest first (..., T)
    share = energy.cumsum(-1) / energy.sum(-1, keepdim=True)  # held by the first k = 1, ..., T
    return (share < tau).sum(-1) + 1


def m_star(attention: torch.Tensor, eta: float = 0.90) -> torch.Tensor:
    """The fewest columns with eta of ‖A‖_F²: (..., T, T) -> (...). Paper, appendix C."""
    mass = attention.double().square().sum(-2).sort(-1, descending=True).values  # ‖A_:,j‖² (..., T)
    return (mass.cumsum(-1) / mass.sum(-1, keepdim=True) < eta).sum(-1) + 1


def sink(attention: torch.Tensor) -> torch.Tensor:
    """The mean attention that the first column receives: (..., T, T) -> (...)."""
    return attention[..., 0].mean(-1)


class Measure(NamedTuple):
    name: str  # in "heads" of attention.json
    function: Callable[[torch.Tensor], torch.Tensor]  # attention (B, H, T, T) -> (B, H)
    over_heads: str  # "max" or "mean"
    label: str  # in the table, the figures and metrics.jsonl

    @property
    def key(self) -> str:  # in a layer of attention.json and in attention.csv: max_rank, avg_mass
        return f"{'max' if self.over_heads == 'max' else 'avg'}_{self.name}"


MEASURES = [  # table, files, figures, train.py --track_rank and stored() follow this list
    Measure("rank", fast_rank, "max", "MaxRank"),  # k_star, faster (paper, section 2)
    Measure("mass", m_star, "mean", "AvgMass"),  # paper, appendix C
    Measure("sink", sink, "mean", "sink"),
    Measure("sink_share", lambda A: (sink(A) > 0.3).float(), "mean", "sink > 0.3"),  # arXiv 2410.10781
]


def measures_at(taus: list[float]) -> list[Measure]:
    """MEASURES with the rank at the main tau, the first one, and MaxRank at each other tau."""
    at = [m._replace(function=partial(fast_rank, tau=taus[0])) if m.name == "rank" else m for m in MEASURES]
    return at + [Measure(f"rank_{t}", partial(fast_rank, tau=t), "max", f"MaxRank τ={t}") for t in taus[1:]]


def over_heads(values_HS: np.ndarray, how: str) -> tuple[float, float]:
    """A layer's number and standard error: the mean over sequences, then max or mean over heads.

    Rank(h, l) is the mean over sequences, MaxRank(l) the largest Rank(h, l): section 2.
    """
    winner = values_HS[values_HS.mean(1).argmax()]  # (S,) of the head with the largest mean
    return data.mean_and_error(winner if how == "max" else values_HS.mean(0))


def summarize(values: dict[int, dict[str, np.ndarray]], measures: list[Measure], groups: list) -> dict:
    """From the values {layer: {measure: (H, S)}} of a model: its layers, groups and heads."""
    rows, heads = [], {m.name: [v[m.name].mean(1).tolist() for v in values.values()] for m in measures}
    for layer, by_name in values.items():
        row = {"layer": layer}
        for m in measures:
            row[m.key], row[f"{m.key}_se"] = over_heads(by_name[m.name], m.over_heads)
        row["near_rank_one"] = float((by_name["rank"].mean(1) < 1.5).mean())  # 1.5 is ours
        row["strictly_lazy"] = row["max_rank"] < 1 + 1e-9  # MaxRank = 1, the paper's lazy layer
        row["lazy"] = row["max_rank"] < 2  # floor(MaxRank) = 1: ours, as the paper judges a group
        rows.append(row)
    ranks = {f"{a}:{b}": [row["max_rank"] for row in rows if a <= row["layer"] < b] for a, b in groups}
    averages = [{"layers": name, "avg_rank": float(np.mean(each))} for name, each in ranks.items() if each]
    share = float(np.mean([row["near_rank_one"] for row in rows]))
    return {"layers": rows, "groups": averages, "near_rank_one": share, "heads": heads}


def suggested_layers(result: dict, dropped: str) -> int:
    """Layers left without the "lazy" or "cheap" ones at the end. One without attention stays."""
    without = {row["layer"] for row in result["layers"] if row[dropped]}
    return max((layer + 1 for layer in range(result["n_layer"]) if layer not in without), default=1)


# ---- measuring


def random_windows(tokens: np.ndarray, T: int, N: int, seed: int, begin: list) -> torch.Tensor:
    """N random windows (N, T), each led by the tokens `begin`; no more than fit side by side."""
    n = T - len(begin)
    starts = np.random.RandomState(seed).choice(len(tokens) - n + 1, min(N, len(tokens) // n), replace=False)
    text = torch.from_numpy(tokens[starts[:, None] + np.arange(n)].astype(np.int64))
    return torch.cat([torch.tensor(begin, dtype=torch.long).expand(len(text), -1), text], 1)


def visit_attention(model: torch.nn.Module, idx: torch.Tensor, visit):
    """Call visit(layer, A (B, H, T, T)) for each layer with attention in turn, on idx (B, T)."""
    if hasattr(model, "visit_attention"):  # a decoder of another family
        return model.visit_attention(idx, visit)
    for layer, A in enumerate(model.attention_matrices(idx)):
        visit(layer, A)


def measure(model: torch.nn.Module, idx: torch.Tensor, measures: list[Measure], micro_batch: int) -> dict:
    """{layer: {measure: (H, S)}} of a model on sequences idx (S, T).

    Raises UserError, exit code 1, if a matrix is not what the measures are defined for.
    """
    found: dict[int, dict[str, list]] = {}

    def visit(layer: int, A: torch.Tensor):  # (B, H, T, T)
        distribution = A.min() >= 0 and (A.float().sum(-1) - 1).abs().max() <= 1e-3  # NaN: False
        if not distribution or A.triu(1).any():
            expected = "finite weights, entries >= 0, none above the diagonal, rows that sum to 1"
            raise UserError(f"layer {layer}: no causal attention matrix; expected {expected}", 1)
        A = A.float().cpu() if A.device.type == "mps" else A.float()  # MPS: no float64, no eigvalsh
        for m in measures:
            found.setdefault(layer, {}).setdefault(m.name, []).append(m.function(A).cpu().double().numpy().T)

    for batch in tqdm(idx.split(micro_batch), desc="attention", disable=None, leave=False):
        visit_attention(model, batch, visit)
    return {layer: {name: np.hstack(v) for name, v in found[layer].items()} for layer in sorted(found)}


def track(model: torch.nn.Module, val_tokens: np.ndarray, begin: list, sequences: int = 8) -> dict:
    """What train.py --track_rank logs: {label: [number of each layer]}, always on the same windows.

    Leaves the model's mode and the global random state unchanged.
    """
    T, training = min(AnalyzeConfig.seq_len, model.config.block_size), model.training
    idx = random_windows(val_tokens, T, sequences, 0, begin).to(next(model.parameters()).device)
    values = measure(model.eval(), idx, MEASURES, len(idx)).values()
    model.train(training)
    found = {m.label: [over_heads(by_name[m.name], m.over_heads)[0] for by_name in values] for m in MEASURES}
    return found | {"T": T, "tau": 0.9, "sequences": len(idx)}


def pictures(model: torch.nn.Module, idx: torch.Tensor, values: dict, heads: list) -> list[dict]:
    """The matrices (T, T) of heads (layer, head) on idx (1, T); default: least and largest Rank."""
    ranks = {(i, h): r for i, by_name in values.items() for h, r in enumerate(by_name["rank"].mean(1))}
    extremes = [min(ranks, key=ranks.get), max(ranks, key=ranks.get)]
    chosen, found = [tuple(head) for head in heads if tuple(head) in ranks] or extremes, {}

    def visit(layer: int, A: torch.Tensor):  # (1, H, T, T)
        found.update({(layer, h): A[0, h].float().cpu().numpy() for i, h in chosen if i == layer})

    visit_attention(model, idx, visit)
    return [{"layer": i, "head": h, "rank": ranks[i, h], "matrix": found[i, h]} for i, h in chosen]


# ---- the command


def identity(config: AnalyzeConfig) -> dict:
    """All that the numbers depend on. With this unchanged, an analysis is reused. UserError."""
    paths = [model_files.resolve(name) for name in (config.model, config.compare) if name]
    wanted = {"block_size": config.seq_len}  # another family can read longer texts than by default
    shapes = [pretrained.read_config(path, wanted) for path in paths]
    L, H = shapes[0].n_layer, shapes[0].n_head
    try:
        taus = sorted(map(float, config.tau.split(",")), key=lambda tau: (tau != 0.9, -tau))
        groups = [list(map(int, each.split(":"))) for each in config.groups.split(",") if each]
        heads = [list(map(int, each.split("."))) for each in config.heads.split(",") if each]
        least = min(config.seq_len - 1, config.sequences, config.micro_batch)
        fits = all(0 <= a < b <= L for a, b in groups) and all(0 <= i < L and 0 <= h < H for i, h in heads)
        if least < 1 or not fits or not all(0 < tau <= 0.999 for tau in taus):  # above, rounding decides
            raise ValueError
    except ValueError:
        expected = f"0 < tau <= 0.999, groups like 0:{L}, heads like {L - 1}.0, seq_len >= 2, others >= 1"
        keys = ("tau", "groups", "heads", "seq_len", "sequences", "micro_batch")
        found = ", ".join(f"{key} {getattr(config, key)!r}" for key in keys)
        raise UserError(f"found {found}; expected {expected}") from None
    return {
        "sha256": [model_files.hashes(path) for path in paths],
        "data_sha256": data.read_meta(config.data_dir)["sha256"]["val"],
        "T": min(config.seq_len, *(shape.block_size for shape in shapes)),
        "tau": taus, "ranges": groups, "drawn": heads,
        "wanted": config.sequences, "seed": config.seed,
        "cheap_below": config.cheap_below if config.ablate else None,  # None: no costs
        "measures": {m.key: m.label for m in measures_at(taus)},
    }


def out_dir(config: AnalyzeConfig) -> Path:
    model = Path(config.model).expanduser()
    return Path(config.out or (model if model.is_dir() else "out" / model) / "attention").expanduser()


def stored(config: AnalyzeConfig) -> dict | None:
    """The finished analysis of the same weights, text, settings and measures, if there is one."""
    try:
        result = storage.read_json(out_dir(config) / "attention.json")
    except UserError:  # absent or damaged
        return None
    return result if all(result.get(key) == value for key, value in identity(config).items()) else None


def analyze(config: AnalyzeConfig) -> dict:
    """Measure a model: table, attention.csv, attention.json (returned), figures. Raises UserError."""
    result, out, found = identity(config), out_dir(config), {}
    measures, meta = measures_at(result["tau"]), data.read_meta(config.data_dir)
    text = data.open_tokens(config.data_dir, "val", result["T"], meta["vocab_size"])
    begin = meta.get("begin", [])  # [bos] of a model that was trained with one
    idx = random_windows(text, result["T"], config.sequences, config.seed, begin)
    idx = idx.to(pick_device(config.device))
    models = {"model": config.model, "untrained": config.model, "compared": config.compare}
    for role, name in models.items():
        if not name:
            continue
        path, fresh = model_files.resolve(name), role == "untrained"
        pretrained.check_tokenizer(path, meta)
        torch.manual_seed(0)  # of the untrained one
        model = pretrained.load_model(path, fresh=fresh).to(idx.device)
        values, n = measure(model, idx, measures, config.micro_batch), model.config.n_layer
        groups = result["ranges"] or [(n * i // 3, n * (i + 1) // 3) for i in range(3)]
        run = path.parent if path.name.startswith("step-") else Path(name)
        about = {"name": role if fresh else run.name, "model": str(path), "n_layer": n}
        about |= {"sequences": len(idx)} | summarize(values, measures, groups)
        about["suggested_by_rank"] = suggested_layers(about, "lazy")
        if config.ablate and not fresh:
            import ablation  # imported where it is used

            ablation.add_costs(about, model, idx, config.micro_batch, config.cheap_below)
            about["suggested_by_cost"] = suggested_layers(about, "cheap")
        if role == "model":
            drawn = pictures(model, idx[:1], values, result["drawn"])
        found[role] = about
    result |= found["model"]
    result |= {role: found.get(role) for role in ("untrained", "compared")}
    print_table(result)
    from plumbing import figures  # imported where they are drawn

    out.mkdir(parents=True, exist_ok=True)
    rows = [{"model": each["name"]} | row for each in found.values() for row in each["layers"]]
    with open(out / "attention.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])  # the untrained model's costs stay empty
        table.writeheader()
        table.writerows(rows)
    storage.write_json(out / "attention.json", result)  # before the figures: all is in it
    figures.plot_attention(result, out / "attention.png")
    figures.plot_heads(drawn, result, out / "heads.png")
    return result


def print_table(result: dict):
    """A line for each layer, then lazy layers, groups and heads; then the compared model's."""
    for model in filter(None, (result, result["compared"])):
        conditions = f"T = {result['T']}, tau = {result['tau'][0]}, {model['sequences']} sequences"
        print(f"{model['model']}: {conditions}; ± is the standard error over sequences")
        labels = dict(result["measures"])
        if "ablation" in model:
            labels |= {"cost": "cost", "attention_cost": "attention's cost"}
        print("layer", *(f"{label:^17s}" for label in labels.values()), "near rank 1")
        for row in model["layers"]:
            cells = [f"{row[key]:8.3f} ± {row[f'{key}_se']:<6.3f}" for key in labels]
            lazy = "lazy, strictly" if row["strictly_lazy"] else "lazy" if row["lazy"] else ""
            print(f"{row['layer']:5d}", *cells, f"{row['near_rank_one']:11.0%} {lazy}".rstrip())
        lazy, strictly = (sum(row[k] for row in model["layers"]) for k in ("lazy", "strictly_lazy"))
        print(f"lazy layers: {lazy} by floor(MaxRank) = 1, {strictly} strictly (MaxRank = 1)")
        missing = model["n_layer"] - len(model["layers"])
        print(f"layers before the lazy tail: {model['suggested_by_rank']}; without attention: {missing}")
        ranks = {each["layers"]: each["avg_rank"] for each in model["groups"]}  # lazy: floor(AvgRank) = 1
        groups = [f"layers {name} {rank:.2f}{' (lazy)' * (rank < 2)}" for name, rank in ranks.items()]
        print("AvgRank:", ", ".join(groups))
        print(f"heads near rank one (mean rank below 1.5): {model['near_rank_one']:.0%} of the model")
        if "ablation" in model:
            print_costs(model, result["cheap_below"])


def print_costs(model: dict, cheap_below: float):
    """What --ablate adds below the table."""
    found = model["ablation"]
    cheap = [str(row["layer"]) for row in model["layers"] if row["cheap"]]
    print(f"loss of the whole model: {found['loss']:.4f} ± {found['loss_se']:.4f} nats per token")
    for name, (rho, p, n) in found["spearman"].items():
        print(f"Spearman correlation of {name}: {rho:+.2f} (p = {p:.4f}, n = {n})")
    print(f"layers that cost less than {cheap_below:g} nats: {', '.join(cheap) or 'none'}")
    print(f"k suggested by cost: {model['suggested_by_cost']}; by rank: {model['suggested_by_rank']}")


def main():
    analyze(configurator.load(AnalyzeConfig))


if __name__ == "__main__":
    configurator.run(main)
