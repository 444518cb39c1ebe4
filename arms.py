"""The models that a recipe compares: what an arm or a claim of a preset may say, checked before hours are spent.

    python inheritune.py config/study_cpu.toml    # 27 arms, 21 claims
    python -c "import arms; print(arms.with_numbers('n-k:n', k=4, n=12))"

An arm is one model, one table [[inheritune.arms]] of the preset; every baseline and ablation of the paper is one or
two of these. Its layers are taken from a source as inherit.py takes them, with k for the target's number of layers
and n for the reference's: "0:k", "n-k:n", "0:k/2,0:k/2" (/ rounds down). Without layers it begins at random.
"""

import math
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import checkpoint
import configurator
import storage
from configurator import UserError
from inherit import check_parts, parse_layers
from train import TrainConfig


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
    """A sentence to be held against two models: their arms' names, or "reference" or "target"."""

    text: str
    better: str
    worse: str


WITH_LAYERS = ("inherit_from", "moments", "parts", "top")  # mean nothing without
SHAPE = ("n_head", "n_embd", "bias", "scale_attn_by_inverse_layer_idx")  # comes with inherited layers
NOT_AN_ARM_S = {  # settings that the recipe sees to, or that have to be the same for a comparison
    "out_dir", "data_dir", "init_from", "resume", "override", "eval_only", "n_layer", "block_size", "vocab_size",
    "max_steps", "seed", "teacher", "eval_interval",
}  # fmt: skip


def with_numbers(text: str, k: int, n: int) -> str:
    """Layers with numbers for k and n: "n-k:n" with k = 4, n = 12 is "8:12". Raises UserError."""
    plain = text.replace(" ", "").replace("//", "/")
    if not re.fullmatch(r"[\dkn()+*/:,-]*", plain) or "**" in plain:
        raise UserError(f"layers {text!r}: expected numbers, k, n and + - * / between the colons and commas of slices")
    try:  # nothing but arithmetic got here
        terms = re.split(r"([:,])", plain.replace("/", "//"))
        return "".join(str(eval(term, {}, {"k": k, "n": n})) if re.search(r"\w", term) else term for term in terms)
    except (SyntaxError, TypeError, ZeroDivisionError):
        raise UserError(f"layers {text!r}: no arithmetic that has a result") from None


def slug(name: str) -> str:
    """An arm's name as a part of a directory's."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def settings_of(config, arm: Arm, seed: int) -> dict:
    """What train.py is given for an arm of a recipe, but where it begins and ends."""
    settings = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
    settings |= {"seed": seed, "max_steps": max(1, round(arm.steps * config.max_steps))}
    if arm.layers and (arm.inherit_from or config.inherit_from) == "stable":
        settings["warmup_steps"] = 0  # it goes on at the rate that the source had
    return settings | arm.settings


class Checker:
    """Check the arms of a recipe in their order, for its first k; each is known to those below it."""

    def __init__(self, config, n: int):
        self.config, self.n = config, n
        self.k = config.start_layers if isinstance(config.start_layers, int) else max(1, n // 2)
        shared = settings_of(config, Arm("reference"), config.seed)
        self.known = {"reference": (n, shared), "target": (self.k, shared)}  # name -> depth, settings

    def check(self, arm: Arm):
        """Raise UserError for an arm that could not be trained, or in which something would be passed over."""
        try:
            self.known[arm.name] = self.depth(arm), settings_of(self.config, arm, self.config.seed)
            configurator.from_table(TrainConfig, self.known[arm.name][1], "its settings")
        except UserError as error:
            raise UserError(f"arm {arm.name!r}: {error}") from None

    def depth(self, arm: Arm) -> int:
        """The number of layers of an arm, after all that can be wrong with it."""
        if slug(arm.name) in {"", *map(slug, self.known)}:
            raise UserError("each arm needs a name of its own, of letters or digits")
        if not 0 < arm.steps < math.inf or not 1 <= (arm.seeds or 1) <= max(1, len(self.config.seeds)):
            raise UserError(f"steps {arm.steps}, seeds {arm.seeds}; expected more than 0, and 1 to all seeds")
        refused = [key for key in arm.settings if key in NOT_AN_ARM_S or (arm.layers and key in SHAPE)]
        if refused:
            raise UserError(f"settings cannot have {', '.join(refused)}: the recipe or the source decides that")
        self.of(arm.teacher or "reference", "teacher")
        if not arm.layers:
            idle = [key for key in WITH_LAYERS if getattr(arm, key)] + ["source"] * (arm.source != "reference")
            if idle:
                raise UserError(f"found {', '.join(idle)} but no layers; say which, such as 0:k")
            depth = with_numbers(str(arm.n_layer), self.k, self.n)
            if not re.fullmatch(r"[1-9]\d*", depth):
                raise UserError(f"n_layer {arm.n_layer!r} is {depth or 'nothing'}, expected a number from 1")
            return int(depth)

        if arm.n_layer != "k" or bool(arm.top) != bool(arm.top_layers):
            raise UserError("layers say how many there are, so no n_layer; top and top_layers go together")
        if arm.parts:
            check_parts(arm.parts)
        depth = 0
        for key, layers in (("source", arm.layers), ("top", arm.top_layers)):
            if layers:
                of_source, settings = self.of(getattr(arm, key), key)
                depth += len(parse_layers(with_numbers(layers, self.k, self.n), of_source))
                decays = settings["schedule"] == "wsd" and settings["decay_fraction"] < 1
                if (arm.inherit_from or self.config.inherit_from) == "stable" and not decays:
                    raise UserError(
                        f'inherit_from = "stable" of {key} {getattr(arm, key)!r}, which is not an arm with schedule = '
                        '"wsd" and decay_fraction below 1'
                    )
        return depth

    def of(self, name: str, key: str) -> tuple[int, dict]:
        """Depth and settings of an arm's source, teacher or top."""
        if name in self.known:
            return self.known[name]
        try:
            found = checkpoint.read_config(storage.resolve(name))
        except UserError as error:
            above = ", ".join(self.known)
            raise UserError(f"{key} {name!r} is neither an arm above it ({above}) nor a checkpoint: {error}") from None
        for shape, value in (("block_size", found.block_size), ("vocab_size", found.vocab_size)):
            asked = getattr(self.config, shape)
            if asked not in (None, value):
                raise UserError(f"{key} {name!r} has {shape} {value}, the recipe {asked}")
        return found.n_layer, {"schedule": "none of this recipe"}
