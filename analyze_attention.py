"""How much do the attention matrices of each layer still say? Approximate rank and column mass by layer and head.

    python analyze_attention.py out/demo/reference --data_dir=data/demo
    python analyze_attention.py out/demo/reference --compare=out/demo/inherited-4 --data_dir=data/demo --out=out/both
    python analyze_attention.py some/llama --data_dir=data/demo --control=False   # any decoder of transformers
    python analyze_attention.py gpt2 --data_dir=data/mine --lazy_below=2     # data of the gpt2 tokenizer

A is the causal attention matrix of one layer, head and sequence: T x T, each row sums to 1. It is always of full
rank (its diagonal is positive), so only an approximate rank means anything; it depends on T and tau, which are
recorded. "Few columns hold the mass" is also what an attention sink looks like, so column 0 is reported apart.
An untrained model of the same shape is the control. What is measured, and how, is in attention.py.

Results: attention.json, attention.csv, attention.png (drawn from the JSON) and heads.png (two heads as examples).
Suffixes: H heads, S sequences, T positions.
"""

import csv
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

import configurator
import data
import storage
from attention import MEASURES, load_model, longest_sequence, measure, validation_tokens, visit_layers
from configurator import UserError
from figures import plot_attention, plot_heads
from machine import pick_device

LONGEST = 1024  # T unless another is asked for: GPT-2's, and enough for models that read far more


@dataclass
class AnalyzeConfig:
    """Measure the attention rank of every layer and head of a model on validation text."""

    model: tyro.conf.Positional[str]  # a checkpoint, a run directory or a name on the hub
    compare: str = ""  # another one to put beside it, such as what inherited from it; on the same validation split
    data_dir: str = "data/python"  # made by prepare_data.py, for a GPT-2 with its own tokenizer
    out: str = ""  # directory for the results; the default is MODEL/attention, for a hub name out/attention/MODEL
    seq_len: int = 0  # T; 0: as long as the models read, at most LONGEST
    sequences: int = 16  # validation windows, spread evenly
    tau: float = 0.90  # share of the energy that counts as all
    lazy_below: float = 2.0  # a layer is lazy if its largest head rank is below this, averaged over sequences
    average_first: bool = False  # measure the mean of all sequences' matrices, as the authors' notebook; all at once
    control: bool = True  # measure an untrained model of the same shape too
    micro_batch: int = 4  # sequences at a time unless average_first; only a matter of memory
    device: str = "auto"


# ----------------------------------------------------------------------------------------------------------
# Numbers


def summarize(values: dict[int, dict[str, np.ndarray]], lazy_below: float) -> list[dict]:
    """Per layer: mean and standard error over sequences of the largest and the mean over heads, and what follows."""
    rows = []
    for layer, by_measure in values.items():
        row = {"layer": layer}
        for name in MEASURES:
            by_head = by_measure[name]  # (H, S)
            for kind, by_sequence in (("max", by_head.max(0)), ("mean", by_head.mean(0))):
                row[f"{kind}_{name}"], row[f"{kind}_{name}_se"] = data.mean_and_error(by_sequence)
        share = (by_measure["rank"] == 1).mean(0)  # (S,)
        row["rank_one_share"], row["rank_one_share_se"] = data.mean_and_error(share)
        row["lazy"] = row["max_rank"] < lazy_below
        rows.append(row)
    return rows


def layers_before_lazy_tail(rows: list[dict]) -> int:
    """The number of layers that are left when the lazy layers at the end are dropped; at least 1."""
    return max((row["layer"] + 1 for row in rows if not row["lazy"]), default=1)


def two_heads(model: torch.nn.Module, idx: torch.Tensor, values: dict) -> list[tuple[dict, np.ndarray]]:
    """The heads of the smallest and the largest mean rank: what they are, and the mean of their matrices on idx.

    Among equals columns decide. "share" is the energy that the first 1, 2, ... directions hold, up to 99%.
    """
    means = {
        (by_measure["rank"][head].mean(), by_measure["columns"][head].mean(), layer, head)
        for layer, by_measure in values.items()
        for head in range(len(by_measure["rank"]))
    }
    chosen, found = {"most collapsed": min(means), "least collapsed": max(means)}, []

    def visit(layer: int, attention_BHTT: torch.Tensor):
        for title, (rank, _, of_layer, head) in chosen.items():
            if layer == of_layer:
                matrix = attention_BHTT[:, head].mean(0).double().cpu()  # (T, T)
                energy = torch.linalg.svdvals(matrix).square().cumsum(0)
                share = (energy / energy[-1]).numpy()
                share = share[: np.searchsorted(share, 0.99) + 1].round(6).tolist()
                entry = {"title": title, "layer": layer, "head": head, "mean_rank": float(rank), "share": share}
                found.append((entry, matrix.numpy()))

    visit_layers(model, idx, visit)
    return sorted(found, key=lambda pair: pair[0]["title"], reverse=True)  # the most collapsed first


def analyze(config: AnalyzeConfig) -> dict:
    """Measure a model as configured, write the results, return what attention.json holds. Raises UserError."""
    device = pick_device(config.device)
    paths = [storage.resolve(name) for name in (config.model, config.compare) if name]
    longest = min(longest_sequence(path) for path in paths)
    T = config.seq_len or min(longest, LONGEST)
    counts = config.sequences >= 1 and config.micro_batch >= 1 and config.lazy_below >= 0
    if not (2 <= T <= longest and 0 < config.tau <= 0.999 and counts):
        raise UserError(
            f"seq_len {T}, sequences {config.sequences}, micro_batch {config.micro_batch}, tau {config.tau}, "
            f"lazy_below {config.lazy_below}; expected 2 <= seq_len <= block_size {longest}, "
            "sequences >= 1, micro_batch >= 1, 0 < tau <= 0.999 (beyond, rounding decides), lazy_below >= 0"
        )
    meta = data.read_meta(config.data_dir)

    def windows(path: Path, model: torch.nn.Module) -> torch.Tensor:
        tokens = validation_tokens(path, model, config.data_dir, T)
        starts = data.val_starts(len(tokens), T)
        chosen = np.linspace(0, len(starts) - 1, min(config.sequences, len(starts))).astype(int)
        return data.windows(tokens, starts[chosen], T)[0].to(device)  # (S, T)

    values, heads, idx, S = {}, [], None, {}
    arms = [("model", paths[0], False), ("untrained", paths[0], True), ("compared", paths[-1], False)]
    wanted = {"model": True, "untrained": config.control, "compared": bool(config.compare)}
    for name, path, untrained in (arm for arm in arms if wanted[arm[0]]):
        model = load_model(path, untrained).to(device)
        idx = idx if untrained else windows(path, model)
        S[name] = len(idx)
        values[name] = measure(model, idx, config.tau, config.micro_batch, config.average_first)
        if name == "model":
            heads = two_heads(model, idx if config.average_first else idx[:1], values[name])
        del model  # before the next one is loaded
    layers = {name: summarize(by_layer, config.lazy_below) for name, by_layer in values.items()}

    def about(name: str, given: str, path: Path) -> dict:
        by_head = {key: [by_layer[key].mean(1).tolist() for by_layer in values[name].values()] for key in MEASURES}
        return {
            "name": Path(given).name, "model": str(path), "sha256": storage.TensorFiles(path).sha256(),
            "sequences": S[name],  # a short text has fewer windows with another tokenizer
            "layers_before_lazy_tail": layers_before_lazy_tail(layers[name]), "layers": layers[name],
            "heads": by_head,  # (L, H) each
        }  # fmt: skip

    result = about("model", config.model, paths[0]) | {
        "data": str(config.data_dir), "data_sha256": meta["splits"]["val"]["sha256"],
        "T": T, "tau": config.tau, "sequences_asked": config.sequences,
        "average_first": config.average_first, "lazy_below": config.lazy_below,
        "untrained": layers.get("untrained"), "examples": [entry for entry, _ in heads],
        "compared": about("compared", config.compare, paths[1]) if config.compare else None,
    }  # fmt: skip

    beside = Path(config.model) / "attention" if Path(config.model).is_dir() else Path("out/attention") / config.model
    out = Path(config.out or beside)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror}") from None
    write_csv(values, out / "attention.csv")
    plot_attention(result, out / "attention.png")
    plot_heads(result, [matrix for _, matrix in heads], out / "heads.png")
    storage.replace_json(out / "attention.json", result)  # last: its presence says that all of it is done
    return result


# ----------------------------------------------------------------------------------------------------------
# Tables


def write_csv(values: dict[str, dict[int, dict[str, np.ndarray]]], path: Path):
    """A line for each head of each model: means over the sequences and their standard errors."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["model", "layer", "head", *itertools.chain(*((m, f"{m}_se") for m in MEASURES)), "rank_one_share"]
        )
        for name, by_layer in values.items():
            for layer, by_measure in by_layer.items():
                for head, ranks in enumerate(by_measure["rank"]):
                    numbers = itertools.chain(*(data.mean_and_error(by_measure[m][head]) for m in MEASURES))
                    writer.writerow([name, layer, head, *numbers, (ranks == 1).mean()])


def print_table(result: dict):
    """A line for each layer; the lazy ones are marked. After it the compared model's, if there is one."""
    for model in filter(None, (result, result.get("compared"))):
        has_error = model["sequences"] > 1 and not result["average_first"]
        what = "mean ± s.e. over sequences" if has_error else "of one matrix a head, so without s.e."
        print(f"{model['model']}: T {result['T']}, tau {result['tau']}, {model['sequences']} sequences; {what}")
        print("layer   largest head rank   mean head rank   largest columns   sink   heads of rank 1")
        for row in model["layers"]:
            error = f"± {row['max_rank_se']:5.2f}" if has_error else ""
            print(
                f"{row['layer']:5d}   {row['max_rank']:9.2f} {error:7s}   {row['mean_rank']:14.2f}   "
                f"{row['max_columns']:15.2f}   {row['mean_sink']:4.2f}   {row['rank_one_share']:15.0%}"
                + ("   lazy" if row["lazy"] else "")
            )
        lazy = sum(row["lazy"] for row in model["layers"])
        print(
            f"{lazy} of {len(model['layers'])} layers are lazy (largest head rank below {result['lazy_below']}); "
            f"k that this suggests, the layers before the lazy tail: {model['layers_before_lazy_tail']}"
        )


def main():
    print_table(analyze(configurator.load(AnalyzeConfig)))


if __name__ == "__main__":
    configurator.run(main)
