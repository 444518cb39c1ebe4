"""Attention matrices: where they come from, one layer at a time, and what is measured of each.

    python -c "import torch, attention; print(attention.approximate_rank(torch.eye(8)[None, None]))"    # 8 = ⌈0.9·8⌉
    python -m pytest tests/test_attention.py    # equal to a plain singular value decomposition, matrix by matrix
    python tests/attention_speed.py             # how much faster than that, and exact on 2,000 matrices

A is the causal attention matrix of one layer, head and sequence: T x T, no entry below 0, each row sums to 1.
σ are its singular values, so σ² are the eigenvalues λ of its Gram matrix G = AᵀA.

Suffixes: B sequences, H heads, T positions, N = B·H matrices.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import data
import storage
from configurator import UserError
from model import GPT

MEASURES = ("rank", "columns", "sink")
WIDTHS = (8, 32)  # of the subspaces that may prove a rank
TIE = 1e-6  # a share that falls short of tau by less, relative to it, is taken for tau: float32 cannot tell


# ----------------------------------------------------------------------------------------------------------
# The measures: pure functions of attention matrices


def approximate_rank(attention_BHTT: torch.Tensor, tau: float = 0.90) -> torch.Tensor:
    """k*(tau) (B, H): the least k with sum of the k largest sigma² >= tau · sum of all sigma²; from 1 to T.

    One direction (rank one) gives 1, the identity ceil(tau·T). The answer is that of the whole spectrum, but few
    heads need it. A column that holds tau of the squared mass by itself proves rank one: λ_1 >= G_jj. Where the rank
    is low, a small subspace proves it (proven_rank). The values have to be finite. In float32 at least.
    """
    A = attention_BHTT.flatten(0, 1)  # (N, T, T)
    A = A.to(torch.promote_types(A.dtype, torch.float32))
    if A.device.type == "mps":  # has neither eigvalsh nor float64
        A = A.cpu()
    mass = A.square().sum(-2).double()  # of each column (N, T)
    rank = (mass.amax(-1) > tau * (1 + rounding(A)) * mass.sum(-1)).long()  # (N,); 0: not known yet
    unknown = rank == 0
    if unknown.any():
        rank[unknown] = rank_from_gram(gram_matrices(pick(A, unknown)), tau)
    return rank.unflatten(0, attention_BHTT.shape[:2])


def rank_from_gram(gram: torch.Tensor, tau: float) -> torch.Tensor:
    """k* (N,) of Gram matrices (N, T, T): proven by a subspace where that is promising, else from the spectrum.

    What is promising is seen beforehand: S_k = λ_1 + ... + λ_k <= sqrt(k)·‖G‖ by Cauchy and Schwarz, so
    k* >= (tau · trace G / ‖G‖)². It tends to be two to four times that, and a subspace has to be wider than k*.
    """
    trace = gram.diagonal(dim1=-2, dim2=-1).double().sum(-1)  # (N,)
    norm = torch.linalg.vector_norm(gram, dim=-1).double().square().sum(-1).sqrt()  # ‖G‖, Frobenius (N,)
    at_least = (tau * trace / norm).square()
    rank = torch.zeros_like(trace, dtype=torch.long)  # 0: not known yet
    for width in (width for width in WIDTHS if 4 * width <= gram.shape[-1]):
        promising = (rank == 0) & (4 * at_least <= width)
        if promising.any():
            rank[promising] = proven_rank(pick(gram, promising), trace[promising], norm[promising], tau, width)
    unknown = rank == 0
    if unknown.any():
        rank[unknown] = least_count(torch.linalg.eigvalsh(pick(gram, unknown)).flip(-1), tau)  # largest first
    return rank


def pick(matrices: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """The matrices (N, T, T) that are True in which (N,); no copy of them if these are all."""
    return matrices if which.all() else matrices[which]


def rounding(matrices: torch.Tensor) -> float:
    """The most that a dot product of T numbers may be off by rounding, relative to the sum of its terms' sizes.

    In true float32: nothing here lets a GPU multiply in TF32 (torch.set_float32_matmul_precision), which keeps 10 bits.
    """
    return matrices.shape[-1] * torch.finfo(matrices.dtype).eps / 2


def gram_matrices(A: torch.Tensor) -> torch.Tensor:
    """AᵀA of matrices (N, T, T); for causal ones, whose rows end at the diagonal, in less than half of the products."""
    T, gram = A.shape[-1], torch.zeros_like(A)
    step = max(16, T // 8)
    for end in range(step, T + step, step):
        rows, future = A[:, end - step : end, :end], A[:, end - step : end, end:]
        if future.any():
            return A.mT @ A
        gram[:, :end, :end].baddbmm_(rows.mT, rows)
    return gram


def proven_rank(gram: torch.Tensor, trace: torch.Tensor, norm: torch.Tensor, tau: float, width: int) -> torch.Tensor:
    """k* of Gram matrices (N, T, T) as far as a subspace of `width` directions proves it, else 0: (N,).

    The Ritz values θ_1 >= θ_2 >= ... are the eigenvalues of QᵀGQ for an orthonormal Q (T, width); two products with
    G turn random directions towards the leading eigenvectors. θ_i <= λ_i (Cauchy's interlacing: Parlett, The
    Symmetric Eigenvalue Problem, 10.1), so with S_k = λ_1 + ... + λ_k:

        from below   S_k >= θ_1 + ... + θ_k
        from above   S_k <= θ_1 + ... + θ_k + excess, where the excess is at most either of
                         trace G - Σ θ_i              since all λ together are the trace,
                         (‖G‖² - Σ θ_i²) / (2 θ_k)    since ‖G‖² = Σ λ_i² >= Σ (θ_i² + 2 θ_i (λ_i - θ_i))
                                                      >= Σ θ_i² + 2 θ_k Σ_{i<=k} (λ_i - θ_i).

    If S_k >= tau · trace and S_(k-1) < tau · trace, k* is k. How Q began decides how many heads stay in doubt, never
    the answer. Slack is left for the rounding of float32 products: not a proof, but seven times what was ever seen.
    """
    slack = rounding(gram) * trace[:, None]
    start = torch.randn(gram.shape[-1], width, generator=torch.Generator().manual_seed(0)).to(gram)
    Q = torch.linalg.qr(gram @ (gram @ start)).Q  # (N, T, width)
    ritz = torch.linalg.eigvalsh((Q.mT @ (gram @ Q)).double()).flip(-1).clamp(min=0)  # (N, width), largest first
    below = ritz.cumsum(-1)
    in_squares = norm.square() - ritz.square().sum(-1) + 2 * slack[:, 0] * ritz[:, 0]
    above = below + torch.minimum(trace[:, None] - below[:, -1:], in_squares[:, None] / (2 * ritz))
    enough = tau * (1 - TIE) * trace[:, None]
    rank = (below - slack < enough).sum(-1) + 1  # width + 1: these directions do not hold enough
    above_one_less = F.pad(above + slack, (1, 0)).gather(-1, rank[:, None] - 1)  # S_0 = 0
    return torch.where((rank <= width) & (above_one_less < enough)[:, 0], rank, 0)


def column_count(attention_BHTT: torch.Tensor, tau: float = 0.90) -> torch.Tensor:
    """c*(tau) (B, H): the fewest columns that hold tau of the squared mass ‖A‖²; from 1 to T, never below k*.

    The paper plots "columns with 90% total mass" without a formula. The squared mass is our reading of it: the
    best c columns are a rank-c approximation, so it bounds the approximate rank from above.
    """
    mass_BHT = attention_BHTT.to(torch.promote_types(attention_BHTT.dtype, torch.float32)).square().sum(-2)
    return least_count(mass_BHT.sort(-1, descending=True).values, tau)


def least_count(energy: torch.Tensor, tau: float) -> torch.Tensor:
    """How many leading entries (..., T), sorted from the largest, reach tau of their sum, to float32's rounding."""
    energy = energy.cpu() if energy.device.type == "mps" else energy  # has no float64
    cumulative = energy.double().clamp(min=0).cumsum(-1)
    return (cumulative < tau * (1 - TIE) * cumulative[..., -1:]).sum(-1) + 1


def sink(attention_BHTT: torch.Tensor) -> torch.Tensor:
    """(B, H): the mean attention that column 0 receives; from 0 to 1."""
    return attention_BHTT[..., 0].mean(-1)


# ----------------------------------------------------------------------------------------------------------
# Models and their tokens


def load_model(path: Path, untrained: bool = False) -> torch.nn.Module:
    """A model on the CPU, in float32: a GPT-2 as our GPT, any other decoder by transformers; or one of its shape.

    Raises UserError.
    """
    torch.manual_seed(0)  # for the untrained one
    family = storage.read_json(path / "config.json").get("model_type")
    if family == "gpt2":
        return GPT(checkpoint.read_config(path)).eval() if untrained else checkpoint.load_model(path)
    storage.TensorFiles(path)  # refuses pickles
    try:
        import transformers  # only here: our own models never need it
    except ImportError:
        raise UserError(f"{path} is of type {family!r}, which takes transformers; pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = {"attn_implementation": "eager", "dtype": torch.float32}  # fused attention returns no matrices
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        if untrained:
            return transformers.AutoModelForCausalLM.from_config(config, **settings).eval()
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            path, config=config, output_loading_info=True, **settings
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"{path}: transformers cannot load it: {(str(error).splitlines() or [error])[0]}") from None
    if found["missing_keys"]:  # transformers would leave random weights there
        raise UserError(f"{path}: no weights for {', '.join(sorted(found['missing_keys'])[:5])}")
    return model.eval()


def longest_sequence(path: Path) -> int:
    """How many tokens a model reads at once; without a limit where its config.json names none. Raises UserError."""
    table = storage.read_json(path / "config.json")
    return table.get("n_positions") or table.get("max_position_embeddings") or sys.maxsize


def validation_tokens(path: Path, model: torch.nn.Module, data_dir: str, T: int) -> np.ndarray:
    """The validation tokens of a data directory for a model (N,). Raises UserError.

    A GPT-2 has to have the tokenizer of the data. For another family the text is encoded anew with the model's own
    tokenizer, and its end-of-text token (if it has one) put after each document: the same text for every model.
    """
    meta = data.read_meta(data_dir)
    if isinstance(model, GPT):
        checkpoint.check_tokenizer(path, meta)
        return data.open_tokens(data_dir, "val", T, model.config.vocab_size)
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        vocabulary = len(tokenizer)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: no tokenizer to be read there, save one with the model ({reason})") from None
    stored = np.memmap(Path(data_dir) / "val.bin", dtype=meta["dtype"], mode="r")
    documents = data.tokenizer(meta["tokenizer"]).decode(stored.tolist()).split(data.END_OF_TEXT)
    documents = [text for text in documents if text]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = np.array([token for ids in encoded for token in (*ids, *end)], dtype=np.int64)
    letters = [re.sub(r"\W|_", "", text).casefold() for text in (documents[0], tokenizer.decode(encoded[0]))]
    if letters[0][:50] not in letters[1]:  # transformers makes an empty tokenizer where none was saved
        raise UserError(
            f"{path}: its tokenizer (vocabulary {vocabulary}) loses the text; save the right one with the model"
        )
    room = model.get_input_embeddings().num_embeddings
    if len(tokens) < T + 1 or tokens.max() >= room:
        raise UserError(
            f"{path}: its tokenizer (vocabulary {vocabulary}) makes {len(tokens)} tokens of {data_dir}, expected at "
            f"least {T + 1}, with ids below the model's {room}; prepare more text, or mend the tokenizer"
        )
    return tokens


# ----------------------------------------------------------------------------------------------------------
# The matrices of a model


@torch.no_grad()
def visit_layers(model: torch.nn.Module, idx: torch.Tensor, visit: Callable[[int, torch.Tensor], None]):
    """Call visit(layer, attention (B, H, T, T)) for the layers of a model on tokens idx (B, T), in their order.

    The model is our GPT, or a decoder of transformers that computes "eager" attention: then a forward hook takes
    the matrices as each attention module returns them, one for each query head, and the module's caller drops them.
    So one layer is in memory at a time. A layer without attention (state space, convolution, linear) is not visited.
    """
    if isinstance(model, GPT):
        x = model.embed(idx)  # GPT.attention_matrices would do, but holds on to one layer until the next is there
        for layer, block in enumerate(model.transformer.h):
            visit(layer, block.attn.matrix(block.ln_1(x)))
            x = block(x)
        return

    shape, seen, handles = (len(idx), idx.shape[1], idx.shape[1]), set(), []

    def hook_for(layer: int):
        def hook(module, inputs, output):
            for part in output if isinstance(output, tuple) else ():
                is_attention = torch.is_tensor(part) and part.ndim == 4 and (len(part), *part.shape[2:]) == shape
                if is_attention and layer not in seen:  # some families put one attention module in another
                    seen.add(layer)
                    visit(layer, part)

        return hook

    for name, module in model.named_modules():
        number = re.search(r"\.(\d+)\.", name)  # "model.layers.3.self_attn", "transformer.h.3.attn"
        if number and "Attention" in type(module).__name__:
            handles.append(module.register_forward_hook(hook_for(int(number[1]))))
    try:
        model.base_model(input_ids=idx, use_cache=False)  # without the head, whose logits nobody needs
    finally:
        for handle in handles:
            handle.remove()


def measure(
    model: torch.nn.Module, idx: torch.Tensor, tau: float, micro_batch: int, average_first: bool = False
) -> dict[int, dict[str, np.ndarray]]:
    """The measures of a model on sequences idx (S, T): {layer: {measure: (H, S)}}.

    average_first: of the mean of the S matrices of a head, so (H, 1); it is taken over one batch of S sequences.
    Names layers without matrices in a line of output. Raises UserError: exit code 1, naming layer and heads, where
    attention is not finite; 2 for a model that has no attention matrix at all.
    """
    S = len(idx)
    micro_batch = S if average_first else micro_batch
    found: dict[int, dict[str, list]] = {}
    progress = tqdm(desc="attention", unit="layer", disable=None, leave=False)

    def visit(layer: int, attention_BHTT: torch.Tensor):
        heads = (~attention_BHTT.sum((-2, -1)).isfinite()).any(0).nonzero().flatten().tolist()
        if heads:
            raise UserError(f"layer {layer}, heads {heads}: attention is not finite", exit_code=1)
        if average_first:
            attention_BHTT = attention_BHTT.mean(0, keepdim=True)  # (1, H, T, T)
        values_BH = (approximate_rank(attention_BHTT, tau), column_count(attention_BHTT, tau), sink(attention_BHTT))
        for name, value_BH in zip(MEASURES, values_BH, strict=True):
            found.setdefault(layer, {name: [] for name in MEASURES})[name].append(value_BH.cpu().double().numpy())
        progress.update()

    for begin in range(0, S, micro_batch):
        visit_layers(model, idx[begin : begin + micro_batch], visit)
    progress.close()
    n_layer = model.config.n_layer if isinstance(model, GPT) else model.config.get_text_config().num_hidden_layers
    left_out = sorted(set(range(n_layer)) - set(found))
    if not found:
        raise UserError(f"{type(model).__name__}: no layer has an attention matrix; expected softmax attention")
    if left_out:
        print(f"layers {left_out} have no attention matrix (state space, convolution or linear attention): left out")
    return {
        layer: {name: np.concatenate(parts).T for name, parts in values.items()}
        for layer, values in sorted(found.items())
    }


def collapse(model: GPT, tokens: np.ndarray, sequences: int = 4, tau: float = 0.90) -> dict:
    """What train.py --track_rank logs: for each layer the largest and the mean over heads of k* and c*; T, tau, n.

    The mean over a few validation windows, always the same ones. Leaves the model and the random numbers as they were.
    """
    T, training = model.config.block_size, model.training
    starts = data.val_starts(len(tokens), T)
    chosen = np.linspace(0, len(starts) - 1, min(sequences, len(starts))).astype(int)
    idx = data.windows(tokens, starts[chosen], T)[0].to(model.transformer.wte.weight.device)
    by_layer = measure(model.eval(), idx, tau, micro_batch=1).values()
    model.train(training)
    found = {
        f"{kind}_{name}": [float(reduce(values[name], axis=0).mean()) for values in by_layer]  # over heads; sequences
        for name in ("rank", "columns")
        for kind, reduce in (("max", np.max), ("mean", np.mean))
    }
    return found | {"T": T, "tau": tau, "sequences": len(chosen)}
