"""Any decoder of transformers, behind the interface of model.py's GPT: train, slice, measure it.

    python analyze_attention.py HuggingFaceTB/SmolLM2-135M --data_dir=data/smol
    python inheritune.py config/single_gpu.toml --reference=HuggingFaceTB/SmolLM2-135M

pretrained.py calls this for every model that model.py cannot compute: other families, and GPT-2
with another activation. Only this file imports transformers. It never runs a model's own code.
"""

import contextlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from model import GPT, GPTConfig, token_losses
from plumbing import storage
from plumbing.configurator import UserError

SAFE = {"trust_remote_code": False}  # None: transformers asks, and "y" runs a stranger's code
SAFETENSORS = SAFE | {"use_safetensors": True, "output_loading_info": True}  # never a pickle


@contextlib.contextmanager
def transformers_for(path: Path):
    """The module transformers. What it cannot do with the model in `path` becomes a UserError."""
    try:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        yield transformers
    except Exception as error:  # it raises nearly all kinds
        reason = " ".join(str(error).split())[:200]
        expected = "expected what transformers (pip install it) can load"
        raise UserError(f"{path}: {reason}; {expected}") from None


def read_config(transformers, path: Path):
    """The configuration of a directory as transformers derives it. Its own code is not run."""
    if "auto_map" in storage.read_json(path / "config.json"):
        print(f"{path}: the code that comes with it (auto_map) is not run")
    return transformers.AutoConfig.from_pretrained(path, **SAFE)


@dataclass
class DecoderConfig(GPTConfig):
    """A decoder's shape in GPTConfig's words, with counts of its own."""

    def __post_init__(self):  # n_embd need not be divisible by n_head
        self.parameters = self.flops = 0  # no fields: they are no options

    def num_params(self) -> int:
        return self.parameters

    def flops_per_token(self) -> int:
        return self.flops


class Decoder(torch.nn.Module):
    """A causal language model of transformers that is used as a GPT."""

    def __init__(self, hf: torch.nn.Module, table: dict, block_size: int | None, dropout: float):
        super().__init__()
        self.hf, self.table, text = hf, table, hf.config.get_text_config()  # table: its config.json
        L, C, heads = text.num_hidden_layers, text.hidden_size, text.num_attention_heads
        T = min(block_size or 1024, getattr(text, "max_position_embeddings", None) or sys.maxsize)
        V = hf.get_input_embeddings().num_embeddings
        self.config = DecoderConfig(L, heads, C, T, V, True, dropout)
        self.config.parameters = sum(parameter.numel() for parameter in hf.parameters())
        # as in model.py: 6 for each weight of a product, 12·L·T for each dimension of the heads
        modules = [module for module in hf.modules() if "weight" in module._parameters]
        matrices = [m.weight for m in modules if not isinstance(m, torch.nn.Embedding)]
        products = sum(weight.numel() for weight in matrices if weight.ndim == 2)
        width = heads * (getattr(text, "head_dim", None) or C // heads)
        self.config.flops = 6 * products + 12 * L * width * T

    def forward(self, idx, targets=None, reduction="mean"):
        """Logits (B, T, V); with targets (B, T) the cross-entropy in nats, as in model.py:GPT."""
        logits = self.hf(input_ids=idx, use_cache=False).logits
        return logits if targets is None else token_losses(logits, targets, reduction)

    def named_parameters(self, *args, **kwargs):
        """The family's own names, as in its checkpoints. A tied head has none of its own."""
        return self.hf.named_parameters(*args, **kwargs)

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of model.safetensors: parameters, and the buffers that the family stores."""
        stored = self.hf.state_dict()
        buffers = {name: stored[name] for name, _ in self.hf.named_buffers() if name in stored}
        return {name: parameter.detach() for name, parameter in self.named_parameters()} | buffers

    def set_gradient_checkpointing(self, on: bool):
        if on:
            self.hf.gradient_checkpointing_enable({"use_reentrant": False})

    gradient_checkpointing = property(None, set_gradient_checkpointing)
    param_groups, generate = GPT.param_groups, GPT.generate
    compile_blocks = torch.nn.Module.compile  # of the whole model: a family's layers may differ

    @torch.no_grad()
    def visit_attention(self, idx: torch.Tensor, visit):
        """Call visit(layer, A (B, H, T, T)) for each layer that has attention, on idx (B, T).

        One layer is in memory at a time. UserError if none has attention.
        """
        names = {m: name for name, m in self.hf.named_modules() if "Attention" in type(m).__name__}
        seen, T = set(), idx.shape[1]

        def hook(module, inputs, output):
            number = re.search(r"\.(\d+)\.", names.get(module, ""))  # "model.layers.3.self_attn"
            if not number or not isinstance(output, tuple | list):
                return None
            layer = int(number[1])
            found = [torch.is_tensor(part) and part.shape[2:] == (T, T) for part in output]
            if any(found) and layer not in seen:  # some put one attention module inside another
                seen.add(layer)
                visit(layer, output[found.index(True)])
            return type(output)(None if drop else part for part, drop in zip(output, found, strict=True))

        implementation = self.hf.config._attn_implementation
        self.hf.set_attn_implementation("eager")  # the fused kernels never hold the matrices
        self.hf.config._attn_implementation = "eager"  # Falcon ignores the line above
        try:
            with torch.nn.modules.module.register_module_forward_hook(hook):
                self.hf.base_model(input_ids=idx, use_cache=False)  # without the head: no logits
                if not seen:  # some families compute them only when asked
                    self.hf.base_model(input_ids=idx, use_cache=False, output_attentions=True)
        finally:
            self.hf.set_attn_implementation(implementation)
            self.hf.config._attn_implementation = implementation
        if not seen:
            raise UserError(f"{type(self.hf).__name__} has no attention matrix")


def load(path: Path, dtype: torch.dtype, options: dict, fresh: bool) -> Decoder:
    """The model in a directory, on the CPU, in evaluation mode. `fresh`: its shape, random weights.

    Of the options (GPTConfig's names) block_size and dropout apply, and n_layer to a fresh one.
    """
    dropout = options.get("dropout", 0.0)
    with transformers_for(path) as transformers:
        config = read_config(transformers, path)
        text = config.get_text_config()
        n_layer = options.get("n_layer") or text.num_hidden_layers
        for key, value in text.to_dict().items():
            if fresh and isinstance(value, list) and len(value) == text.num_hidden_layers:
                setattr(text, key, value[:n_layer])
            if key.endswith(("dropout", "pdrop")) and isinstance(value, float | int):
                setattr(text, key, dropout)
        if fresh:
            text.num_hidden_layers = n_layer
            hf = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **SAFE)
        else:
            how = SAFETENSORS | {"dtype": dtype, "config": config}
            hf, found = transformers.AutoModelForCausalLM.from_pretrained(path, **how)
            if found["missing_keys"]:  # transformers leaves random weights there
                missing = ", ".join(sorted(found["missing_keys"])[:5])
                raise ValueError(f"no weights for {missing}")
        table = json.loads(config.to_json_string())
        block_size = options.get("block_size") or table.get("block_size")  # our checkpoints keep it
        model = Decoder(hf, table, block_size, dropout).eval()
        model.table |= {"dtype": "float32", "block_size": model.config.block_size}
        return model


def derived_config(path: Path) -> dict:
    """config.json with all that transformers derives from it, such as each layer's kind.

    A family may say only "every sixth layer"; a list with an entry for each layer can be sliced.
    """
    with transformers_for(path) as transformers:
        return json.loads(read_config(transformers, path).to_json_string())


def check_opens(path: Path, name):
    """Raise UserError, naming `name`, unless every tensor in `path` has its place, none missing."""
    with transformers_for(name) as transformers:
        how = SAFETENSORS | {"dtype": "auto"}
        _, found = transformers.AutoModelForCausalLM.from_pretrained(path, **how)
        wrong = sorted(map(str, [*found["missing_keys"], *found["unexpected_keys"]]))
        if wrong:
            raise ValueError(f"sliced, its layers are of other kinds: {', '.join(wrong[:3])}")
