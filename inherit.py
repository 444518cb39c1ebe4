"""Take layers out of a checkpoint: the step of Inheritune that makes a smaller model out of a trained one.

    python inherit.py --reference=out/demo/reference --layers=0:4 --out=out/half       # the first half
    python inherit.py --reference=gpt2-medium --layers=0:12 --out=out/medium-12        # of a model on the hub
    python inherit.py --reference=out/demo/reference --layers=new:4,4:8 --out=out/fresh-below
    python inherit.py --reference=out/demo/reference --layers=0:4 --parts=ln_1,attn --out=out/attention-only
    python inherit.py --reference=out/demo/reference --layers=: --width=0.5 --out=out/narrow
    python inherit.py --reference=out/half --layers=: --top=out/demo/reference --top_layers=4:6 --out=out/six

--layers lists a source layer for each layer of the target, as Python slices, from 0 and half-open: "0:8,0:8"
stacks, "::2" takes every other layer, "new" is a fresh layer and "new:15" are fifteen. Embeddings, final norm
and head are always inherited. Any Hugging Face decoder will do, but --parts and --width need a GPT-2. The
result is opened in transformers before it is published. lineage.json says where each tensor came from.
"""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file

from plumbing import configurator, storage
from plumbing.configurator import UserError

LAYER = re.compile(r"^(.*?(?:^|\.)(?:h|layers|blocks)\.)(\d+)\.(.+)$")  # "transformer.h." "3" "ln_1.weight"
DEPTH = ("n_layer", "num_hidden_layers", "num_layers", "n_layers")  # in config.json, by family
BLOCK_PARTS = ("ln_1", "attn", "ln_2", "mlp")  # of a GPT-2 block


@dataclass
class InheritConfig:
    """Make a smaller (or taller) checkpoint of the layers of another."""

    reference: str  # a checkpoint, a run directory or a name on the hub
    layers: str  # source layers as slices: 0:12 or ::2 or 0:4,0:4 or : for all; new or new:2 for fresh ones
    out: str  # directory to write
    parts: str = ""  # GPT-2: comma-separated parts of blocks (ln_1, attn, ln_2, mlp); the rest is fresh
    width: float = 1.0  # GPT-2: the share of heads, MLP units and dimensions to keep: the first ones
    moments: bool = False  # take AdamW's state of the inherited tensors too, for train.py to start with
    top: str = ""  # a second checkpoint of the same width, whose layers go on top of the reference's
    top_layers: str = ""  # which of its layers
    seed: int = 1337  # of the fresh tensors


def take_layers(names, layers: list[int | None]) -> dict[str, str | None]:
    """Target tensor -> source tensor, None for a fresh one. Target layer i is source layer layers[i]."""
    # Inheritune step 1 (inherit): embeddings, final norm, head; then the chosen layers (paper, algorithm 1)
    target = {name: name for name in names if not LAYER.match(name)}
    for new, old in enumerate(layers):
        for name in names:
            match = LAYER.match(name)
            if match and int(match[2]) == (old or 0):  # a fresh layer has the tensors of any layer
                target[f"{match[1]}{new}.{match[3]}"] = name if old is not None else None
    return target


def parse_layers(text: str, n_layer: int) -> list[int | None]:
    """ "0:4,6" of 8 layers -> [0, 1, 2, 3, 6]; "new:2" -> [None, None]. Raises UserError."""
    layers = []
    for item in text.replace(" ", "").split(","):
        if match := re.fullmatch(r"new(?::([1-9]\d*))?", item):
            layers += [None] * int(match[1] or 1)
            continue
        match = re.fullmatch(r"(\d*)(:?)(\d*)(?::(\d+))?", item)
        start, stop, stride = (int(match[i] or 0) for i in (1, 3, 4)) if match else (0, 0, 0)
        stop = n_layer if match and not match[3] else stop
        chosen = range(start, stop, stride or 1) if match and match[2] else range(start, start + 1)
        if not item or not match or not chosen or chosen[-1] >= n_layer or match[4] == "0":
            raise UserError(
                f"layers {text!r}: {item!r} does not lie in 0:{n_layer}; expected slices of its layers, "
                "such as 0:12, ::2, 3 or new:2, counted from 0"
            )
        layers += chosen
    return layers


def sliced_config(config: dict, layers: list[int | None], n_layer: int, width=1.0) -> dict:
    """config.json of the target: its number of layers, lists with an entry per layer, its width."""
    lists = {
        key: [value[(layer or 0) % n_layer] for layer in layers]
        for key, value in config.items()
        if isinstance(value, list) and len(value) == n_layer
    }
    sizes = {key: round(width * config[key]) for key in ("n_embd", "n_head", "n_inner") if config.get(key)}
    depth = {key: len(layers) for key in DEPTH if key in config}
    return config | lists | depth | (sizes if width < 1 else {})


def narrow(name: str, tensor: torch.Tensor, width: float) -> torch.Tensor:
    """The first heads, MLP units and dimensions of a GPT-2's tensor (paper, appendix D: half width)."""

    def first(t: torch.Tensor, axis: int) -> torch.Tensor:
        return t.narrow(axis, 0, round(width * t.shape[axis]))

    if width == 1 or tensor.ndim == 0:
        return tensor
    pieces = tensor.chunk(3, -1) if ".c_attn." in name else [tensor]  # queries, keys, values
    tensor = torch.cat([first(piece, -1) for piece in pieces], -1)
    # a layer's matrices are stored (in, out); embeddings keep all tokens and positions
    return first(tensor, 0).clone() if LAYER.match(name) and tensor.ndim == 2 else tensor


def open_source(name: str | Path, layers: str | list) -> tuple[Path, dict, int, list[int | None]]:
    """A checkpoint's path, config.json, number of layers, and the layers to take. Raises UserError."""
    path = storage.resolve(name)
    config = storage.read_json(path / "config.json")
    n_layer = next((config[key] for key in DEPTH if key in config), None)
    if not isinstance(n_layer, int):
        hint = "; it is multimodal: save its text model alone" if "text_config" in config else ""
        raise UserError(f"{path}/config.json has none of {', '.join(DEPTH)}{hint}")
    chosen = parse_layers(layers, n_layer) if isinstance(layers, str) else list(layers)
    if config.get("model_type") != "gpt2" and chosen != list(range(len(chosen))):
        from plumbing import decoders  # imported where it is used

        config = decoders.derived_config(path)  # the kind of each layer, where config.json has only a rule
    return path, config, n_layer, chosen


def source_tensors(path: Path, config: dict, n_layer: int, stem: str, width=1.0, shift: int = 0) -> dict:
    """Name -> tensor of a checkpoint, its layers counted from `shift`. UserError if layers are missing."""
    rename = storage.gpt2_key if config.get("model_type") == "gpt2" else str
    found, numbers = {}, set()
    for stored_name, tensor in storage.read_tensors(path, stem).items():
        name = rename(stored_name)
        match = LAYER.match(name or "")
        if match:
            numbers.add(int(match[2]))
            name = f"{match[1]}{int(match[2]) + shift}.{match[3]}"
        if name and not (match and int(match[2]) >= n_layer):  # beyond: predicts several tokens at once
            found[name] = narrow(name, tensor, width)
    if not numbers >= set(range(n_layer)):
        raise UserError(f"{path}: the tensors have layers {sorted(numbers)}, but config.json says {n_layer}")
    for number in sorted(numbers - set(range(n_layer))):
        print(f"left out: layer {number}, which lies beyond the {n_layer} of config.json")
    return found


def lineage_of(reference, layers, parts="", moments=False, top="", top_layers="", width=1.0) -> dict:
    """What decides the inherited tensors, for lineage.json. The layers of `top` follow the reference's."""
    path, config, n_layer, chosen = open_source(reference, layers)
    lineage = {"reference": str(reference), "sha256": storage.hashes(path)}
    lineage |= {"parts": parts or "all", "moments": moments} | ({"width": width} if width < 1 else {})
    if top:
        top_path, top_config, _, on_top = open_source(top, top_layers)
        alike = [key for key in ("model_type", "n_embd", "hidden_size", "layer_types") if key in config]
        if any(config[key] != top_config.get(key) for key in alike):
            raise UserError(f"{top} cannot go on top of {reference}: different {' or '.join(alike)}")
        chosen = chosen + [n_layer + layer if layer is not None else None for layer in on_top]
        lineage["top_sha256"] = storage.hashes(top_path)
    return lineage | {"layers": chosen}


def inherit(reference, layers, out, parts="", moments=False, top="", top_layers="", width=1.0, seed=1337):
    """Write the target to `out`; print where its layers came from; see InheritConfig. UserError."""
    path, config, n_layer, _ = open_source(reference, layers)
    above = open_source(top, top_layers)[:3] if top else None  # its layers are counted from n_layer
    lineage = lineage_of(reference, layers, parts, moments, top, top_layers, width)
    chosen, is_gpt2 = lineage["layers"], config.get("model_type") == "gpt2"
    kept = parts.split(",") if parts else BLOCK_PARTS
    heads = width * config.get("n_head", 0)
    for_gpt2 = parts or width < 1
    if not set(kept) <= set(BLOCK_PARTS) or not 0 < width <= 1 or heads % 1 or (for_gpt2 and not is_gpt2):
        expected = f"parts of {', '.join(BLOCK_PARTS)} and a width with a whole number of heads, of a GPT-2"
        raise UserError(f"found parts {parts!r}, width {width}, {heads} heads; expected {expected}")
    if config.get("scale_attn_by_inverse_layer_idx") and chosen != list(range(len(chosen))):
        print("warning: layer i divides its attention logits by i + 1, so a moved layer computes differently")

    def target_tensors(stem: str, fresh: dict) -> tuple[dict, dict]:
        """Target name -> tensor, and target name -> where it came from."""
        source = source_tensors(path, config, n_layer, stem, width)
        more = source_tensors(*above, stem, shift=n_layer) if above else {}
        source |= {name: tensor for name, tensor in more.items() if LAYER.match(name)}
        tensors, origin = {}, {}
        for name, source_name in take_layers(source, chosen).items():
            match = LAYER.match(name)
            if source_name is None or (parts and match and match[3].split(".")[0] not in kept):
                is_weight = stem == "model"  # a fresh weight has no moments yet
                shape_of = source[source_name or LAYER.sub(r"\g<1>0.\3", name)]
                tensors[name] = fresh[name].to(shape_of.dtype) if is_weight else torch.zeros_like(shape_of)
                origin[name] = f"fresh, seed {seed}"
                continue
            tensor = source[source_name]
            tensors[name] = tensor.clone() if source_name in origin.values() else tensor  # taken twice
            origin[name] = source_name
        return tensors, origin

    with storage.publish(out) as directory:
        storage.write_json(directory / "config.json", sliced_config(config, chosen, n_layer, width))
        fresh = {}
        if parts or None in chosen:
            from plumbing import checkpoint  # imported here: only fresh layers need a model

            torch.manual_seed(seed)
            fresh = checkpoint.hf_tensors(checkpoint.load_model(directory, fresh=True))
        weights, origin = target_tensors("model", fresh)
        storage.check_finite(path, weights)
        save_torch_state_dict(weights, directory, max_shard_size="5GB")
        if moments:
            save_file(target_tensors("optimizer", {})[0], directory / "optimizer.safetensors")
        storage.write_json(directory / "lineage.json", lineage | {"tensors": origin})
        storage.copy_tokenizer(path, directory)
        if not is_gpt2 and importlib.util.find_spec("transformers"):
            from plumbing import decoders

            decoders.check_opens(directory, out)
    rows = {}  # a line for each layer, and for each tensor outside the layers
    for name, source in origin.items():
        rows.setdefault(LAYER.sub(r"\1\2", name), {})[LAYER.sub(r"\1\2", source)] = True
    for name, sources in rows.items():
        print(f"  {name:28s} <- {' + '.join(sources)}")
    print(f"{out}: {sum(tensor.numel() for tensor in weights.values()):,} parameters stored")
    return Path(out).expanduser()


def main():
    inherit(**vars(configurator.load(InheritConfig)))


if __name__ == "__main__":
    configurator.run(main)
