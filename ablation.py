"""What it costs to leave a part of a trained model out: a layer, a layer's attention, or one head.

    python analyze_attention.py out/demo/reference --data_dir=data/demo --ablate

A cost is the loss without the part minus the loss of the whole model, in nats per token, on the
windows of the attention analysis. Hooks change what a module reads or returns; the weights stay as
they are. Letters: S windows, B of them at a time, T tokens, H heads of a layer, hs head size.
"""

from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import data
from plumbing.configurator import UserError

PROJECTIONS = (".c_proj", ".o_proj", ".out_proj", ".dense", ".Wo")  # attention's last matrix
PERMUTATIONS = 9999  # behind a p-value


def parts(model: torch.nn.Module, layers: list[int]) -> tuple[list, dict]:
    """The blocks of all layers, and {layer: its attention's output projection}. UserError."""
    n = model.config.n_layer
    lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n)
    blocks, projections = next(lists, []), {}  # the outermost list comes first
    for layer, block in enumerate(blocks):
        for name, module in block.named_modules():
            if "att" in name and name.endswith(PROJECTIONS):
                projections[layer] = module
    if missing := [layer for layer in layers if layer not in projections]:
        expected = f"expected a list of {n} blocks and a matrix named {', '.join(PROJECTIONS)}"
        raise UserError(f"nothing to leave out in layers {missing}; {expected}", 1)
    return blocks, projections


# ---- hooks, with the arguments that torch gives them


def pass_by(block, inputs, options, output):
    """A block returns what it read: the residual stream passes by it."""
    stream = (*inputs, *options.values())[0]  # the first argument, by position or by name
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


def silence(head: int, H: int, projection, inputs):
    """The output projection reads zeros of one head. Its input: (B, T, H·hs)."""
    heads = inputs[0].unflatten(-1, (H, -1))  # (B, T, H, hs)
    return heads.index_fill(2, torch.tensor([head], device=heads.device), 0).flatten(2)


def no_attention(notes: list, H: int, projection, inputs, output):
    """Attention adds nothing to the residual stream. The MLP stays.

    Notes the mean norm of what each head would add, and that of its first value: (B, 2, H).
    """
    silenced = (projection.forward(silence(head, H, projection, inputs)) for head in range(H))
    added = [(output - each).norm(dim=-1).mean(-1) for each in silenced]  # of each head (B,)
    # position 0 attends only to itself, so what a head returns there is its value
    value = inputs[0][:, 0].unflatten(-1, (H, -1)).norm(dim=-1)  # (B, H)
    notes.append(torch.stack([torch.stack(added, -1), value], 1).cpu().double())
    return torch.zeros_like(output)


# ---- measuring


@torch.no_grad()
def losses(model: torch.nn.Module, idx: torch.Tensor, micro_batch: int) -> np.ndarray:
    """The loss of each window (S, T), the mean over its next tokens: (S,), nats per token."""
    batches = idx.split(micro_batch)
    found = [model(x[:, :-1], x[:, 1:], "none").cpu().double().mean(1) for x in batches]
    return torch.cat(found).numpy()


def add_costs(result: dict, model, idx: torch.Tensor, micro_batch: int, cheap_below: float):
    """Add the costs on idx (S, T) to a model's analysis: to its layers, heads and "ablation"."""
    rows, heads = result["layers"], result["heads"]
    blocks, projections = parts(model, [row["layer"] for row in rows])
    whole = losses(model, idx, micro_batch)

    def cost(hook) -> tuple[float, float]:
        with hook:
            return data.mean_and_error(losses(model, idx, micro_batch) - whole)  # paired by window

    names = ("cost", "cost_se", "output_norm", "sink_value_norm")
    heads |= {name: [] for name in names}
    counts = [len(of_heads) for of_heads in heads["rank"]]
    bar = tqdm(rows, desc="ablation", disable=None, leave=False)
    for row, H in zip(bar, counts, strict=True):
        block, projection, notes = blocks[row["layer"]], projections[row["layer"]], []
        found = {"cost": cost(block.register_forward_hook(pass_by, with_kwargs=True))}
        hook = projection.register_forward_hook(partial(no_attention, notes, H))
        found["attention_cost"] = cost(hook)
        for name, (mean, error) in found.items():
            row |= {name: mean, f"{name}_se": error}
        row["cheap"] = row["cost"] < cheap_below
        hooks = [partial(silence, head, H) for head in range(H)]
        each = [cost(projection.register_forward_pre_hook(hook)) for hook in hooks]  # (H, 2)
        norms = torch.cat(notes).mean(0).numpy()  # (2, H)
        for name, values in zip(names, [*np.transpose(each), *norms], strict=True):
            heads[name].append(values.tolist())
    loss, error = data.mean_and_error(whole)
    result["ablation"] = {"loss": loss, "loss_se": error, "spearman": correlations(rows, heads)}


# ---- does rank tell the cost?


def places(values) -> np.ndarray:
    """The place of each value (n,) in their order, from 1. Equal values share the mean."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[which]


def spearman(x, y) -> tuple[float, float]:
    """Spearman's rho of x and y (n,), and its two-sided p-value by random permutations, seed 0.

    (0, 1) where all values of x or of y are equal, since rho is not defined there.
    """
    a, b = (places(values) - (len(values) + 1) / 2 for values in (x, y))
    if not a.any() or not b.any():
        return 0.0, 1.0
    random = np.random.RandomState(0)
    as_large = sum(abs(random.permutation(a) @ b) > abs(a @ b) - 1e-9 for _ in range(PERMUTATIONS))
    return float(a @ b / np.sqrt((a @ a) * (b @ b))), float((1 + as_large) / (1 + PERMUTATIONS))


def correlations(rows: list[dict], heads: dict) -> dict[str, list]:
    """Whether rank goes with cost: name -> rho, p-value, number of layers or heads."""
    rank = [row["max_rank"] for row in rows]
    pairs = {
        "MaxRank with the layer's cost": (rank, [row["cost"] for row in rows]),
        "MaxRank with its attention's cost": (rank, [row["attention_cost"] for row in rows]),
        "Rank with the head's cost": (np.concatenate(heads["rank"]), np.concatenate(heads["cost"])),
    }
    return {name: [*spearman(*pair), len(pair[0])] for name, pair in pairs.items()}
