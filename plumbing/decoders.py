"""Models of any family: load one, tokenize text for it, visit its attention matrices layer by layer.

    python analyze_attention.py HuggingFaceTB/SmolLM2-135M --data_dir=data/demo    # pip install transformers
    python -c "from plumbing import decoders, storage; print(decoders.load(storage.resolve('gpt2')))"

A GPT-2 becomes our GPT, any other decoder a model of transformers, which is imported only here.
"""

import contextlib
import re
import sys
from pathlib import Path

import numpy as np
import torch

from model import GPT
from plumbing import checkpoint, storage
from plumbing.configurator import UserError
from plumbing.tokenizers import END_OF_TEXT, tokenizer

SAFE = {"trust_remote_code": False}  # else transformers asks on stdin, and a piped "y" runs a stranger's code


@contextlib.contextmanager
def transformers_for(path: Path):
    """The module transformers. What it cannot do with the model in `path` becomes a UserError."""
    try:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        yield transformers
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: {reason}; expected what transformers (pip install it) can load") from None


def load(path: Path, untrained: bool = False) -> torch.nn.Module:
    """The model in a directory, or a new one of its shape: float32, CPU, eval mode. Raises UserError."""
    torch.manual_seed(0)  # for the untrained one
    if storage.read_json(path / "config.json").get("model_type") == "gpt2":
        return GPT(checkpoint.read_config(path)).eval() if untrained else checkpoint.load_model(path)
    settings = {"attn_implementation": "eager", "dtype": torch.float32, **SAFE}  # fused kernels: no matrices
    with transformers_for(path) as transformers:
        config = transformers.AutoConfig.from_pretrained(path, **SAFE)
        if untrained:
            return transformers.AutoModelForCausalLM.from_config(config, **settings).eval()
        settings |= {"config": config, "use_safetensors": True, "output_loading_info": True}  # never a pickle
        model, found = transformers.AutoModelForCausalLM.from_pretrained(path, **settings)
        if found["missing_keys"]:  # transformers leaves random weights there
            raise ValueError(f"no weights for {', '.join(sorted(found['missing_keys'])[:5])}")
    return model.eval()


def longest_sequence(path: Path) -> int:
    """The most tokens that a model reads at once; sys.maxsize where its config.json has no limit."""
    table = storage.read_json(path / "config.json")
    table |= table.get("text_config", {})  # of a multimodal model
    return table.get("n_positions") or table.get("max_position_embeddings") or sys.maxsize


def n_layer(model: torch.nn.Module) -> int:
    config = model.config
    return config.n_layer if isinstance(model, GPT) else config.get_text_config().num_hidden_layers


def validation_tokens(path: Path, model: torch.nn.Module, stored: np.ndarray, meta: dict):
    """The validation text in a model's own tokens (N,), and what begins each window: [] or [bos]. UserError.

    A GPT-2 reads the tokens as stored. Others get an end-of-text token after each document, if they have one.
    """
    if isinstance(model, GPT):
        checkpoint.check_tokenizer(path, meta)
        return stored, []
    text = tokenizer(meta["tokenizer"]).decode(stored.tolist())
    documents = [document for document in text.split(END_OF_TEXT) if document]
    with transformers_for(path) as transformers:
        own = transformers.AutoTokenizer.from_pretrained(path, **SAFE)
        encoded = own(documents, add_special_tokens=False, verbose=False)["input_ids"]
        first = own("a")["input_ids"][:1]  # Gemma and Llama were trained with a begin-of-text token in front
        end = [] if own.eos_token_id is None else [own.eos_token_id]
        tokens = np.array([token for ids in encoded for token in (*ids, *end)], dtype=np.int64)
        word, back = documents[0].split()[0].lower(), own.decode(encoded[0]).lower()
        if word not in back or tokens.max() >= model.get_input_embeddings().num_embeddings:
            raise ValueError(f"its tokenizer ({len(own)} tokens) is empty or a different model's")
    return tokens, first if first == [own.bos_token_id] else []


def checked(A: torch.Tensor, layer: int) -> torch.Tensor:
    """A (B, H, T, T) if it is what the measures are defined for. Raises UserError, exit code 1."""
    if heads := (~A.sum((-2, -1)).isfinite()).any(0).nonzero().flatten().tolist():
        raise UserError(f"layer {layer}, heads {heads}: attention is not finite; check the weights", 1)
    if A.min() < 0 or A.triu(1).any() or (A.float().sum(-1) - 1).abs().max() > 1e-3:
        expected = "entries >= 0, none above the diagonal, rows that sum to 1; this family cannot be measured"
        raise UserError(f"layer {layer}: found no causal attention matrix; expected {expected}", 1)
    return A


@torch.no_grad()
def attention_matrices(model: torch.nn.Module, idx: torch.Tensor, visit):
    """Call visit(layer, attention (B, H, T, T)) for each layer that has attention, on idx (B, T). UserError.

    One layer is in memory at a time.
    """
    if isinstance(model, GPT):
        x = model.embed(idx)
        for layer, block in enumerate(model.transformer.h):
            visit(layer, checked(block.attn.matrix(block.ln_1(x)), layer))
            x = block(x)
        return
    attentions = {m: name for name, m in model.named_modules() if "Attention" in type(m).__name__}
    seen, T = set(), idx.shape[1]

    def hook(module, inputs, output):
        number = re.search(r"\.(\d+)\.", attentions.get(module, ""))  # "model.layers.3.self_attn"
        for part in output if number and isinstance(output, tuple) else ():
            layer, is_square = int(number[1]), torch.is_tensor(part) and part.shape[2:] == (T, T)
            if is_square and layer not in seen:  # some families put one attention module inside another
                seen.add(layer)
                visit(layer, checked(part, layer))

    with torch.nn.modules.module.register_module_forward_hook(hook):
        model.base_model(input_ids=idx, use_cache=False)  # without the head, whose logits are not needed
    if not seen:
        raise UserError(f"{type(model).__name__} has no attention matrix; expected a softmax attention layer")
