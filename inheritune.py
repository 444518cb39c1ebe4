"""Inheritune, the whole recipe: reference, analysis, rounds of inherit and train, the arms beside it, the report.

    python inheritune.py config/demo.toml                                    # minutes on a laptop's CPU
    python inheritune.py config/demo.toml --out_dir=out/mine --max_steps=600   # any setting of train.py
    torchrun --standalone --nproc_per_node=4 inheritune.py config/demo.toml --micro_batch=8

Kill it and start it again: each stage that is complete is skipped, a run goes on from its last checkpoint.
Every model of one seed sees the same tokens in the same order, and all see the same validation windows.
"""

import contextlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

import checkpoint
import configurator
import data
import storage
from analyze_attention import LONGEST, AnalyzeConfig, analyze, print_table
from arms import Arm, Checker, Claim, settings_of, slug, with_numbers
from attention import longest_sequence
from configurator import UserError
from inherit import identity, inherit, open_sources
from machine import on_rank_0, process_group, watch_signals
from model import GPTConfig
from report import paired_difference, report, verdict
from train import TrainConfig, train


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
        if len(set(self.seeds)) < len(self.seeds) or not all(0 <= seed < 2**32 for seed in self.seeds):
            raise UserError(f"seeds {self.seeds}: expected each once, from 0 to {2**32 - 1}")
        if self.inherit_from == "stable" and self.schedule != "wsd":
            raise UserError('inherit_from = "stable" needs schedule = "wsd"')
        if self.init_from != "scratch" or self.eval_only or self.override or self.teacher:
            raise UserError("init_from, eval_only, override and teacher are for train.py or, the last, for an arm")
        checker = Checker(self, n)
        for arm in self.arms:
            checker.check(arm)
        for claim in self.claims:
            for name in (claim.better, claim.worse):
                configurator.check_key(name, checker.known, f"claim {claim.text!r}")


class Models:
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

    def make(self, arm: Arm, directory: str, k: int, n: int) -> Path:
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
    models = [Models(config, seed) for seed in config.seeds or [config.seed]]
    n = GPTConfig.n_layer if config.n_layer is None else config.n_layer
    compared = []

    def compare(name: str, role: str, paths: list[Path]):
        compared.append({"name": name, "role": role, "paths": [str(path.relative_to(out_dir)) for path in paths]})

    def write_report():
        claims = [vars(claim) for claim in config.claims]
        content = {"models": compared, "tolerance": config.tolerance, "claims": claims}
        storage.replace_json(out_dir / "recipe.json", content)
        return report(out_dir)

    # ---- reference
    references = [each.make(Arm("reference", n_layer=n), "reference", n, n) for each in models]
    attention = on_rank_0(measure_attention, config, references[0])
    compare("reference", "reference", references)

    # ---- rounds: inherit, train, expand
    k = max(1, n // 2) if config.start_layers is None else config.start_layers
    if k == "auto":
        before_lazy_tail = attention["layers_before_lazy_tail"]
        k = before_lazy_tail if before_lazy_tail < n else max(1, n // 2)
        on_rank_0(print, f"the reference has {n - before_lazy_tail} lazy layers at its end, so k = {k} of {n}")
    grown = None  # the number of layers of the last round's target
    while True:
        arm = Arm("target", layers=f"0:{k}")
        if grown and config.expand_from == "target":
            arm = Arm("target", layers=":", source="target", top="reference", top_layers=f"{grown}:{k}")
        targets = [each.make(arm, f"inherited-{k}", k, n) for each in models]
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
    compared[-1]["role"] = "target"
    on_rank_0(measure_attention, config, targets[0])
    # there is a report from here on, whatever comes; what was finished before is not to be missed in it for a while
    on_rank_0(lambda: (out_dir / "recipe.json").exists() or write_report())

    # ---- arms
    for arm in config.arms:
        directory, some = f"arm-{slug(arm.name)}-{k}", models[: arm.seeds]
        before = [storage.latest(each.out_dir / directory) for each in some]
        paths = [each.make(arm, directory, k, n) for each in some]
        compare(arm.name, "arm", paths)
        on_rank_0(lambda: paths == before or write_report())  # noqa: B023
    on_rank_0(lambda: print(write_report()))


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
            "T": min(longest_sequence(model), LONGEST),
            "tau": AnalyzeConfig.tau,
            "average_first": False,
            "lazy_below": AnalyzeConfig.lazy_below,
        }
        if found.get("untrained") and all(found.get(key) == value for key, value in same.items()):
            return found
    result = analyze(AnalyzeConfig(str(model), out=str(out), **settings))
    print_table(result)
    return result


def inherit_once(source: Path, layers: str, out_dir: Path, how: dict):
    """Inherit into out_dir/init, unless that was done. Raises UserError if it was done otherwise."""
    out = out_dir / "init"
    if not out.exists():
        inherit(source, layers, out, **how)
        return
    found, asked = checkpoint.read_lineage(out), identity(open_sources(source, layers, **how), **how)
    names = {"sha256": "source", "top_sha256": "top"}
    differ = [names.get(key, key) for key in asked if found.get(key) != asked[key]]
    if differ:
        raise UserError(f"{out} was made with another {', '.join(differ)}; remove {out_dir} to make it anew")


def main():
    watch_signals()
    config = configurator.load(RecipeConfig)
    with process_group():
        recipe(config)


if __name__ == "__main__":
    configurator.run(main)
