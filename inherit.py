"""Take layers out of a decoder checkpoint: the one primitive that every arm of the paper is made of.

    python inherit.py --reference=out/demo/reference --layers=0:4 --out=out/half       # Inheritune: the first half
    python inherit.py --reference=gpt2-medium --layers=0:12 --out=out/medium-12        # from the hub
    python inherit.py --reference=gpt2-medium --layers=::2 --out=out/every-other       # as DistilGPT2 begins
    python inherit.py --reference=gpt2-medium --layers=0:16 --parts=attn --out=out/attention-only
    python inherit.py --reference=out/half --layers=: --top=out/demo/reference --top_layers=4:6 --out=out/grown

--layers lists source layers, one per layer of the target, as Python slices from 0, half-open: "0:8,0:8" stacks.
Everything outside the layers (embeddings, positions, final norm, head) is always taken. It renames tensors and
builds no model, so any Hugging Face decoder will do (GPT-2, Llama, Qwen, ...; sharded too), in the memory of one
tensor. Only --parts, for GPT-2 alone, draws the rest of each block fresh. lineage.json keeps each tensor's origin.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import configurator
import storage
from configurator import UserError
from model import GPT

LAYER = re.compile(r"^(.*?(?:^|\.)(?:h|layers|blocks)\.)(\d+)(\..+)$")  # "transformer.h." "3" ".ln_1.weight"
BLOCK_PARTS = {"attn": ".attn.", "mlp": ".mlp.", "ln": ".ln_"}  # the tensors of a GPT-2 block by --parts


@dataclass
class InheritConfig:
    """Make a smaller (or taller) checkpoint of the layers of another."""

    reference: str  # a checkpoint, a run directory or a name on the hub
    layers: str  # source layers as slices: 0:12 or ::2 or 0:4,0:4 or : for all
    out: str  # directory to write
    parts: str = ""  # GPT-2: take only these of each block (attn, mlp, ln, comma between), draw the rest fresh
    moments: bool = False  # take AdamW's state of the taken tensors too, for train.py to begin with
    top: str = ""  # a second checkpoint of the same width, to put layers of on top of the reference's
    top_layers: str = ""  # which, as slices
    seed: int = 1337  # of what is drawn fresh


def parse_layers(text: str, n_layer: int) -> list[int]:
    """ "0:4,6" of 8 layers -> [0, 1, 2, 3, 6]. Raises UserError for what is empty, negative or out of range."""
    layers = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d*)(:?)(\d*)(?::(\d*))?\s*", item)
        if not match or not item.strip() or (match[2] == "" and match[4] is not None):
            raise UserError(f"layers {text!r}: {item!r} is no slice such as 0:12, ::2 or 3, counted from 0")
        start, stop, stride = int(match[1] or 0), int(match[3] or n_layer), int(match[4] or 1)
        if not match[2]:
            stop = start + 1
        if stop > n_layer or start >= stop or stride == 0:
            raise UserError(
                f"layers {text!r}: {item!r} does not lie in 0:{n_layer}; the reference has {n_layer} layers"
            )
        layers += range(start, stop, stride)
    return layers


@dataclass
class Source:
    """A checkpoint and which of its layers are taken."""

    path: Path
    config: dict  # its config.json
    n_layer: int
    layers: list[int]

    @classmethod
    def open(cls, name: str | Path, layers: str) -> "Source":
        path = storage.resolve(name)
        config = storage.read_json(path / "config.json")
        n_layer = config.get("n_layer") or config.get("num_hidden_layers")
        if not n_layer:
            raise UserError(f"{path}/config.json names neither n_layer nor num_hidden_layers")
        return cls(path, config, n_layer, parse_layers(layers, n_layer))

    def shape(self) -> dict[str, int]:
        """Every whole number of its config but those that count layers."""
        config = sliced_config(self.config, [], self.n_layer)
        return {key: value for key, value in config.items() if isinstance(value, int)}


def plan(names, layers: list[int], n_layer: int, first: int = 0) -> dict[str, str]:
    """Target key -> source key, the layers counted from `first` there.

    Raises UserError unless the source's keys count its layers 0, 1, ..., n_layer - 1.
    """
    matches = {name: LAYER.match(name) for name in names}
    indices = {int(match[2]) for match in matches.values() if match}
    if indices != set(range(n_layer)):
        raise UserError(f"the tensors have layers {sorted(indices)}, but config.json says {n_layer} layers")
    source = {name: name for name, match in matches.items() if not match}
    for target_layer, layer in enumerate(layers, start=first):
        for name, match in matches.items():
            if match and int(match[2]) == layer:
                source[f"{match[1]}{target_layer}{match[3]}"] = name
    return source


def taken(sources: list[Source], stem: str) -> dict[str, tuple[storage.TensorFiles, str, str]]:
    """Target key -> file, name in the file, origin: all of the first source, then the layers of the one on top."""
    found, depth = {}, 0
    for i, source in enumerate(sources):
        stored = storage.TensorFiles(source.path, stem)
        gpt2 = source.config.get("model_type") == "gpt2"
        names = {key: name for name in stored if (key := checkpoint.gpt2_key(name) if gpt2 else name)}
        for key, origin in plan(names, source.layers, source.n_layer, first=depth).items():
            if i == 0 or LAYER.match(key):
                found[key] = (stored, names[origin], "top:" * i + origin)
        depth += len(source.layers)
    return found


def sliced_config(config: dict, layers: list[int], n_layer: int) -> dict:
    """config.json of the target: the number of layers, and the lists that have an entry for each ("layer_types")."""
    per_layer = [k for k, v in config.items() if "layer" in k and isinstance(v, list) and len(v) == n_layer]
    lists = {key: [config[key][i] for i in layers] for key in per_layer}
    return config | lists | {key: len(layers) for key in ("n_layer", "num_hidden_layers") if key in config}


def check_parts(parts: str):
    """Raise UserError unless these are parts of a GPT-2 block, comma between."""
    if set(parts.split(",")) - set(BLOCK_PARTS):
        raise UserError(f"parts {parts!r}; expected some of {', '.join(BLOCK_PARTS)}, comma between, no space")


def open_sources(reference: str | Path, layers: str, top="", top_layers="", **_) -> list[Source]:
    """The reference and, if there is one, the checkpoint on top of it. Raises UserError if they do not fit."""
    if bool(top) != bool(top_layers):
        raise UserError(f"found top {str(top)!r} and top_layers {top_layers!r}; they go together")
    sources = [Source.open(reference, layers)] + ([Source.open(top, top_layers)] if top else [])
    if sources[-1].shape() != sources[0].shape():
        differ = {key for key, _ in sources[-1].shape().items() ^ sources[0].shape().items()}
        raise UserError(f"{top} cannot go on top of {reference}: config.json differs in {', '.join(sorted(differ))}")
    return sources


def identity(sources: list[Source], parts="", moments=False, **_) -> dict:
    """All that decides what is written, but the seed of what is fresh; it stands in lineage.json."""
    found = {
        "sha256": storage.TensorFiles(sources[0].path).sha256(), "parts": parts or "all", "moments": moments,
        "layers": [layer for source in sources for layer in source.layers],
    }  # fmt: skip
    return found | ({"top_sha256": storage.TensorFiles(sources[1].path).sha256()} if len(sources) > 1 else {})


def inherit(
    reference: str | Path, layers: str, out: str | Path, parts="", moments=False, top="", top_layers="", seed=1337
) -> Path:
    """Write the target to `out` and print where each of its layers came from; see InheritConfig. Raises UserError."""
    sources = open_sources(reference, layers, top, top_layers)
    path, chosen = sources[0].path, [layer for source in sources for layer in source.layers]
    config = sliced_config(sources[0].config, chosen, sources[0].n_layer)
    for source in sources:
        if moments and not (source.path / "optimizer.safetensors").is_file():
            raise UserError(f"{source.path} has no optimizer.safetensors, so no moments; leave --moments away")
    source = taken(sources, "model")

    fresh = {}
    if parts:
        check_parts(parts)
        if config.get("model_type") != "gpt2":
            raise UserError(f"parts of a {config.get('model_type')} model; expected gpt2")
        kept = tuple(BLOCK_PARTS[part] for part in parts.split(","))
        torch.manual_seed(seed)
        drawn = checkpoint.hf_tensors(GPT(checkpoint.gpt_config(config, path)))
        fresh = {key: drawn[key] for key in source if LAYER.match(key) and not any(part in key for part in kept)}
    if config.get("scale_attn_by_inverse_layer_idx") and chosen != list(range(len(chosen))):
        print(
            "warning: layer i of this model divides its attention logits by i + 1 "
            "(scale_attn_by_inverse_layer_idx), so a layer that moves to another depth computes something else"
        )

    def read(key: str) -> torch.Tensor:
        if key in fresh:
            return fresh[key]
        stored, name, _ = source[key]
        return stored[name]

    def read_moment(key: str) -> torch.Tensor:
        stored, name, _ = state[key]
        return torch.zeros_like(stored[name]) if key.split("|")[0] in fresh else stored[name]

    origin = {key: f"fresh, seed {seed}" if key in fresh else source[key][2] for key in source}
    lineage = {"reference": str(reference)} | identity(sources, parts, moments)
    lineage["ancestors"] = checkpoint.merged(*(checkpoint.ancestors(source.path) for source in sources))
    lineage["tensors"] = origin
    with storage.publish(out) as directory:
        storage.write_json(directory / "config.json", config)
        sizes = storage.write_tensors(directory / "model.safetensors", source, read)
        if moments:
            state = taken(sources, "optimizer")
            storage.write_tensors(directory / "optimizer.safetensors", state, read_moment)
        storage.write_json(directory / "lineage.json", lineage)
        for pattern in ("*token*", "vocab*", "merges.txt"):  # the tokenizer, where there is one
            for file in path.glob(pattern):
                shutil.copy(file, directory)
    print_lineage(out, origin, len(chosen), sizes)
    return Path(out)


def print_lineage(out: str | Path, origin: dict[str, str], n_layer: int, sizes: dict[str, int]):
    """A line for each layer and each tensor outside the layers: what it is, where from, how many numbers."""
    rows = {}
    for key, source in origin.items():
        match, source_match = LAYER.match(key), LAYER.match(source)
        name = f"{match[1]}{match[2]}" if match else key
        where = f"{source_match[1]}{source_match[2]}" if source_match else source
        wheres, n_params = rows.get(name, (set(), 0))
        rows[name] = (wheres | {where}, n_params + sizes[key])
    table = [(name, " + ".join(sorted(wheres, reverse=True)), n) for name, (wheres, n) in rows.items()]
    left, right = (max(len(row[column]) for row in table) for column in (0, 1))
    for name, where, n_params in table:
        print(f"  {name:{left}s} <- {where:{right}s} {n_params:>13,}")
    print(f"{out}: {n_layer} layers, {sum(row[2] for row in table):,} numbers stored")


def main():
    inherit(**vars(configurator.load(InheritConfig)))


if __name__ == "__main__":
    configurator.run(main)
