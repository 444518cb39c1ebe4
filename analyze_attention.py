"""How much do the attention matrices of each layer still say? Approximate rank and column mass by layer and head.

    python analyze_attention.py out/demo/reference --data_dir=data/demo
    python analyze_attention.py out/demo/reference --data_dir=data/demo --out=out/rank --seq_len=64 --sequences=32
    python analyze_attention.py gpt2 --data_dir=data/mine --lazy_below=2     # data of the gpt2 tokenizer

A is the causal attention matrix of one layer, head and sequence: T x T, each row sums to 1. It is always of full
rank (its diagonal is positive), so only an approximate rank means anything; it depends on T and tau, which are
recorded. "Few columns hold the mass" is also what an attention sink looks like, so column 0 is reported apart.
An untrained model of the same shape is the control. Results: attention.json, attention.csv and attention.png.

Suffixes: B sequences, H heads, T positions, L layers.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

import checkpoint
import configurator
import data
import storage
from configurator import UserError
from machine import pick_device
from model import GPT

MEASURES = ("rank", "columns", "sink")


@dataclass
class AnalyzeConfig:
    """Measure the attention rank of every layer and head of a GPT-2 checkpoint on validation text."""

    model: tyro.conf.Positional[str]  # a checkpoint, a run directory or a name on the hub
    data_dir: str = "data/python"  # made by prepare_data.py with the model's tokenizer
    out: str = ""  # directory for the results; the default is MODEL/attention, for a hub name out/attention/MODEL
    seq_len: int = 0  # T; 0: the model's block_size
    sequences: int = 16  # validation windows, spread evenly
    tau: float = 0.90  # share of the energy that counts as all
    lazy_below: float = 2.0  # a layer is lazy if its largest head rank is below this, averaged over sequences
    control: bool = True  # measure an untrained model of the same shape too
    micro_batch: int = 4  # sequences at a time; only a matter of memory
    device: str = "auto"


# ----------------------------------------------------------------------------------------------------------
# The measures: pure functions of attention matrices


def approximate_rank(attention_BHTT: torch.Tensor, tau: float = 0.90) -> torch.Tensor:
    """k*(tau) (B, H): the least k with sum of the k largest sigma² >= tau · sum of all sigma²; from 1 to T.

    One direction (rank one) gives 1, the identity ceil(tau·T). sigma² are the eigenvalues of A·Aᵀ, which cost half
    of a singular value decomposition. The values have to be finite.
    """
    attention_BHTT = attention_BHTT.to(torch.promote_types(attention_BHTT.dtype, torch.float32))  # no half precision
    gram_BHTT = attention_BHTT @ attention_BHTT.mT
    if gram_BHTT.device.type == "mps":  # has no eigvalsh
        gram_BHTT = gram_BHTT.cpu()
    return least_count(torch.linalg.eigvalsh(gram_BHTT).flip(-1), tau)  # largest first


def column_count(attention_BHTT: torch.Tensor, tau: float = 0.90) -> torch.Tensor:
    """c*(tau) (B, H): the fewest columns that hold tau of the squared mass ‖A‖²; from 1 to T, never below k*.

    The paper plots "columns with 90% total mass" without a formula. The squared mass is our reading of it: the
    best c columns are a rank-c approximation, so it bounds the approximate rank from above.
    """
    mass_BHT = attention_BHTT.to(torch.promote_types(attention_BHTT.dtype, torch.float32)).square().sum(-2)
    return least_count(mass_BHT.sort(-1, descending=True).values, tau)


def least_count(energy: torch.Tensor, tau: float) -> torch.Tensor:
    """How many leading entries (..., T), sorted from the largest, reach tau of their sum, to float32's rounding."""
    cumulative = energy.cpu().double().clamp(min=0).cumsum(-1)
    enough = (1 - 1e-6) * tau * cumulative[..., -1:]
    return (cumulative < enough).sum(-1) + 1


def sink(attention_BHTT: torch.Tensor) -> torch.Tensor:
    """(B, H): the mean attention that column 0 receives; from 0 to 1."""
    return attention_BHTT[..., 0].mean(-1)


# ----------------------------------------------------------------------------------------------------------
# One model


def measure(model: GPT, idx: torch.Tensor, tau: float, micro_batch: int) -> dict[str, np.ndarray]:
    """The measures of a model on sequences idx (S, T): each an array (L, H, S). Holds one layer at a time.

    Raises UserError, exit code 1, naming layer and heads whose attention is not finite.
    """
    L, H, S = model.config.n_layer, model.config.n_head, len(idx)
    values = {name: np.zeros((L, H, S)) for name in MEASURES}
    progress = tqdm(total=L * math.ceil(S / micro_batch), desc="attention", unit="layer", disable=None)
    for begin in range(0, S, micro_batch):
        batch = idx[begin : begin + micro_batch]
        for layer, attention_BHTT in enumerate(model.attention_matrices(batch)):
            heads = (~attention_BHTT.isfinite()).any(-1).any(-1).any(0).nonzero().flatten().tolist()
            if heads:
                raise UserError(f"layer {layer}, heads {heads}: attention is not finite", exit_code=1)
            found = {
                "rank": approximate_rank(attention_BHTT, tau),
                "columns": column_count(attention_BHTT, tau),
                "sink": sink(attention_BHTT),
            }
            for name, value_BH in found.items():
                values[name][layer, :, begin : begin + len(batch)] = value_BH.T.cpu().numpy()
            progress.update()
    progress.close()
    return values


def summarize(values: dict[str, np.ndarray], lazy_below: float) -> list[dict]:
    """Per layer: mean and standard error over sequences of the largest and the mean over heads, and what follows."""
    rows = []
    for layer in range(len(values["rank"])):
        row = {"layer": layer}
        for name in MEASURES:
            by_head = values[name][layer]  # (H, S)
            for kind, by_sequence in (("max", by_head.max(0)), ("mean", by_head.mean(0))):
                row[f"{kind}_{name}"], row[f"{kind}_{name}_se"] = data.mean_and_error(by_sequence)
        row["rank_one_share"] = float((values["rank"][layer] == 1).mean())
        row["lazy"] = row["max_rank"] < lazy_below
        rows.append(row)
    return rows


def layers_before_lazy_tail(rows: list[dict]) -> int:
    """The number of layers that are left when the lazy layers at the end are dropped; at least 1."""
    return max((row["layer"] + 1 for row in rows if not row["lazy"]), default=1)


def analyze(config: AnalyzeConfig) -> dict:
    """Measure a checkpoint as configured, write the results, return what attention.json holds. Raises UserError."""
    path, device = storage.resolve(config.model), pick_device(config.device)
    model = checkpoint.load_model(path).to(device)
    T = config.seq_len or model.config.block_size
    counts = config.sequences >= 1 and config.micro_batch >= 1 and config.lazy_below >= 0
    if not (2 <= T <= model.config.block_size and 0 < config.tau <= 1 and counts):
        raise UserError(
            f"seq_len {T}, sequences {config.sequences}, micro_batch {config.micro_batch}, tau {config.tau}, "
            f"lazy_below {config.lazy_below}; expected 2 <= seq_len <= block_size {model.config.block_size}, "
            "sequences >= 1, micro_batch >= 1, 0 < tau <= 1, lazy_below >= 0"
        )
    meta = data.read_meta(config.data_dir)
    checkpoint.check_tokenizer(path, meta)
    tokens = data.open_tokens(config.data_dir, "val", T, model.config.vocab_size)
    starts = data.val_starts(len(tokens), T)
    S = min(config.sequences, len(starts))
    idx, _ = data.windows(tokens, starts[np.linspace(0, len(starts) - 1, S).astype(int)], T)  # (S, T)
    idx = idx.to(device)

    values = {"model": measure(model, idx, config.tau, config.micro_batch)}
    if config.control:
        torch.manual_seed(0)
        values["untrained"] = measure(GPT(model.config).eval().to(device), idx, config.tau, config.micro_batch)
    layers = {name: summarize(arrays, config.lazy_below) for name, arrays in values.items()}
    result = {
        "model": str(path), "sha256": storage.TensorFiles(path).sha256(), "data": str(config.data_dir),
        "data_sha256": meta["splits"]["val"]["sha256"],
        "T": T, "tau": config.tau, "sequences": S, "sequences_asked": config.sequences,
        "lazy_below": config.lazy_below, "layers_before_lazy_tail": layers_before_lazy_tail(layers["model"]),
        "layers": layers["model"], "untrained": layers.get("untrained"),
        "heads": {name: value.mean(2).tolist() for name, value in values["model"].items()},  # (L, H)
    }  # fmt: skip

    beside = Path(config.model) / "attention" if Path(config.model).is_dir() else Path("out/attention") / config.model
    out = Path(config.out or beside)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror}") from None
    with open(out / "attention.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "layer", "head", *MEASURES, "rank_one_share"])
        for name, arrays in values.items():
            for layer, head in np.ndindex(arrays["rank"].shape[:2]):
                means = [arrays[measure_name][layer, head].mean() for measure_name in MEASURES]
                writer.writerow([name, layer, head, *means, (arrays["rank"][layer, head] == 1).mean()])
    plot(result, out / "attention.png")
    storage.replace_json(out / "attention.json", result)  # last: its presence says that all of it is done
    return result


def print_table(result: dict):
    """A line for each layer; the lazy ones are marked."""
    print(f"{result['model']}: T {result['T']}, tau {result['tau']}, {result['sequences']} sequences; mean ± s.e.")
    print("layer   largest head rank   mean head rank   largest columns   sink   heads of rank 1")
    for row in result["layers"]:
        print(
            f"{row['layer']:5d}   {row['max_rank']:9.2f} ± {row['max_rank_se']:5.2f}   {row['mean_rank']:14.2f}   "
            f"{row['max_columns']:15.2f}   {row['mean_sink']:4.2f}   {row['rank_one_share']:15.0%}"
            + ("   lazy" if row["lazy"] else "")
        )
    lazy = sum(row["lazy"] for row in result["layers"])
    print(
        f"{lazy} of {len(result['layers'])} layers are lazy (largest head rank below {result['lazy_below']}); "
        f"before the lazy tail: {result['layers_before_lazy_tail']} layers"
    )


def plot(result: dict, path: Path):
    """Rank and columns by layer, with the untrained control, and the map of every head's rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    layers = [row["layer"] for row in result["layers"]]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axis, name, label in ((axes[0], "max_rank", "rank k*"), (axes[1], "max_columns", "columns c*")):
        for key, style, color, title in (
            ("layers", "o-", "#0072B2", "trained"),
            ("untrained", "s--", "#D55E00", "untrained"),
        ):
            if result[key]:
                mean, error = (np.array([row[name + end] for row in result[key]]) for end in ("", "_se"))
                axis.plot(layers, mean, style, color=color, label=title)
                axis.fill_between(layers, mean - error, mean + error, color=color, alpha=0.25, linewidth=0)
        axis.set(xlabel="layer", ylabel=f"{label}, largest of the heads", ylim=(0, None))
        axis.legend(frameon=False)
    image = axes[2].imshow(np.array(result["heads"]["rank"]).T, aspect="auto", cmap="viridis", vmin=1)
    axes[2].set(xlabel="layer", ylabel="head", title="mean rank of each head")
    axes[2].yaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes[2])
    figure.suptitle(f"T = {result['T']}, τ = {result['tau']}, n = {result['sequences']} sequences; bands: ± 1 s.e.")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    print_table(analyze(configurator.load(AnalyzeConfig)))


if __name__ == "__main__":
    configurator.run(main)
