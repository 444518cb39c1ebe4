"""What it costs to leave a part of a trained model out: a layer, a layer's attention, or one head.

    python analyze_attention.py out/demo/reference --data_dir=data/demo --ablate
    python analyze_attention.py HuggingFaceTB/SmolLM2-135M --data_dir=data/smol --ablate --sequences=20

A cost is the loss without the part minus the loss of the whole model, in nats per token, on the windows of
the attention analysis. One part is left out at a time, and nothing is trained afterwards. The weights stay
as they are: hooks change what a module reads or returns. So GPT and the decoders of transformers need the
same code. Letters: S windows, B of them at a time, T tokens, H heads of a layer, hs head size.
"""

import contextlib
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import data
from plumbing.configurator import UserError

PROJECTIONS = ("c_proj", "o_proj", "out_proj", "dense", "Wo")  # the last matrix of attention, by family
PERMUTATIONS = 9999  # behind a p-value


def parts(model: torch.nn.Module, with_attention) -> tuple[list, dict]:
    """The blocks of all layers, and {layer: output projection of its attention}. Raises UserError."""
    n = model.config.n_layer
    lists = [list(m) for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n]
    blocks, found = lists[0] if lists else [], {}  # the outermost list comes first
    for layer, block in enumerate(blocks):
        attention = [m for m in block.modules() if "Attention" in type(m).__name__]
        inside = [each for m in attention for each in m.named_modules()]
        found[layer] = next((m for name, m in inside if name.split(".")[-1] in PROJECTIONS), None)
    if missing := [layer for layer in with_attention if found.get(layer) is None]:
        expected = f"expected a list of {n} blocks and a matrix named one of {', '.join(PROJECTIONS)}"
        raise UserError(f"no part to leave out in layers {missing}; {expected}; run without --ablate", 1)
    return blocks, found


# ---- hooks, with the arguments that torch gives them


def pass_by(block, inputs, options, output):
    """A block returns what it read: the residual stream passes by it."""
    stream = (*inputs, *options.values())[0]  # the first argument, by position or by name
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


def no_attention(projection, inputs, output):
    """Attention adds nothing to the residual stream. The MLP stays."""
    return torch.zeros_like(output)


def silence(head: int, H: int, projection, inputs):
    """The output projection reads zeros of one head. Its input (B, T, H·hs) holds the heads side by side."""
    heads = inputs[0].unflatten(-1, (H, -1))  # (B, T, H, hs)
    return heads.index_fill(2, torch.tensor([head], device=heads.device), 0).flatten(2)


def note_norms(notes: list, H: int, projection, inputs, output):
    """Note the mean norm of what each head adds to the output, and that of its first value: (B, 2, H)."""
    silenced = (projection.forward(silence(head, H, projection, inputs)) for head in range(H))
    added = torch.stack([(output - each).norm(dim=-1).mean(-1) for each in silenced], -1)  # (B, H)
    # position 0 attends only to itself, so what a head returns there is its value, or its group's
    value = inputs[0][:, 0].unflatten(-1, (H, -1)).norm(dim=-1)  # (B, H)
    notes.append(torch.stack([added, value], 1).cpu().double())


# ---- measuring


@torch.no_grad()
def losses(model: torch.nn.Module, idx: torch.Tensor, micro_batch: int) -> np.ndarray:
    """The loss of each window (S, T), the mean over its T - 1 next tokens: (S,), nats per token."""
    each = [model(x[:, :-1], x[:, 1:], "none").cpu().double().mean(1) for x in idx.split(micro_batch)]
    return torch.cat(each).numpy()


def add_costs(result: dict, model: torch.nn.Module, idx: torch.Tensor, micro_batch: int, cheap_below: float):
    """Add the costs on idx (S, T) to a model's analysis: to its layers, heads and "ablation". UserError.

    A layer without attention has no row in the analysis, so its cost is in "ablation" alone.
    """
    heads, notes = result["heads"], {row["layer"]: [] for row in result["layers"]}
    counts = dict(zip(notes, map(len, heads["rank"]), strict=True))  # H of each layer
    blocks, projections = parts(model, counts)
    with contextlib.ExitStack() as hooks:  # removes them at its end
        for layer, H in counts.items():
            note = partial(note_norms, notes[layer], H)
            hooks.enter_context(projections[layer].register_forward_hook(note))
        whole = losses(model, idx, micro_batch)
    passes = len(blocks) + len(counts) + sum(counts.values())
    bar = tqdm(total=passes, desc="ablation", disable=None, leave=False)

    def cost(hook) -> tuple[float, float]:
        with hook:
            bar.update()
            return data.mean_and_error(losses(model, idx, micro_batch) - whole)  # paired by window

    layers = [cost(block.register_forward_hook(pass_by, with_kwargs=True)) for block in blocks]
    names = ("cost", "cost_se", "output_norm", "sink_value_norm")
    heads |= {name: [] for name in names}
    for row, (layer, H) in zip(result["layers"], counts.items(), strict=True):
        projection = projections[layer]
        row["cost"], row["cost_se"] = layers[layer]
        row["attention_cost"], row["attention_cost_se"] = cost(projection.register_forward_hook(no_attention))
        silent = [partial(silence, head, H) for head in range(H)]
        each = np.array([cost(projection.register_forward_pre_hook(hook)) for hook in silent])  # (H, 2)
        norms = torch.cat(notes[layer]).mean(0).numpy()  # (2, H)
        for name, values in zip(names, [*each.T, *norms], strict=True):
            heads[name].append(values.tolist())
    bar.close()
    result["ablation"] = summarize(result, [mean for mean, _ in layers], whole, cheap_below)


# ---- does rank tell the cost?


def ranks(values) -> np.ndarray:
    """The place of each value (n,) in their order, from 1. Equal values share the mean of their places."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[which]


def spearman(x, y) -> tuple[float, float]:
    """Spearman's rho of x and y (n,), and its two-sided p-value by random permutations, seed 0.

    (0, 1) where all values of x or of y are equal, since rho is not defined there.
    """
    a, b = (ranks(values) - (len(values) + 1) / 2 for values in (x, y))
    if not a.any() or not b.any():
        return 0.0, 1.0
    random = np.random.RandomState(0)
    as_large = sum(abs(random.permutation(a) @ b) > abs(a @ b) - 1e-9 for _ in range(PERMUTATIONS))
    return float(a @ b / np.sqrt((a @ a) * (b @ b))), float((1 + as_large) / (1 + PERMUTATIONS))


def summarize(result: dict, costs: list[float], whole: np.ndarray, cheap_below: float) -> dict:
    """The loss of the whole model, the cheap layers, k by cost, and whether rank goes with cost."""
    kept = [layer for layer, cost in enumerate(costs) if cost >= cheap_below]
    found = dict(zip(("loss", "loss_se"), data.mean_and_error(whole), strict=True))
    found |= {"layer_costs": costs, "cheap_layers": sorted(set(range(len(costs))) - set(kept))}
    found["suggested_by_cost"] = kept[-1] + 1 if kept else 1  # without the cheap layers at the end
    rows, heads = result["layers"], result["heads"]
    rank = [row["max_rank"] for row in rows]
    pairs = {
        "MaxRank with the layer's cost": (rank, [row["cost"] for row in rows]),
        "MaxRank with its attention's cost": (rank, [row["attention_cost"] for row in rows]),
        "Rank with the head's cost": (np.concatenate(heads["rank"]), np.concatenate(heads["cost"])),
    }
    return found | {"spearman": {name: [*spearman(*pair), len(pair[0])] for name, pair in pairs.items()}}


def print_summary(model: dict, cheap_below: float):
    """What follows the table of a model that has costs."""
    found = model["ablation"]
    cheap = ", ".join(map(str, found["cheap_layers"])) or "none"
    print(f"loss of the whole model: {found['loss']:.4f} ± {found['loss_se']:.4f} nats per token")
    print(f"Spearman correlation (p-value by {PERMUTATIONS} permutations):")
    for name, (rho, p, n) in found["spearman"].items():
        print(f"  {name}: {rho:+.2f} (p = {p:.4f}, n = {n})")
    print(f"layers that cost less than {cheap_below:g} nats: {cheap}")
    print(f"k suggested by cost: {found['suggested_by_cost']}; by rank: {model['suggested_by_rank']}")
