"""Inheritune, the whole recipe: reference, analysis, rounds of inherit and train, the arms beside it, the report.

    python inheritune.py config/demo.toml                                    # minutes on a laptop's CPU
    python inheritune.py config/demo.toml --out_dir=out/mine --max_steps=600   # any setting of train.py
    torchrun --standalone --nproc_per_node=4 inheritune.py config/demo.toml --micro_batch=8

Kill it and start it again: each stage that is complete is skipped, a run goes on from its last checkpoint.
Every model of one seed sees the same tokens in the same order, and all see the same validation windows.

An arm is one model to compare, one table [[inheritune.arms]] of the preset; every baseline and ablation of the paper
is one or two of these. Its layers are taken from a source as inherit.py takes them, with k for the target's number of
layers and n for the reference's: "0:k", "n-k:n", "0:k/2,0:k/2" (/ rounds down). Without layers it begins at random.
"""

import contextlib
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import tyro

import checkpoint
import configurator
import data
import storage
from analyze_attention import AnalyzeConfig, analyze, print_table
from configurator import UserError
from inherit import inherit, parse_layers
from machine import on_rank_0, pick_device, process_group, versions, watch_signals
from model import GPTConfig
from report import paired_difference, report, verdict
from train import TrainConfig, train


@dataclass
class Arm:
    """One model to compare with the target."""

    name: str
    layers: str = ""  # layers of the source, such as "0:k"; none: random weights
    source: str = "reference"  # or "target", the name of an arm above, a checkpoint or a name on the hub
    inherit_from: Literal["last", "stable"] | None = None  # checkpoint of the source; None: as the recipe's rounds
    moments: bool | None = None  # of AdamW, with the weights; None: as the recipe's rounds
    parts: str = ""  # of each layer: attn, mlp, ln, comma between; none: all
    top: str = ""  # as source: of whom top_layers are put on top
    top_layers: str = ""
    n_layer: int | str = "k"  # of random weights, such as "n" or "k/2"
    teacher: str = ""  # as source: to distil
    steps: float = 1.0  # times max_steps
    seeds: int | None = None  # it is trained with so many of the recipe's seeds; None: with all
    settings: dict[str, Any] = field(default_factory=dict)  # of train.py, where they differ: {n_embd = 64, lr = 1e-3}


@dataclass
class Claim:
    """A sentence of the paper, to be held against two models: their arms' names, or "reference" or "target"."""

    text: str
    better: str
    worse: str


@dataclass
class RecipeConfig(TrainConfig):
    """Run or resume the whole recipe into out_dir. The settings of train.py are the reference's and every arm's."""

    start_layers: int | Literal["auto"] | None = None  # k of the first round; None: n/2; auto: up to the lazy tail
    expand_by: int = 2  # layers that each further round adds
    expand_from: Literal["reference", "target"] = "reference"  # target: keep its trained layers and add to these
    inherit_from: Literal["last", "stable"] = "last"  # stable: before the decay of a "wsd" reference; no new warm-up
    moments: bool = False  # inherit AdamW's state with the weights
    tolerance: float = 0.0  # nats: matched if the mean loss is at most this much above the reference's
    seeds: list[int] = field(default_factory=list)  # the whole comparison with each of these; none: with seed
    sequences: int = 16  # validation windows for the attention analysis
    arms: tyro.conf.Suppress[list[Arm]] = field(default_factory=list)  # in the preset: [[inheritune.arms]]
    claims: tyro.conf.Suppress[list[Claim]] = field(default_factory=list)  # in the preset: [[inheritune.claims]]

    def __post_init__(self):
        super().__post_init__()
        n = GPTConfig.n_layer if self.n_layer is None else self.n_layer
        for key, most in (("start_layers", n), ("expand_by", n), ("sequences", 10**6)):
            value = getattr(self, key)
            if value not in (None, "auto") and not 1 <= value <= most:
                raise UserError(f"{key} is {value}, expected 1 to {most}")
        if not math.isfinite(self.tolerance):
            raise UserError(f"tolerance is {self.tolerance}, expected a finite number of nats")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds {self.seeds}: each once")
        if self.inherit_from == "stable" and self.schedule != "wsd":
            raise UserError('inherit_from = "stable" needs schedule = "wsd"')
        if self.init_from != "scratch" or self.eval_only or self.override or self.teacher:
            raise UserError("init_from, eval_only, override and teacher are for train.py or, the last, for an arm")
        known = ["reference", "target"]
        for arm in self.arms:
            check_arm(arm, known, self, n)
            known.append(arm.name)
        for claim in self.claims:
            for name in (claim.better, claim.worse):
                configurator.check_key(name, known, f"claim {claim.text!r}")


def check_arm(arm: Arm, above: list[str], config: RecipeConfig, n: int):
    """Raise UserError for an arm that could not be trained, before hours are spent on those above it."""
    where = f"arm {arm.name!r}"
    if slug(arm.name) in {"", *map(slug, above)}:
        raise UserError(f"{where}: each arm needs a name of its own, of letters or digits")
    for key in ("source", "teacher", "top"):
        name = getattr(arm, key)
        if name and name not in above and not Path(name).exists() and "/" not in name and not name.startswith("gpt2"):
            raise UserError(f"{where}: {key} {name!r} is neither an arm above it ({', '.join(above)}) nor a checkpoint")
    if arm.steps <= 0 or (arm.seeds is not None and not 1 <= arm.seeds <= max(1, len(config.seeds))):
        raise UserError(f"{where}: steps {arm.steps}, seeds {arm.seeds}; expected more than 0, and 1 to all seeds")
    k = config.start_layers if isinstance(config.start_layers, int) else max(1, n // 2)
    for text in (arm.layers, arm.top_layers, str(arm.n_layer)):
        with_numbers(text, k, n)
    if arm.layers and arm.source == "reference":
        parse_layers(with_numbers(arm.layers, k, n), n)
    configurator.from_table(TrainConfig, settings_of(config, arm, config.seed), where)


def with_numbers(text: str, k: int, n: int) -> str:
    """Layers with numbers for k and n: "n-k:n" with k = 4, n = 12 is "8:12". Raises UserError."""
    if not re.fullmatch(r"[\dkn()+*/:, -]*", text):
        raise UserError(f"layers {text!r}: expected numbers, k, n and + - * / between the colons and commas of slices")
    try:  # nothing but arithmetic got here
        terms = re.split(r"([:,])", text.replace(" ", "").replace("/", "//"))
        return "".join(str(eval(term, {}, {"k": k, "n": n})) if re.search(r"\w", term) else term for term in terms)
    except (SyntaxError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"layers {text!r}: {error}") from None


def slug(name: str) -> str:
    """An arm's name as a part of a directory's."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def settings_of(config: RecipeConfig, arm: Arm, seed: int) -> dict:
    """What train.py is given for an arm, but where it begins and ends."""
    settings = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
    stable = arm.layers and (arm.inherit_from or config.inherit_from) == "stable"
    steps = {"max_steps": max(1, round(arm.steps * config.max_steps))}
    return settings | {"seed": seed} | steps | ({"warmup_steps": 0} if stable else {}) | arm.settings


class Seed:
    """The models of one seed: those made so far, by name, as the directories of their runs."""

    def __init__(self, config: RecipeConfig, seed: int):
        self.config, self.seed = config, seed
        self.out_dir = Path(config.out_dir) / f"seed-{seed}" if config.seeds else Path(config.out_dir)
        self.runs: dict[str, Path] = {}

    def find(self, name: str, inherit_from: str = "last") -> Path:
        """The checkpoint that an arm's source, teacher or top stands for."""
        if name not in self.runs:
            return storage.resolve(name)
        if inherit_from == "stable":
            return checkpoint.last_stable(self.runs[name])
        return storage.latest(self.runs[name])

    def train(self, arm: Arm, directory: str, k: int, n: int) -> Path:
        """Inherit and train one model, as far as that is not done; its last checkpoint."""
        out_dir = self.out_dir / directory
        changes = {"out_dir": str(out_dir), "resume": "auto"}
        if arm.layers:
            inherit_from = arm.inherit_from or self.config.inherit_from
            moments = self.config.moments if arm.moments is None else arm.moments
            how = {"parts": arm.parts, "moments": moments, "seed": self.seed}
            if arm.top:
                how |= {"top": self.find(arm.top, inherit_from), "top_layers": with_numbers(arm.top_layers, k, n)}
            on_rank_0(inherit_once, self.find(arm.source, inherit_from), with_numbers(arm.layers, k, n), out_dir, how)
            changes |= {"init_from": str(out_dir / "init"), "n_layer": None}
        else:
            changes |= {"n_layer": int(with_numbers(str(arm.n_layer), k, n))}
        if arm.teacher:
            changes |= {"teacher": str(self.find(arm.teacher))}
        path = train(TrainConfig(**settings_of(self.config, arm, self.seed) | changes))
        self.runs[arm.name] = out_dir
        return path


def recipe(config: RecipeConfig):
    """Every stage in order, each for every seed; what is complete is skipped. Raises UserError."""
    out_dir = Path(config.out_dir)
    seeds = [Seed(config, seed) for seed in config.seeds or [config.seed]]
    n = GPTConfig.n_layer if config.n_layer is None else config.n_layer
    models = []

    def compare(name: str, role: str, paths: list[Path]):
        models.append({"name": name, "role": role, "paths": [str(path.relative_to(out_dir)) for path in paths]})

    def write_report():
        made_by = versions(pick_device(config.device)) | {"seeds": config.seeds or [config.seed]}
        claims = [vars(claim) for claim in config.claims]
        content = {"models": models, "tolerance": config.tolerance, "claims": claims, "made_by": made_by}
        storage.replace_json(out_dir / "recipe.json", content)
        return report(out_dir)

    # ---- reference
    references = [seed.train(Arm("reference", n_layer=n), "reference", n, n) for seed in seeds]
    attention = on_rank_0(measure_attention, config, references[0])
    compare("reference", "reference", references)

    # ---- rounds: inherit, train, expand
    k = max(1, n // 2) if config.start_layers is None else config.start_layers
    if k == "auto":
        k = attention["layers_before_lazy_tail"]
        on_rank_0(print, f"the lazy tail of the reference begins at layer {k} of {n}, so k = {k}")
    grown = None  # the number of layers of the last round's target
    while True:
        arm = Arm("target", layers=f"0:{k}")
        if grown and config.expand_from == "target":
            arm = Arm("target", ":", "target", "last", top="reference", top_layers=f"{grown}:{k}")
        targets = [seed.train(arm, f"inherited-{k}", k, n) for seed in seeds]
        difference, interval = paired_difference(targets, references)
        compare(f"inherited, {k} layers", "round", targets)
        on_rank_0(
            print,
            f"round k = {k}: {difference:+.4f} ± {interval:.4f} nats to the reference: "
            f"{verdict(difference, interval, config.tolerance)}",
        )
        if difference <= config.tolerance or k == n:
            break
        grown, k = k, min(k + config.expand_by, n)
    models[-1]["role"] = "target"
    on_rank_0(measure_attention, config, targets[0])
    text = on_rank_0(write_report)  # and again after each arm: what there is can be read, whatever comes

    # ---- arms
    for arm in config.arms:
        paths = [seed.train(arm, f"arm-{slug(arm.name)}-{k}", k, n) for seed in seeds[: arm.seeds]]
        compare(arm.name, "arm", paths)
        text = on_rank_0(write_report)
    on_rank_0(print, text)


def measure_attention(config: RecipeConfig, model: Path) -> dict:
    """The attention analysis of a model, made unless that was done with the same weights and settings."""
    out = model.parent / "attention"
    settings = {"sequences": config.sequences, "data_dir": config.data_dir, "device": config.device}
    with contextlib.suppress(UserError):  # not there, or not whole
        found = storage.read_json(out / "attention.json")
        same = {
            "sha256": storage.TensorFiles(model).sha256(),
            "data_sha256": data.read_meta(config.data_dir)["splits"]["val"]["sha256"],
            "sequences_asked": config.sequences,
        }
        if all(found.get(key) == value for key, value in same.items()):
            return found
    result = analyze(AnalyzeConfig(str(model), out=str(out), **settings))
    print_table(result)
    return result


def inherit_once(source: Path, layers: str, out_dir: Path, how: dict):
    """Inherit into out_dir/init, unless that was done. Raises UserError if it was done from other weights."""
    out = out_dir / "init"
    if not out.exists():
        inherit(source, layers, out, **how)
    elif checkpoint.read_lineage(out).get("sha256") != storage.TensorFiles(source).sha256():
        raise UserError(f"{out} was inherited from another model than {source}; remove {out_dir}")


def main():
    watch_signals()
    config = configurator.load(RecipeConfig)
    with process_group():
        recipe(config)


if __name__ == "__main__":
    configurator.run(main)
