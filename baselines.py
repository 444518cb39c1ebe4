"""Every comparison of the paper, and ours, an entry each: edit this file to add one.

    python inheritune.py config/demo.toml --baselines random "lazy layers" stacking
    python -c "import baselines; print(*baselines.baselines(n=24, k=16), sep='\\n')"

n is the reference's number of layers, k the target's. Layers count from 0. An entry says what a model begins
with and how it is trained. inheritune.py trains it, with the same tokens in the same order as the target.
"Ours" marks what the paper does not have.
"""

import random
from dataclasses import dataclass, field


@dataclass
class Plan:
    """How a model of the recipe begins and is trained: the reference, a round's target or a baseline.

    Without `layers` it begins with `n_layer` layers of random weights.
    """

    n_layer: int = 0
    layers: list[int | None] = field(default_factory=list)  # of the source; None is a fresh layer
    source: str = "reference"  # or "target", or another baseline, which is then trained too
    top: str = ""  # a second source, of which top_layers go on top
    top_layers: list[int] = field(default_factory=list)
    width: float = 1.0  # the share of heads, MLP units and embedding dimensions to take
    parts: str = ""  # comma-separated parts of each layer to take: ln_1, attn, ln_2, mlp; the rest is fresh
    before_decay: bool = False  # inherit the source's last checkpoint before its decay; no warm-up
    teacher: str = ""  # distill this model
    steps: float = 1.0  # times max_steps
    settings: dict = field(default_factory=dict)  # of train.py, where they differ


def baselines(n: int, k: int) -> dict[str, Plan]:
    """The known models by name, for a reference of n and a target of k layers."""
    first, last, everything = list(range(k)), list(range(n - k, n)), list(range(n))
    half, other_half = list(range((k + 1) // 2)), list(range(k // 2))
    every_other = list(range(0, n, 2))[:k]
    every_other += range(max(0, n - 2 - k + len(every_other)), n - 2)  # DistilBERT's; 16 of 24: ::2,18:22
    spread = [round(i * (n - 1) / max(1, k - 1)) for i in range(k)]  # from the first to the last
    third = max(1, n // 3)
    in_place = 5 * n // 8  # of 24 layers the last 9 stay in place
    kept = first[: max(1, k - 2)]
    grow = {"layers": kept, "source": "first layers, half the steps", "steps": 0.5}
    wsd = {"schedule": "wsd"}
    return {
        # ---- is it the layers, or the steps? (paper, table 5; the last is ours)
        "random": Plan(n_layer=k),
        "random, twice the steps": Plan(n_layer=k, steps=2),
        "reference, trained on": Plan(layers=everything),
        # ---- which third, with random ones beside it (paper, table 4)
        "first third": Plan(layers=everything[:third]),
        "middle third": Plan(layers=everything[(n - third) // 2 :][:third]),
        "last third": Plan(layers=everything[n - third :]),
        "random, third": Plan(n_layer=third),
        # ---- the lazy last half, 10 K of 100 K steps (paper, figure 3), and in place (figure 23)
        "first half": Plan(layers=list(range(n // 2)), steps=0.1),
        "lazy layers": Plan(layers=list(range(n - n // 2, n)), steps=0.1),
        "random, half": Plan(n_layer=n // 2, steps=0.1),
        "lazy layers in place": Plan(layers=[None] * in_place + list(range(in_place, n))),
        # ---- which k layers (ours)
        "last layers": Plan(layers=last),
        "first layers and the last": Plan(layers=[*first[:-1], n - 1]),
        "layers at random": Plan(layers=sorted(random.Random(0).sample(everything, k))),
        "middle layers": Plan(layers=list(range((n - k) // 2, (n - k) // 2 + k))),
        "every other layer": Plan(layers=every_other),
        "spread layers": Plan(layers=spread),
        # ---- stacking (paper, appendix D): half the layers trained, then copied on top of each other
        "half of the target": Plan(n_layer=len(half)),
        "stacking": Plan(layers=half + other_half, source="half of the target"),
        "hybrid stacking": Plan(layers=half + other_half),
        # ---- half width (paper, appendix D): all layers, half the heads and MLP units of each
        "half width": Plan(layers=everything, width=0.5),
        # ---- parts of layers (paper, table 3)
        "attention and its norm": Plan(layers=first, parts="ln_1,attn"),
        "MLP and its norm": Plan(layers=first, parts="ln_2,mlp"),
        "attention and MLP, no norms": Plan(layers=first, parts="attn,mlp"),
        # ---- distillation, half the steps (paper, appendix D): random, and every other layer; then ours
        "distilled, random": Plan(n_layer=k, teacher="reference", steps=0.5),
        "distilled, every other layer": Plan(layers=every_other, teacher="reference", steps=0.5),
        "distilled, inherited": Plan(layers=first, teacher="reference", steps=0.5),
        "inherited, distilled first": Plan(layers=first, source="distilled, inherited", steps=0.5),
        # ---- grow while training (paper, section 1), half the steps with k - 2 layers (ours)
        "first layers, half the steps": Plan(layers=kept, steps=0.5),
        "grown from the target": Plan(top="reference", top_layers=first[len(kept) :], **grow),
        "grown with the last layers": Plan(top="reference", top_layers=last[len(kept) :], **grow),
        "grown with fresh layers": Plan(**grow | {"layers": kept + [None] * (k - len(kept))}),
        # ---- warm-up, stable, decay (ours)
        "reference, WSD": Plan(n_layer=n, settings=wsd),
        "inherited, WSD": Plan(layers=first, source="reference, WSD", before_decay=True, settings=wsd),
        "random, twice the steps, WSD": Plan(n_layer=k, steps=2, settings=wsd),
    }


CLAIMS = [  # of the paper, then ours: text, the model that should be better, the other one
    ("Inherited layers beat random ones", "target", "random"),
    ("They beat random ones with twice the steps (medium, large)", "target", "random, twice the steps"),
    ("Early layers transfer more than lazy ones", "first half", "lazy layers"),
    ("Lazy layers beat random ones (in the paper: about equal)", "lazy layers", "random, half"),
    ("The middle third transfers more than the first", "middle third", "first third"),
    ("The middle third transfers more than the lazy last", "middle third", "last third"),
    ("Inheriting beats stacking", "target", "stacking"),
    ("Inheriting beats hybrid stacking", "target", "hybrid stacking"),
    ("Inheriting beats half width", "target", "half width"),
    ("Inheriting beats distillation (compared in appendix D)", "target", "distilled, random"),
    ("Inheriting beats distilling every other layer (the same)", "target", "distilled, every other layer"),
    ("Both parts transfer more than attention", "attention and MLP, no norms", "attention and its norm"),
    ("Both parts transfer more than the MLP", "attention and MLP, no norms", "MLP and its norm"),
    ("The reference beats random ones, the condition of all others (ours)", "reference", "random"),
    ("Matching is more than training for longer (ours)", "target", "reference, trained on"),
    ("The last third transfers more than random ones (table 4)", "last third", "random, third"),
    ("The first layers transfer more than the middle ones (ours)", "target", "middle layers"),
    ("The first layers transfer more than every other (ours)", "target", "every other layer"),
    ("The first layers transfer more than spread ones (ours)", "target", "spread layers"),
    ("The first layers transfer more than a random choice (ours)", "target", "layers at random"),
    ("The first layers transfer more than the last (ours)", "target", "last layers"),
    ("Keeping the last layer adds to inheriting (ours)", "first layers and the last", "target"),
    ("Distilling adds to inheriting (ours)", "distilled, inherited", "target"),
    ("Distilling first adds to inheriting (ours)", "inherited, distilled first", "target"),
    ("Growing the trained target beats one round (ours)", "grown from the target", "target"),
    ("Inheriting before the decay beats the paper's schedule (ours)", "inherited, WSD", "target"),
    ("Growing by trained layers beats fresh ones (ours)", "grown from the target", "grown with fresh layers"),
    ("Growing by next layers beats last ones (ours)", "grown from the target", "grown with the last layers"),
]

# The paper's validation losses on OpenWebText by preset, cut off after two digits (tables 2 to 5, figure 24).
# k: the layers of the target that its baselines belong to
PAPER = {
    "small": {"first third": 3.22, "middle third": 3.19, "last third": 3.23, "random, third": 3.25},
    "medium": {
        "k": 16, "reference": 2.81, "inherited, 12 layers": 2.87, "inherited, 14 layers": 2.84,
        "inherited, 16 layers": 2.81, "random": 2.86, "random, twice the steps": 2.83, "half width": 3.04,
        "stacking": 2.84, "hybrid stacking": 2.83, "attention and its norm": 2.84, "MLP and its norm": 2.85,
        "attention and MLP, no norms": 2.80,
    },
    "medium-200k": {"k": 18, "reference": 2.87, "inherited, 18 layers": 2.86},
    "large": {
        "k": 18,
        "reference": 2.85, "inherited, 18 layers": 2.80, "random": 2.97, "random, twice the steps": 2.84,
        "half width": 3.06, "stacking": 2.87, "hybrid stacking": 2.89,
    },
    "xl": {
        "k": 24,
        "reference": 2.65, "inherited, 24 layers": 2.64, "random": 2.69, "random, twice the steps": 2.62,
        "half width": 2.77, "stacking": 2.65, "hybrid stacking": 2.64,
    },
}
