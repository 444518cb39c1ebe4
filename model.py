"""GPT-2 in one file: configuration, block, model, loss, generation.

    python -c "from model import GPTConfig; print(GPTConfig(n_layer=24, n_head=16, n_embd=1024).num_params())"
    python -m pytest tests/test_model.py      # equals transformers' GPT-2 in float64, gradients too

Every name is GPT-2's own, so a parameter here and a tensor in a Hugging Face GPT-2 checkpoint have
the same key ("transformer.h.0.attn.c_attn.weight"). Copying layers needs little else.

B batch   T time   C n_embd   nh heads   hs head size   L layers   V vocabulary
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# On a CPU in bfloat16, matrix products take half the time of the fused kernel. But then the (T, T)
# matrices are in memory, so from some length on they need too much of it.
PRODUCTS_UP_TO = 512  # T


@dataclass
class GPTConfig:
    """The shape of a model. Defaults: GPT-2 small without biases, as the authors' code has it."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024  # the longest sequence; one learned position each
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    bias: bool = False  # biases in linear layers and layer norms; OpenAI's GPT-2 has them
    dropout: float = 0.0
    scale_attn_by_inverse_layer_idx: bool = False  # layer i divides its attention logits by i + 1

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; change one")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}, expected 0 <= dropout < 1")

    def num_params(self) -> int:
        """Parameters, each counted once: the head is the token embedding."""
        C, biases = self.n_embd, 1 if self.bias else 0
        layer_norm = C + biases * C
        block = 12 * C * C + biases * 9 * C + 2 * layer_norm  # 3C² + C² attention, 4C² + 4C² MLP
        return self.vocab_size * C + self.block_size * C + self.n_layer * block + layer_norm

    def flops_per_token(self) -> int:
        """Floating point operations to train on one token, forward and backward, at T = block_size.

        6 for each weight of a matrix product and 12·L·C·T for attention, which counts the whole T×T matrix
        (PaLM, arXiv 2204.02311, appendix B). Embedding look-ups and layer norms are left out.
        """
        matmul_weights = 12 * self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd
        return 6 * matmul_weights + 12 * self.n_layer * self.n_embd * self.block_size


# ------------------------------------------------------------------------------------------------
# One block


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.scale = (config.n_embd // config.n_head) ** -0.5
        self.divisor = None
        if config.scale_attn_by_inverse_layer_idx:  # a number would be compiled in, layer by layer
            self.divisor = torch.tensor(layer_idx + 1.0, device="cpu")  # divides a GPU's tensors too

    def heads(self, x):
        """(B, T, C) -> queries, keys, values, each (B, nh, T, hs)."""
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, nh, hs)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return (q if self.divisor is None else q / self.divisor), k, v

    def forward(self, x):
        q, k, v = self.heads(x)
        dropout_p = self.dropout if self.training else 0.0  # functional dropout ignores eval()
        if x.device.type == "cpu" and q.dtype == torch.bfloat16 and x.shape[1] <= PRODUCTS_UP_TO:
            y = F.dropout(self.attention_weights(q, k), dropout_p) @ v  # (B, nh, T, T) @ (B, nh, T, hs)
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, scale=self.scale)
        y = y.transpose(1, 2).flatten(2)  # (B, nh, T, hs) -> (B, T, C)
        return self.resid_dropout(self.c_proj(y))

    def attention_weights(self, q, k):
        """How much each position attends to each: (B, nh, T, T), each row sums to 1."""
        logits = self.scale * (q @ k.mT)  # (B, nh, T, T)
        future = torch.full(logits.shape[-2:], -math.inf, dtype=logits.dtype, device=q.device).triu(1)
        return (logits + future).softmax(-1)  # a sum compiles to faster code than masked_fill


def gelu(x):
    """GPT-2's GELU, the tanh form. The exact one would change its logits by 1e-4."""
    if torch.compiler.is_compiling():  # by exp, since 1 + tanh(z) = 2·sigmoid(2z): saves 8% of a step
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return F.gelu(x, approximate="tanh")  # one kernel


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


# ------------------------------------------------------------------------------------------------
# The model


def token_losses(logits, targets, reduction="mean"):
    """Cross-entropy, nats, of logits (B, T, V), targets (B, T): a scalar, or (B, T) for "none"."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # no loss in half precision
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
    return loss.view_as(targets) if reduction == "none" else loss


class GPT(nn.Module):
    """GPT-2. Fresh weights come from torch's global generator: seed it for a reproducible start."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # keep each block's input, compute the rest again
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),  # also the head: they are tied
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        residual_std = 0.02 / math.sqrt(2 * config.n_layer)  # GPT-2 paper, 2.3: two branches a layer
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:  # layer norm weights, the only other ones, start at 1
                nn.init.normal_(parameter, std=residual_std if name.endswith("c_proj.weight") else 0.02)

    def embed(self, idx):
        """Token ids (B, T) -> the first block's input (B, T, C). ValueError if T > block_size."""
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"sequence of {T} tokens is longer than block_size {self.config.block_size}")
        positions = torch.arange(T, device=idx.device)
        return self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))

    def forward(self, idx, targets=None, reduction="mean"):
        """Logits (B, T, V); with targets (B, T) the cross-entropy in nats (token_losses)."""
        x = self.embed(idx)
        for block in self.transformer.h:
            x = checkpoint(block, x, use_reentrant=False) if self.gradient_checkpointing else block(x)
        return self.head(x, targets, reduction)

    def head(self, x, targets, reduction):
        """From what the last block returns (B, T, C) to what forward returns."""
        x = self.transformer.ln_f(x)
        logits = F.linear(x, self.transformer.wte.weight)  # (B, T, V)
        return logits if targets is None else token_losses(logits, targets, reduction)

    def compile_blocks(self, **options):
        """Compile one block, for all layers, and the head: the time hardly grows with depth."""
        for block in self.transformer.h:
            block.compile(**options)
        self.head = torch.compile(self.head, **options)

    @torch.no_grad()
    def attention_matrices(self, idx):
        """Yield the attention matrices (B, nh, T, T) of layer 0, 1, ..., one layer at a time."""
        x = self.embed(idx)
        for block in self.transformer.h:
            q, k, _ = block.attn.heads(block.ln_1(x))
            yield block.attn.attention_weights(q, k)  # the fused kernel never holds them
            x = block.forward(x)  # uncompiled: compiling it for this shape would not pay

    def param_groups(self, weight_decay: float) -> list[dict]:
        """AdamW's groups: matrices and embeddings decay, biases and layer norms do not."""
        decayed = [p for p in self.parameters() if p.ndim >= 2]
        rest = [p for p in self.parameters() if p.ndim < 2]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]

    @torch.no_grad()
    def generate(self, idx, max_new_tokens: int, temperature=1.0, top_k: int | None = None):
        """Continue idx (B, T >= 1) by max_new_tokens sampled tokens; sees the last block_size at most.

        Temperature 0 takes the likeliest. ValueError: an empty prompt, temperature < 0, top_k < 1.
        """
        if idx.shape[1] == 0 or not 0 <= temperature < math.inf or (top_k is not None and top_k < 1):
            raise ValueError(
                f"found a prompt of {idx.shape[1]} tokens, temperature {temperature}, top_k {top_k}; "
                "expected at least 1 token, temperature >= 0, top_k >= 1"
            )
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[:, -1].float()  # (B, V)
            if top_k is not None:
                kth_largest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < kth_largest, -math.inf)
            probabilities = (logits / max(temperature, 1e-9)).softmax(-1)  # temperature 0: one-hot
            idx = torch.cat([idx, torch.multinomial(probabilities, 1)], dim=1)
        return idx
