"""Inheritune, the whole recipe: reference, analysis, rounds of inherit and train, baselines.

    python inheritune.py config/demo.toml                             # minutes on a laptop's CPU
    python inheritune.py config/single_gpu.toml                       # from a trained model
    torchrun --standalone --nproc_per_node=4 inheritune.py config/demo.toml --micro_batch=8

Rerun the same command to resume: complete stages are skipped. All models of one seed see the same
tokens in the same order, and all are evaluated on the same validation windows.
"""

from plumbing import configurator  # isort: skip  # before the slow imports: a quiet Ctrl-C

import functools
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import data
from analyze_attention import AnalyzeConfig, analyze, stored, suggested_layers
from baselines import PAPER, Plan, baselines
from inherit import InheritConfig, inherit, open_sources
from model import GPTConfig
from plumbing import checkpoint, machine, model_files, pretrained, processes, storage
from plumbing.configurator import UserError
from plumbing.processes import on_rank_0
from report import paired_difference, report, verdict
from train import TrainConfig, stable_steps, train


@dataclass
class RecipeConfig(TrainConfig):
    """Run or resume the recipe into out_dir. The settings of train.py apply to every model."""

    reference: str = ""  # a trained model (checkpoint, run or hub name); empty: train one first
    start_layers: int | Literal["auto"] | None = None  # k at first; None: n/2; auto: by rank
    expand_by: int = 2  # layers that each further round adds (paper, section 4)
    expand_from: Literal["reference", "target", "fresh"] = "reference"  # or add to the target
    tolerance: float = 0.0  # nats per token that the target's loss may be above the reference's
    seeds: list[int] = field(default_factory=list)  # train everything with each; empty: seed
    sequences: int = 100  # N of the attention analysis
    seq_len: int = 100  # T of the attention analysis
    baselines: list[str] = field(default_factory=list)  # names in baselines.py
    once: list[str] = field(default_factory=list)  # more of them, trained with the first seed alone
    paper: str = ""  # results of the paper for the report to print beside (baselines.py:PAPER)

    @functools.cached_property
    def n(self) -> int:
        """Layers of the reference."""
        if self.reference:
            return pretrained.read_config(model_files.resolve(self.reference)).n_layer
        return GPTConfig.n_layer if self.n_layer is None else self.n_layer

    @property
    def first_k(self) -> int:
        return self.start_layers if isinstance(self.start_layers, int) else max(1, self.n // 2)

    def __post_init__(self):
        super().__post_init__()
        self.seeds = list(dict.fromkeys(self.seeds))  # a seed given twice would count twice
        if not 1 <= self.first_k <= self.n:
            raise UserError(f"start_layers is {self.first_k}, expected 1 to {self.n}, the reference's layers")
        for key, least in {"expand_by": 1, "sequences": 1, "max_steps": 1, "seq_len": 2}.items():
            if getattr(self, key) < least:
                raise UserError(f"{key} is {getattr(self, key)}, expected at least {least}")
        if self.init_from != "scratch" or self.override or self.teacher:
            raise UserError("init_from, override and teacher are for train.py")
        if self.reference and self.n_layer not in (None, self.n):
            raise UserError(f"n_layer is {self.n_layer}, but {self.reference} has {self.n} layers")


def round_target(config: RecipeConfig, k: int, previous_k: int | None) -> Plan:
    """The growth rule: what the target of k layers begins with (Inheritune step 3: expand)."""
    if not previous_k or config.expand_from == "reference":  # the reference's first k layers
        return Plan(layers=list(range(k)))
    kept = list(range(previous_k))
    if config.expand_from == "fresh":
        return Plan(layers=[*kept, *[None] * (k - previous_k)], source="target")
    added = list(range(previous_k, k))  # the reference's next layers
    return Plan(layers=kept, source="target", top="reference", top_layers=added)


def wanted(names: list[str], n: int, k: int) -> dict[str, Plan]:
    """The baselines of these names and those that they begin with, in the order of training."""
    known, found = baselines(n, k), {}
    for name in names:
        configurator.check_key(name, known, "baselines.py")
        needs = [known[name].source, known[name].top, known[name].teacher]
        found |= wanted([each for each in needs if each in known], n, k) | {name: known[name]}
    return found


def train_config(config: RecipeConfig, model: Plan, seed: int, out_dir: Path) -> TrainConfig:
    """The settings of train.py for one model of the recipe. Raises UserError if they do not fit."""
    settings = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
    max_steps = max(1, round(model.steps * config.max_steps))
    settings |= {"seed": seed, "max_steps": max_steps, "out_dir": str(out_dir)}
    if model.steps < 1:
        settings["warmup_steps"] = min(config.warmup_steps, max_steps // 2)
    if model.before_decay:
        settings["warmup_steps"] = 0  # it continues at the rate that its source had
    if config.reference:  # fresh models have its shape
        settings |= {"init_from": f"scratch:{config.reference}"}
    if model.width < 1:  # the source's, narrowed
        settings |= {"n_embd": None, "n_head": None}
    if model.teacher:
        settings["min_lr"] = config.lr / 10  # paper, appendix D
    settings |= model.settings | {"n_layer": model.n_layer or None, "resume": "auto"}
    return TrainConfig(**settings)


def check(config: RecipeConfig):
    """Check every model's settings before the first step. Raises UserError."""
    models = {"reference": Plan(n_layer=config.n), "target": Plan(layers=list(range(config.first_k)))}
    models |= wanted(config.baselines + config.once, config.n, config.first_k)
    shapes = {}  # of one layer of each model
    if config.paper:
        configurator.check_key(config.paper, PAPER, "paper")
    base, world_size = GPTConfig(), processes.rank_and_world_size()[1]
    if config.reference:
        base = pretrained.read_config(model_files.resolve(config.reference))
    for name, model in models.items():
        try:
            for seed in config.seeds or [config.seed]:
                settings = train_config(config, model, seed, Path(config.out_dir))
            n_layer = model.n_layer or len(model.layers) + len(model.top_layers)
            options = {f.name: getattr(settings, f.name) for f in fields(GPTConfig)}
            options = {key: value for key, value in options.items() if value is not None}
            shape = replace(base, **options | {"n_layer": n_layer})
            other_family = type(base) is not GPTConfig and (model.parts or model.width < 1)
            if other_family or model.width * shape.n_head % 1:
                raise ValueError("parts and width are for GPT-2, and a width needs whole heads")
            machine.pick_device(settings.device)
            shapes[name] = replace(shape, n_layer=1, dropout=0.0)
            reference = shapes["reference"]
            if (shape.block_size, shape.vocab_size) != (reference.block_size, reference.vocab_size):
                raise ValueError("block_size and vocab_size are not those of the reference")
            sources = [shapes[each] for each in (model.source, model.top) if each and model.layers]
            if model.width == 1 and any(source != shapes[name] for source in sources):
                raise ValueError("its shape is not that of the layers that it takes")
            if bool(model.top) != bool(model.top_layers):
                raise ValueError("top and top_layers go together: set both or neither")
            if model.before_decay and (config.reference or not stable_steps(settings)):
                raise ValueError("its source has no checkpoint before its decay")
            data.accumulation(settings.tokens_per_step, settings.micro_batch, shape.block_size, world_size)
        except (ValueError, TypeError, UserError) as error:  # TypeError: no such setting
            raise UserError(f"{name}: {error}") from None


class Models:
    """The models of one seed: those trained so far, by name, with their settings."""

    def __init__(self, config: RecipeConfig, seed: int):
        self.config, self.seed = config, seed
        self.out_dir = Path(config.out_dir) / (f"seed-{seed}" if config.seeds else "")
        self.settings: dict[str, TrainConfig] = {}

    def find(self, name: str, before_decay: bool = False) -> Path:
        """The checkpoint to inherit from or to distill."""
        settings = self.settings[name]
        step = f"step-{stable_steps(settings):08d}" if before_decay else ""
        return model_files.resolve(Path(settings.out_dir) / step)

    def make(self, name: str, model: Plan, directory: str) -> tuple[Path, list[Path]]:
        """Inherit and train (Inheritune steps 1, 2), once. Returns checkpoint and sources."""
        out_dir, sources = self.out_dir / directory, []
        settings = train_config(self.config, model, self.seed, out_dir)
        if model.layers:
            sources = [self.find(each, model.before_decay) for each in (model.source, model.top) if each]
            how = {"parts": model.parts, "width": model.width}
            if model.top:
                how |= {"top": sources[1], "top_layers": model.top_layers}
            on_rank_0(inherit_once, sources[0], model.layers, out_dir / "init", how, self.seed)
            settings = replace(settings, init_from=str(out_dir / "init"))
        if name == "reference" and self.config.reference:  # saved as a run of no steps
            settings = replace(settings, init_from=self.config.reference, n_layer=None, max_steps=0)
        if model.teacher:
            sources.append(self.find(model.teacher))
            settings = replace(settings, teacher=str(sources[-1]))
        self.settings[name] = settings
        return train(settings), sources


def inherit_once(source: Path, layers: list, out: Path, how: dict, seed: int):
    """Inherit into `out`, once. UserError if it was done from different weights or layers."""
    if not out.exists():
        inherit(source, layers, out, **how, seed=seed)
    asked = checkpoint.identity(open_sources(InheritConfig(source, layers, "", **how))[1])
    found = checkpoint.identity(pretrained.origin(out))
    differ = [key for key in asked | found if found.get(key) != asked.get(key)]
    if differ:
        raise UserError(f"{out} was made with a different {', '.join(differ)}; remove {out.parent}")


def measure(config: RecipeConfig, reference: Path, target: Path | None = None) -> dict:
    """The attention analysis of the reference, and the target's beside it, once."""
    out = (target or reference).parent / "recipe_attention"  # apart from what a user measures
    same = {key: getattr(config, key) for key in ("data_dir", "sequences", "seq_len", "device")}
    settings = AnalyzeConfig(str(reference), str(target or ""), out=str(out), **same)
    return stored(settings) or analyze(settings)


def recipe(config: RecipeConfig):
    """Every stage in order, each for every seed. Complete stages are skipped. Raises UserError."""
    check(config)
    out_dir, n = Path(config.out_dir), config.n
    seeds = [Models(config, seed) for seed in config.seeds or [config.seed]]
    compared = []  # the models of recipe.json

    def make_for(chosen: list[Models], name: str, role: str, model: Plan, directory: str, title: str):
        made = [each.make(name, model, directory) for each in chosen]
        paths = [path for path, _ in made]
        relative = [str(path.relative_to(out_dir)) for path in paths]
        sources = [str(path.relative_to(out_dir)) for path in made[0][1]]
        compared.append({"name": title, "role": role, "paths": relative, "sources": sources})
        return paths

    # ---- the reference; auto: k layers come before its lazy tail (ours; the paper: half)
    references = make_for(seeds, "reference", "reference", Plan(n_layer=n), "reference", "reference")
    k, previous_k = config.first_k, None
    if config.start_layers == "auto":
        by_rank = suggested_layers(on_rank_0(measure, config, references[0]), "lazy")
        k = by_rank if by_rank < n else k  # half, where no layer is lazy
        processes.say(f"by rank, the reference has {n - by_rank} lazy layers at its end: k = {k}")

    # ---- Inheritune: inherit k layers, train, expand until the target matches (algorithm 1)
    while True:
        start = round_target(config, k, previous_k)
        targets = make_for(seeds, "target", "round", start, f"inherited-{k}", f"inherited, {k} layers")
        difference, interval = paired_difference(targets, references)
        result = verdict(difference, interval, config.tolerance)
        processes.say(f"round k = {k}: {difference:+.4f} nats to the reference: {result}")
        if difference <= config.tolerance or k == n:
            break
        previous_k, k = k, min(k + config.expand_by, n)
    compared[-1]["role"] = "target"
    on_rank_0(measure, config, references[0], targets[0])

    # ---- baselines, and the report. A first report is there before the baselines are trained
    def write_report(first: bool):
        if first and (not every or (out_dir / "recipe.json").exists()):  # rank 0 alone looks
            return
        content = {"models": compared, "tolerance": config.tolerance, "paper": config.paper}
        storage.write_json(out_dir / "recipe.json", content)
        report(out_dir)

    always, every = wanted(config.baselines, n, k), wanted(config.baselines + config.once, n, k)
    on_rank_0(write_report, True)
    for name, model in every.items():
        directory = "-".join(name.replace(",", "").lower().split())
        chosen = seeds if name in always else seeds[:1]
        make_for(chosen, name, "baseline", model, f"{directory}-{k}", name)
    on_rank_0(write_report, False)


def main():
    processes.watch_signals()
    config = configurator.load(RecipeConfig)
    with processes.process_group():
        recipe(config)


if __name__ == "__main__":
    configurator.run(main)
