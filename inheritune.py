"""Inheritune, the whole recipe: reference, analysis, rounds of inherit and train, the arms beside it, the report.

    python inheritune.py config/demo.toml                                    # minutes on a laptop's CPU
    python inheritune.py config/demo.toml --out_dir=out/mine --max_steps=600   # any setting of train.py
    torchrun --standalone --nproc_per_node=8 inheritune.py config/demo.toml

Kill it and start it again: each stage that is complete is skipped, a run goes on from its last checkpoint.
Every model sees the same tokens in the same order and the same validation windows.
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch.distributed as dist
import tyro

import checkpoint
import configurator
import storage
from analyze_attention import AnalyzeConfig, analyze, print_table
from configurator import UserError
from inherit import inherit
from machine import on_rank_0, watch_signals
from report import paired_difference, report, verdict
from train import TrainConfig, train


@dataclass
class Arm:
    """A model to compare with the target: the same number of layers, random weights."""

    name: str
    step_factor: int = 1  # its steps, as a multiple of max_steps


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
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names) or self.expand_by < 1 or self.init_from != "scratch" or self.eval_only:
            raise UserError(
                f"arms {names}, expand_by {self.expand_by}, init_from {self.init_from!r}, eval_only {self.eval_only}; "
                "expected different names, at least 1, 'scratch' and False"
            )


def recipe(config: RecipeConfig):
    """Every stage in order; each is skipped if it is complete. Raises UserError."""
    out_dir = Path(config.out_dir)

    def run(name: str, **changes) -> Path:
        """Train, resume or skip one model with the preset's settings and these changes; its last checkpoint."""
        settings = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
        return train(TrainConfig(**settings | {"out_dir": str(out_dir / name), "resume": "auto"} | changes))

    def measure_attention(model: Path, name: str):
        out = out_dir / "attention" / name
        if not (out / "attention.json").exists():
            settings = {"sequences": config.sequences, "data_dir": config.data_dir, "device": config.device}
            print_table(analyze(AnalyzeConfig(str(model), out=str(out), **settings)))

    def inherit_once(reference: Path, layers: str, out: Path):
        if not out.exists():
            inherit(reference, layers, out)

    # ---- reference
    reference = run("reference")
    on_rank_0(measure_attention, reference, "reference")
    n_layer = checkpoint.read_config(reference).n_layer
    models = [{"name": "reference", "role": "reference", "path": str(reference.relative_to(out_dir))}]

    # ---- rounds: inherit, train, expand
    k = n_layer // 2 if config.start_layers is None else config.start_layers
    if not 1 <= k <= n_layer:
        raise UserError(f"start_layers is {k}, expected 1 to {n_layer}, the reference's layers")
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
    on_rank_0(measure_attention, target, "target")

    # ---- arms: the target's size
    for arm in config.arms:
        slug = "-".join(re.findall(r"\w+", arm.name.lower()))
        path = run(f"{slug}-{k}", n_layer=k, max_steps=arm.step_factor * config.max_steps)
        models.append({"name": f"{arm.name}, {k} layers", "role": "arm", "path": str(path.relative_to(out_dir))})

    # ---- report
    def finish():
        storage.write_json(out_dir / "recipe.json", {"models": models, "tolerance": config.tolerance})
        report(out_dir)

    on_rank_0(finish)


def main():
    watch_signals()
    config = configurator.load(RecipeConfig)
    try:
        recipe(config)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    configurator.run(main)
