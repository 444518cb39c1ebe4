"""Inheritune, the whole recipe: reference, analysis, rounds of inherit and train, the arms beside it, the report.

    python inheritune.py config/demo.toml                                    # minutes on a laptop's CPU
    python inheritune.py config/demo.toml --out_dir=out/mine --max_steps=600   # any setting of train.py
    torchrun --standalone --nproc_per_node=4 inheritune.py config/demo.toml --micro_batch=8

Kill it and start it again: each stage that is complete is skipped, a run goes on from its last checkpoint.
Every model sees the same tokens in the same order and the same validation windows.
"""

import contextlib
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import tyro

import checkpoint
import configurator
import data
import storage
from analyze_attention import AnalyzeConfig, analyze, print_table
from configurator import UserError
from inherit import inherit
from machine import on_rank_0, pick_device, process_group, versions, watch_signals
from model import GPTConfig
from report import paired_difference, report, verdict
from train import TrainConfig, train


@dataclass
class Arm:
    """A model to compare with the target: the same number of layers, random weights."""

    name: str
    step_factor: int = 1  # its steps, as a multiple of max_steps

    def directory(self, k: int) -> str:
        """Where an arm of k layers is trained, below the recipe's out_dir."""
        return f"arm-{'-'.join(re.findall(r'[a-z0-9]+', self.name.lower()))}-{k}"


@dataclass
class RecipeConfig(TrainConfig):
    """Run or resume the whole recipe into out_dir. The settings of train.py are the reference's and every arm's."""

    start_layers: int | None = None  # k of the first round; None: half of the reference's
    expand_by: int = 2  # layers that each further round adds
    tolerance: float = 0.0  # nats: matched if the mean loss is at most this much above the reference's
    sequences: int = 16  # validation windows for the attention analysis
    arms: tyro.conf.Suppress[list[Arm]] = field(default_factory=list)  # in the preset: [[inheritune.arms]]

    def __post_init__(self):
        super().__post_init__()
        n_layer = GPTConfig.n_layer if self.n_layer is None else self.n_layer
        if self.start_layers is None:
            self.start_layers = max(1, n_layer // 2)
        for key, most in (("start_layers", n_layer), ("expand_by", n_layer), ("sequences", 10**6)):
            if not 1 <= getattr(self, key) <= most:
                raise UserError(f"{key} is {getattr(self, key)}, expected 1 to {most}")
        if not math.isfinite(self.tolerance):
            raise UserError(f"tolerance is {self.tolerance}, expected a finite number of nats")
        directories = [arm.directory(0) for arm in self.arms]
        if len(set(directories)) < len(directories) or "arm--0" in directories:
            names = [arm.name for arm in self.arms]
            raise UserError(f"arms {names}: each needs a name of its own, of letters or digits")
        if any(arm.step_factor < 1 for arm in self.arms):
            raise UserError("step_factor of an arm is below 1, expected 1 or more")
        if self.init_from != "scratch" or self.eval_only or self.override:
            raise UserError("a recipe trains all its models alike: init_from, eval_only and override are for train.py")


def recipe(config: RecipeConfig):
    """Every stage in order; each is skipped if it is complete. Raises UserError."""
    out_dir = Path(config.out_dir)

    def run(name: str, **changes) -> Path:
        """Train, resume or skip one model with the preset's settings and these changes; its last checkpoint."""
        settings = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
        return train(TrainConfig(**settings | {"out_dir": str(out_dir / name), "resume": "auto"} | changes))

    # ---- reference
    reference = run("reference")
    on_rank_0(measure_attention, config, reference)
    models = [{"name": "reference", "role": "reference", "path": str(reference.relative_to(out_dir))}]

    # ---- rounds: inherit, train, expand
    n_layer, k = checkpoint.read_config(reference).n_layer, config.start_layers
    while True:
        init = out_dir / f"inherited-{k}" / "init"
        on_rank_0(inherit_once, reference, f"0:{k}", init)
        target = run(f"inherited-{k}", n_layer=k, init_from=str(init))
        difference, interval = paired_difference(target, reference)
        matched = difference <= config.tolerance
        models.append({"name": f"inherited, {k} layers", "role": "round", "path": str(target.relative_to(out_dir))})
        on_rank_0(
            print,
            f"round k = {k}: {difference:+.4f} ± {interval:.4f} nats to the reference: "
            f"{verdict(difference, interval, config.tolerance)}",
        )
        if matched or k == n_layer:
            break
        k = min(k + config.expand_by, n_layer)
    models[-1]["role"] = "target"
    on_rank_0(measure_attention, config, target)

    # ---- arms: the target's size
    for arm in config.arms:
        path = run(arm.directory(k), n_layer=k, max_steps=arm.step_factor * config.max_steps)
        models.append({"name": f"{arm.name}, {k} layers", "role": "arm", "path": str(path.relative_to(out_dir))})

    # ---- report
    def finish():
        made_by = versions(pick_device(config.device)) | {"seed": config.seed}
        content = {"models": models, "tolerance": config.tolerance, "made_by": made_by}
        storage.replace_json(out_dir / "recipe.json", content)
        report(out_dir)

    on_rank_0(finish)


def measure_attention(config: RecipeConfig, model: Path):
    """Analyze the attention of a model, unless that was done with the same weights and settings."""
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
            return
    print_table(analyze(AnalyzeConfig(str(model), out=str(out), **settings)))


def inherit_once(reference: Path, layers: str, out: Path):
    """Inherit, unless that was done. Raises UserError if it was done from another reference than the present one."""
    if not out.exists():
        inherit(reference, layers, out)
    elif checkpoint.read_lineage(out).get("sha256") != storage.TensorFiles(reference).sha256():
        raise UserError(f"{out} was inherited from another reference than {reference}; remove {out.parent}")


def main():
    watch_signals()
    config = configurator.load(RecipeConfig)
    with process_group():
        recipe(config)


if __name__ == "__main__":
    configurator.run(main)
