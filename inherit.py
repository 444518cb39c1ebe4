"""Take layers out of a checkpoint: the step of Inheritune that makes a smaller model of another.

    python inherit.py --reference=out/demo/reference --layers=0:3 --out=out/half   # the first half
    python inherit.py --reference=gpt2-medium --layers=0:12 --out=out/medium-12    # of the hub
    python inherit.py --reference=out/demo/reference --layers=new:3,3:6 --out=out/fresh-below
    python inherit.py --reference=out/demo/reference --layers=0:3 --parts=attn,mlp --out=out/parts
    python inherit.py --reference=out/demo/reference --layers=: --width=0.5 --out=out/narrow
    python inherit.py --reference=out/half --layers=: --top=out/demo/reference --top_layers=3:5 --out=out/five

--layers lists a source layer for each layer of the target, as Python slices, from 0 and half-open:
"0:8,0:8" stacks, "::2" takes every other layer, "new" is a fresh layer and "new:15" are fifteen.
Embeddings, final norm and head are always inherited. Any Hugging Face decoder will do, but --parts
and --width need a GPT-2. A model of another family is opened in transformers before it is
published. lineage.json says where each tensor came from.
"""

from plumbing import configurator  # isort: skip  # before the slow imports: a quiet Ctrl-C

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import save_torch_state_dict

from plumbing import model_files, storage
from plumbing.configurator import UserError

# "transformer.h." "3" "ln_1.weight"
LAYER = re.compile(r"^(.*?(?:^|\.)(?:h|layers|blocks)\.)(\d+)\.(.+)$")
DEPTH = ("n_layer", "num_hidden_layers", "num_layers", "n_layers")  # in config.json, by family
OUTSIDE_LAYERS = re.compile(  # settings that change no layer's arithmetic
    "drop|token|vocab|version|dtype|name|architectures|ctx|positions?$|_embeddings$|cache|block_size|bias$"
)
BLOCK_PARTS = ("ln_1", "attn", "ln_2", "mlp")  # of a GPT-2 block


@dataclass
class InheritConfig:
    """Make a smaller (or taller) checkpoint of the layers of another."""

    reference: str  # a checkpoint, a run directory or a name on the hub
    layers: str  # source layers as slices: 0:12 or ::2 or 0:4,0:4 or : for all; new or new:2: fresh
    out: str  # directory to write
    parts: str = ""  # GPT-2: comma-separated parts of blocks (ln_1, attn, ln_2, mlp); rest: fresh
    width: float = 1.0  # GPT-2: the share of heads, MLP units and dimensions to keep: the first
    top: str = ""  # a second checkpoint of the same width, whose layers go on top
    top_layers: str = ""  # which of its layers
    seed: int = 1337  # of the fresh tensors


def take_layers(names, layers: list[int | None]) -> dict[str, str | None]:
    """Target tensor -> source tensor, None for a fresh one. Layer i is the source's layers[i]."""
    # Inheritune step 1 (inherit): embeddings, head, the final norm (ours); then the layers (algorithm 1)
    target = {name: name for name in names if not LAYER.match(name)}
    for target_layer, layer in enumerate(layers):
        for name in names:
            match = LAYER.match(name)
            if match and int(match[2]) == (layer or 0):  # a fresh one: layer 0's tensors, all new
                target[f"{match[1]}{target_layer}.{match[3]}"] = None if layer is None else name
    return target


def parse_layers(text: str, n_layer: int) -> list[int | None]:
    """ "0:4,6" of 8 layers -> [0, 1, 2, 3, 6]; "new:2" -> [None, None]. Raises UserError."""
    layers = []
    for item in text.replace(" ", "").split(","):
        chosen = []
        if match := re.fullmatch(r"new(?::(\d+))?", item):
            chosen = [None] * int(match[1] or 1)
        elif re.fullmatch(r"\d+", item):
            chosen = range(n_layer)[int(item) : int(item) + 1]
        elif match := re.fullmatch(r"(\d*):(\d*)(?::([1-9]\d*))?", item):
            start, stop, stride = (int(number) if number else None for number in match.groups())
            chosen = range(n_layer)[start:stop:stride] if (stop or 0) <= n_layer else []
        if not chosen:
            raise UserError(
                f"layers {text!r}: {item!r} does not lie in 0:{n_layer}; expected slices of its "
                "layers, such as 0:12, ::2, 3 or new:2, counted from 0"
            )
        layers += chosen
    return layers


class Source(NamedTuple):
    """A checkpoint that layers are taken from. Layers of all sources are counted through."""

    path: Path
    config: dict  # its config.json
    n_layer: int
    offset: int  # the number of its layer 0


def sliced_config(sources: list[Source], layers: list[int | None], width=1.0) -> dict:
    """config.json of the target: its depth, lists with an entry for each layer, its width."""
    config, lists = sources[0].config, {}
    for key in config:
        entries = [(source.config.get(key), source.n_layer) for source in sources]
        if all(isinstance(value, list) and len(value) == n for value, n in entries):
            joined = [entry for value, _ in entries for entry in value]
            lists[key] = [joined[layer or 0] for layer in layers]
    depth = {key: len(layers) for key in DEPTH if key in config}
    widths = [key for key in ("n_embd", "n_head", "n_inner") if width < 1 and config.get(key)]
    return config | lists | depth | {key: round(width * config[key]) for key in widths}


def narrow(name: str, tensor: torch.Tensor, width: float) -> torch.Tensor:
    """The first heads, MLP units and dimensions of a GPT-2's tensor (paper, appendix D)."""
    if width == 1 or tensor.ndim == 0:
        return tensor
    pieces = tensor.chunk(3, -1) if ".c_attn." in name else [tensor]  # queries, keys, values
    kept = torch.cat([piece[..., : round(width * piece.shape[-1])] for piece in pieces], -1)
    if LAYER.match(name) and tensor.ndim == 2:  # (in, out); embeddings keep all tokens, positions
        kept = kept[: round(width * len(kept))].clone()
    return kept


def open_sources(settings: InheritConfig) -> tuple[list[Source], dict]:
    """The sources, the lower one first, and the lineage: all that decides the tensors. UserError."""
    wanted, sources, chosen, offset = [(settings.reference, settings.layers)], [], [], 0
    if bool(settings.top) != bool(settings.top_layers):
        raise UserError("top and top_layers go together: set both or neither")
    if settings.top:
        wanted.append((settings.top, settings.top_layers))
    for name, layers in wanted:
        path = model_files.resolve(name)
        config = storage.read_json(path / "config.json")
        if config.get("model_type") != "gpt2":
            from plumbing import decoders  # imported here: GPT-2 does without it

            config = decoders.derived_config(path)
        n_layer = next((config[key] for key in DEPTH if key in config), None)
        if n_layer is None:
            raise UserError(f"{path}/config.json has no {DEPTH[1]}; expected a model of text alone")
        layers = parse_layers(layers, n_layer) if isinstance(layers, str) else layers
        chosen += [None if layer is None else offset + layer for layer in layers]
        sources.append(Source(path, config, n_layer, offset))
        offset += n_layer
    path, config = sources[0].path, sources[0].config
    lineage = {"reference": str(settings.reference), "sha256": model_files.hashes(path)}
    lineage |= {"parts": settings.parts or "all", "layers": chosen}
    if settings.width < 1:
        lineage["width"] = settings.width
    if settings.top:
        default = {"scale_attn_by_inverse_layer_idx": False}  # GPT-2's files of the hub lack it
        ours, theirs = (default | source.config for source in sources)
        differ = [
            f"{key}: {value} and {theirs[key]}"
            for key, value in ours.items()
            if value != theirs.get(key, value) and key not in DEPTH
            and not isinstance(value, list) and not OUTSIDE_LAYERS.search(key)
        ]
        if differ:
            raise UserError(f"{path} and {settings.top} have different layers: {'; '.join(differ)}")
        lineage["top_sha256"] = model_files.hashes(sources[1].path)
    return sources, lineage


def source_tensors(sources: list[Source], width: float) -> dict:
    """Name -> tensor: the layers of all sources, counted through, and the first one's others."""
    found, beyond = {}, set()
    for path, config, n_layer, offset in sources:
        rename = model_files.gpt2_key if config["model_type"] == "gpt2" else str
        for stored_name, tensor in model_files.read_tensors(path).items():
            name = rename(stored_name) or ""  # a mask has no name
            match = LAYER.match(name)
            if match and int(match[2]) < n_layer:
                name = f"{match[1]}{offset + int(match[2])}.{match[3]}"
            elif match:
                beyond.add(match[2])
                continue
            elif offset or not name:
                continue
            found[name] = narrow(name, tensor, width)
    if beyond:  # such a layer predicts several tokens at once
        print(f"left out layers beyond n_layer: {', '.join(sorted(beyond))}")
    return found


def inherit(reference, layers, out, **others) -> Path:
    """Write the target to `out`. layers: text or a list; others: InheritConfig's. Raises UserError."""
    settings = InheritConfig(reference, layers, out, **others)
    sources, lineage = open_sources(settings)
    path, config = sources[0].path, sources[0].config
    chosen, parts, width = lineage["layers"], settings.parts, settings.width
    is_gpt2, heads = config["model_type"] == "gpt2", width * config.get("n_head", 1)
    if not set(parts.split(",")) <= {"", *BLOCK_PARTS}:
        raise UserError(f"parts is {parts!r}, expected some of {', '.join(BLOCK_PARTS)}")
    if (parts or width < 1) and not is_gpt2:
        raise UserError(f"parts and width are for GPT-2, and {path} is {config['model_type']!r}")
    if not 0 < width <= 1 or heads % 1:
        raise UserError(f"width {width} leaves {heads:g} heads, expected a whole number >= 1")
    if config.get("scale_attn_by_inverse_layer_idx") and chosen != list(range(len(chosen))):
        print("warning: layer i divides its logits by i + 1, so a moved layer computes differently")

    with storage.publish(out) as directory:
        storage.write_json(directory / "config.json", sliced_config(sources, chosen, width))
        tensors = source_tensors(sources, width)
        stored = {int(match[2]) for match in map(LAYER.match, tensors) if match}
        if missing := {layer for layer in chosen if layer is not None} - stored:
            raise UserError(f"{path}: no tensors of layers {sorted(missing)}, but config.json has them")
        origin = take_layers(tensors, chosen)
        for name in origin if parts else ():
            match = LAYER.match(name)
            if match and match[3].split(".")[0] not in parts.split(","):
                origin[name] = None
        weights = {new: tensors[old] for new, old in origin.items() if old}
        if len(set(chosen)) < len(chosen):  # a file holds no tensor twice
            weights = {new: tensor.clone() for new, tensor in weights.items()}
        if fresh := [new for new, old in origin.items() if old is None]:
            from plumbing import checkpoint, pretrained  # only fresh layers need a model

            torch.manual_seed(settings.seed)
            drawn = checkpoint.hf_tensors(pretrained.load_model(directory, fresh=True))
            dtype = next(iter(weights.values())).dtype
            weights |= {name: drawn[name].to(dtype) for name in fresh}
        storage.check_finite(path, weights)
        save_torch_state_dict(weights, directory, max_shard_size="5GB")
        tensors = {name: origin[name] or f"fresh, seed {settings.seed}" for name in weights}
        storage.write_json(directory / "lineage.json", lineage | {"tensors": tensors})
        storage.copy_tokenizer(path, directory)
        if not is_gpt2:
            from plumbing import decoders

            decoders.check_opens(directory, out)
    taken = ", ".join("new" if layer is None else str(layer) for layer in chosen)
    print(f"{out}: layers {taken}; {sum(t.numel() for t in weights.values()):,} parameters stored")
    return Path(out).expanduser()


def main():
    inherit(**vars(configurator.load(InheritConfig)))


if __name__ == "__main__":
    configurator.run(main)
