"""docs/results.md, docs/evidence.md and README.md: what they say is what the files in results/ hold."""

import csv
import json
import re

import numpy as np
import pytest
from conftest import ROOT

from ablation import spearman
from report import paired_difference, val_losses

RESULTS = "".join((ROOT / f"docs/{name}.md").read_text() for name in ("results", "evidence"))
README = (ROOT / "README.md").read_text()
MODELS = ("smollm2", "gemma3")


def load(name: str) -> dict:
    return json.loads((ROOT / f"results/real/{name}/attention.json").read_text())


def numbers(model: str) -> dict[str, str]:
    """Row of the table -> the cell of a model."""
    short, long, ablated = (load(f"{model}-{kind}") for kind in ("T100", "T512", "ablation"))
    near = [np.mean(np.array(heads) < 1.5) for heads in short["heads"]["rank"]]  # share in each layer
    half = len(near) // 2
    lazy = [row for row in short["layers"] if row["lazy"]]
    left_out = {row["layer"]: row for row in ablated["layers"]}
    costs = [left_out[row["layer"]] for row in lazy]
    cheaper = sum(row["cost"] < costs[0]["cost"] for row in ablated["layers"])
    rho = {name: f"{r:+.2f} (p = {p:.3f})" for name, (r, p, _) in ablated["ablation"]["spearman"].items()}
    return {
        "heads near rank one, first half of the layers": f"{np.mean(near[:half]):.0%}",
        "... second half": f"{np.mean(near[half:]):.0%}",
        "... all": f"{short['near_rank_one']:.0%}",
        "... of the untrained twin": f"{short['untrained']['near_rank_one']:.0%}",
        "lazy layers by ⌊MaxRank⌋ = 1 (MaxRank)": ", ".join(f"{r['layer']} ({r['max_rank']:.2f})" for r in lazy),
        "... strictly": str(sum(row["strictly_lazy"] for row in short["layers"])),
        "T = 512: heads near rank one": f"{long['near_rank_one']:.0%}",
        "... lazy layers": str(sum(row["lazy"] for row in long["layers"])),
        "cost of leaving a lazy layer out, nats ± standard error": ", ".join(
            f"{row['layer']}: {row['cost']:+.2f} ± {row['cost_se']:.2f}" for row in costs
        ),
        "layers that cost less than the first lazy one": f"{cheaper} of {len(ablated['layers']) - 1}",
        "rank correlation: MaxRank and the layer's cost": rho["MaxRank with the layer's cost"],
        "... MaxRank and its attention's cost": rho["MaxRank with its attention's cost"],
        "... a head's rank and its cost": rho["Rank with the head's cost"],
    }


@pytest.mark.parametrize("row", numbers("smollm2"))
def test_the_table_of_real_models_is_that_of_their_files(row):
    cells = " | ".join(numbers(model)[row] for model in MODELS)
    assert f"| {row} | {cells} |" in RESULTS


def test_the_readme_says_what_the_table_says():
    found = numbers("smollm2")
    shares = [found[row] for row in ("... second half", "heads near rank one, first half of the layers")]
    cheaper = found["layers that cost less than the first lazy one"]  # "19 of 29"
    assert f"any one of {cheaper.replace(' of ', ' of the other ')}:" in " ".join(README.split())
    assert f"deeper half's heads, {shares[0]} have" in README and f"first half's, {shares[1]}." in README


SMOLLM2 = {  # row -> run
    "the first 15": "inherited-15",
    "the first 14 and the last": "first-layers-and-the-last-15",
    "the first 13 and the last two *": "first-13-and-the-last-two-15",
    "0, 2, ..., 26 and the last *": "even-and-the-last-15",
    "spread from the first to the last": "spread-layers-15",
    "every other: 0, 2, ..., 28": "every-other-layer-15",
    "the last 15": "last-layers-15",
    "random weights": "random-15",
    "a random choice: 1, 4, 6, 8, 9, ...": "layers-at-random-15",
}


def smollm2(run: str) -> list:
    return [ROOT / "results/smollm2" / run]


@pytest.mark.parametrize("row", SMOLLM2)
def test_a_row_about_smollm2_is_that_of_its_run(row):
    run = SMOLLM2[row]
    first, *_, last = lines_of(f"smollm2/{run}/metrics", "val_loss")
    difference, interval = paired_difference(smollm2(run), smollm2("reference"))
    cells = f"{first['val_loss']:.2f} | {last['val_loss']:.4f} ± {last['val_se']:.4f} | {difference:+.4f} ± {interval:.4f}"
    assert last["step"] == 60 and f"| {row} | {cells} |" in RESULTS


RATES = re.findall(r"^\| (.*) \| (adamw|muon) \| (\S+) \| (\d\.\d{4}) \|$", RESULTS, flags=re.MULTILINE)


@pytest.mark.parametrize("row,optimizer,rate,loss", RATES)
def test_a_loss_at_another_rate_is_the_last_of_its_curve(row, optimizer, rate, loss):
    assert lines_of(f"smollm2/rates/{SMOLLM2[row]}-{optimizer}-{rate}", "val_loss")[-1]["step"] == 60
    assert f"{lines_of(f'smollm2/rates/{SMOLLM2[row]}-{optimizer}-{rate}', 'val_loss')[-1]['val_loss']:.4f}" == loss


def test_what_is_said_of_other_rates_follows_from_the_table():
    table = {(row, optimizer, rate): float(loss) for row, optimizer, rate, loss in RATES}
    rows = ("the first 15", "spread from the first to the last", "the first 14 and the last", "the last 15")
    first, spread, with_last, last = (table[row, "adamw", "1e-3"] for row in rows)
    said = f"by {first - spread:.2f} nats, and the first 14 with the last by {first - with_last:.2f}."
    assert said in " ".join(RESULTS.split()) and spread < with_last < first < last
    best = [min(loss for key, loss in table.items() if key[:2] == ("the first 15", name)) for name in ("adamw", "muon")]
    assert f"is {best[0] - best[1]:.2f} nats better than AdamW" in " ".join(RESULTS.split())


@pytest.mark.parametrize(
    "run,words",
    [
        ("spread-layers-15", "they are better by {} nats"),
        ("every-other-layer-15", "every other one by {}"),
        ("first-layers-and-the-last-15", "the first 14 with the last by {}."),
    ],
)
def test_what_other_layers_are_worth_in_smollm2_is_the_paired_difference(run, words):
    difference, interval = paired_difference(smollm2("inherited-15"), smollm2(run))
    assert words.format(f"{difference:.2f} ± {interval:.2f}") in " ".join(RESULTS.split())


# ---- the study on CPU cores

STUDY = ROOT / "results/study_cpu"
CLAIM = r"^\| [^|]+ \| ([^|]+) \| ([^|]+) \| ([+-]\d\.\d{4} ± \d\.\d{4}) \| (\d of \d) \| [^|]+ \|$"


def reported() -> dict[tuple[str, str], tuple[str, str]]:
    """(first model, second model) -> (difference, seeds), from the report's two tables."""
    found = {}
    for line in (STUDY / "report.md").read_text().splitlines():
        cells = [cell.strip().replace("inherited, 8 layers", "target") for cell in line.strip("|").split("|")]
        if len(cells) == 6 and " of " in cells[4]:  # claims
            found[cells[1], cells[2]] = (cells[3], cells[4])
        if len(cells) == 12 and "±" in cells[7]:  # models
            found[cells[0], "reference"] = (cells[7], "")
    return found


@pytest.mark.parametrize("first,second,difference,seeds", re.findall(CLAIM, RESULTS, flags=re.MULTILINE))
def test_a_row_of_the_study_is_that_of_its_report(first, second, difference, seeds):
    found = reported()[first, second]
    assert found[0] == difference and found[1] in (seeds, "")


def test_the_study_has_its_rows():
    assert len(re.findall(CLAIM, RESULTS, flags=re.MULTILINE)) >= 20 and len(BETTER) == 8


BETTER = re.findall(r"^\| ([\d, ]+) \| (\d\.\d{4}) \| ([+-]\d\.\d{4} ± \d\.\d{4}) \|$", RESULTS, flags=re.MULTILINE)


@pytest.mark.parametrize("layers,loss,difference", BETTER)
def test_a_choice_of_eight_layers_has_the_loss_of_its_file(layers, loss, difference):
    path, target = (STUDY / "better" / name for name in (layers.replace(", ", "-"), "target"))
    mean, interval = paired_difference([path], [target])
    assert f"{val_losses(path).mean():.4f}" == loss and f"{mean:+.4f} ± {interval:.4f}" == difference


def test_what_dropping_attention_alone_gives_is_the_paired_difference():
    path, target = STUDY / "better/without-attention-8-11", STUDY / "better/target"
    mean, interval = paired_difference([path], [target])
    assert f"end at {val_losses(path).mean():.4f}:\n{mean:+.4f} ± {interval:.4f} to the first eight layers" in RESULTS


def test_the_correlations_with_rank_and_cost_are_those_of_the_table():
    with open(STUDY / "which_layers.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["k"] == "8"]
    for key in ("avg_rank", "cost"):
        rho, p = spearman([float(row[key]) for row in rows], [float(row["loss"]) for row in rows])
        assert f"{rho:+.2f} (p = {p:.2f})" in RESULTS


# ---- long runs: sinks, and both optimizers

PERFORMANCE = (ROOT / "docs/performance.md").read_text()
LONG = re.findall(r"^\| (adamw|muon) \| (\S+) \| (\d,\d+) \| (\d\.\d{4}) \| (.*) \|$", PERFORMANCE, flags=re.MULTILINE)
SINKS = {  # row -> log
    "12 layers, 64 wide, AdamW 4e-3, 12.3": "collapse/metrics",
    "8 layers, 128 wide, AdamW 4e-3, 20.1": "muon/long-adamw-4e-3",
    "8 layers, 128 wide, AdamW 8e-3, 20.1": "muon/long-adamw-8e-3",
    "8 layers, 128 wide, Muon 8e-3, 20.1": "muon/long-muon-8e-3",
    "8 layers, 128 wide, Muon 1.6e-2, 20.1": "muon/long-muon-1.6e-2",
    "24 layers, 64 wide, Muon 1.6e-2, 20.1": "collapse/deep-muon-1.6e-2",
    "8 layers, 128 wide, AdamW 8e-3, weight decay 1, 20.1": "collapse/decay-adamw-8e-3",
}


def lines_of(name: str, key: str) -> list[dict]:
    return [line for line in map(json.loads, (ROOT / f"results/{name}.jsonl").read_text().splitlines()) if key in line]


@pytest.mark.parametrize("optimizer,rate,steps,loss,reached", LONG)
def test_a_long_run_of_an_optimizer_is_its_curve(optimizer, rate, steps, loss, reached):
    short = "" if steps == "4,900" else "-short"
    curve = lines_of(f"muon/long-{optimizer}-{rate}{short}", "val_loss")
    best = min(lines_of(f"muon/long-adamw-{each}", "val_loss")[-1]["val_loss"] for each in ("4e-3", "8e-3"))
    assert f"AdamW's best final loss is {best:.4f}" in " ".join(PERFORMANCE.split())
    assert (f"{curve[-1]['step']:,}", f"{curve[-1]['val_loss']:.4f}") == (steps, loss)
    first = next((f"{line['step']:,}" for line in curve if line["val_loss"] <= best), "not reached")
    assert reached == first


@pytest.mark.parametrize("row", SINKS)
def test_a_row_about_sinks_is_its_log(row):
    last = lines_of(SINKS[row], "MaxRank")[-1]
    lowest, largest = min(last["MaxRank"]), max(last["sink > 0.3"])
    cells = f"{lowest:.1f} ({last['MaxRank'].index(lowest)}) | {largest:.2f} ({last['sink > 0.3'].index(largest)})"
    assert row.endswith(f"{last['tokens'] / 1e6:.1f}") and f"| {row} M bytes | {cells} |" in RESULTS


def test_the_long_runs_have_their_rows():
    assert len(LONG) == 5 and len(re.findall(r"^\| .* M bytes \|", RESULTS, flags=re.MULTILINE)) == len(SINKS)


# ---- the numbers in sentences

SENTENCES = " ".join(RESULTS.split())


def report_rows() -> dict[str, list[str]]:
    """Model -> the cells of its row in the study's report."""
    lines = (STUDY / "report.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row for row in cells if len(row) == 12 and row[7][:2] in ("+0", "-0")}


def sentences_of_the_study() -> list[str]:
    rows = report_rows()
    loss, difference = ({name: float(row[i].split()[0]) for name, row in rows.items()} for i in (6, 7))
    flops = {name: float(row[5]) for name, row in rows.items()}
    eight, on, twice = "inherited, 8 layers", "reference, trained on", "random, twice the steps"
    better = {layers: val_losses(STUDY / "better" / layers.replace(", ", "-")).mean() for layers, *_ in BETTER}
    first_seed = val_losses(STUDY / "better/target").mean()  # the first eight layers
    reference = loss["reference, WSD"] - difference["reference, WSD"]
    wsd = [each - loss["reference, WSD"] for each in (first_seed, loss["inherited, WSD"])]
    below = reference - first_seed
    others = (3 * -difference[eight] - below) / 2
    deep = sorted(first_seed - each for layers, each in better.items() if layers[0] == "0")
    claimed = {pair: abs(float(found[0].split()[0])) for pair, found in reported().items() if found[1]}
    three = [claimed["target", name] for name in ("every other layer", "layers at random")]
    three.append(claimed["first layers and the last", "target"])
    thirds = [loss[f"{which} third"] for which in ("first", "middle", "last")]
    with open(STUDY / "attention.csv", encoding="utf-8") as file:
        ranks = [float(row["max_rank"]) for row in csv.DictReader(file) if row["model"] == "reference"]
    without = val_losses(STUDY / "better/without-attention-8-11").mean() - min(better.values())
    return [
        f"than the reference ({rows['inherited, 6 layers'][7]} nats per byte, spread over three seeds {rows['inherited, 6 layers'][8][:6]})",
        f"(by {rows['random'][7][1:]} nats), in each seed",
        f"MaxRank lies between {min(ranks):.1f} and {max(ranks):.1f} in the first seed",
        f"({below:.3f} below the reference instead of {others:.3f})",
        f"at {loss['reference, WSD']:.4f} instead of {reference:.4f} for the same tokens",
        f"({wsd[0]:+.4f} and, inherited before its decay, {wsd[1]:+.4f})",
        f"and {1 - flops[twice] / flops[eight]:.0%} fewer FLOPs. The reference",
        f"with 12 layers and {flops[on] / flops[eight] - 1:.0%} more FLOPs",
        f"by {three[0]:.3f}, {three[1]:.3f} and {three[2]:.3f}, in each of three seeds",
        f"with {1 - flops['stacking'] / flops[eight]:.0%} fewer FLOPs in all (one seed). Five other choices",
        f"than stacking, the lowest by {loss['stacking'] - min(better.values()):.3f}",
        f"({loss['every other layer']:.4f} and {loss['layers at random']:.4f})",
        f"differ by {max(thirds) - min(thirds):.3f} at most",
        f"by {deep[0]:.3f} to {deep[-1]:.3f} in the first seed",
        f"by {min(three):.3f} to {max(three):.3f} on average",
        f"by {claimed['target', twice]:.3f} and {claimed['target', on] + 1e-9:.3f}, so both",  # 0.0615 is rounded up
        f"{loss['every other layer'] / loss[on] - 1:.1%} above the reference trained on",
        f"{1 - flops['every other layer'] / flops[on]:.0%} fewer FLOPs in all and {float(rows['every other layer'][10]):.0%} of the latency",
        f"(by {without:.3f}, the same seed)",
    ]


def sentences_of_real_models() -> list[str]:
    left_out = {model: {r["layer"]: r for r in load(f"{model}-ablation")["layers"]} for model in MODELS}
    parts = {
        (model, layer): [f"{left_out[model][layer][key]:+.2f}" for key in ("attention_cost", "cost")]
        for model, layer in (("smollm2", 23), ("smollm2", 24), ("gemma3", 12))
    }
    laziest, rows = left_out["smollm2"][23], left_out["smollm2"].values()
    cheaper = [row for row in rows if row["cost"] < laziest["cost"]]
    near = [r for r in cheaper if laziest["cost"] - r["cost"] < 2 * np.hypot(laziest["cost_se"], r["cost_se"])]
    best, spread = (val_losses(*smollm2(f"{run}-15")) for run in ("even-and-the-last", "spread-layers"))
    gemma = sorted((row["cost"] for row in left_out["gemma3"].values()), reverse=True)
    mean, error = paired_difference(smollm2("inherited-15"), smollm2("even-and-the-last-15"))
    said = numbers("smollm2")
    halves = [said[row] for row in ("... second half", "heads near rank one, first half of the layers")]
    return [
        f"In SmolLM2 {halves[0]} of the heads of the second half are near rank one, and {halves[1]} of the first half",
        "layer 23 costs {} nats instead of {},".format(*parts["smollm2", 23]),
        "layer 24 {} instead of {},".format(*parts["smollm2", 24]),
        "Gemma's layer 12 {} instead of {}.".format(*parts["gemma3", 12]),
        f"cost most of all ({gemma[0]:+.2f} and {gemma[1]:+.2f} nats)",
        f"{len(cheaper)} of the other 29, though {len(near)} of these lie within two standard errors",
        f"cost much ({left_out['smollm2'][28]['cost']:+.2f} and {left_out['smollm2'][29]['cost']:+.2f})",
        f"plus the last: {mean:.2f} ± {error:.2f} better",
        f"plus the last, ends {mean:.2f} ± {error:.2f} nats below the first 15",
        f"differ by {spread.mean() - best.mean():.2f}, so",
    ]


@pytest.mark.parametrize("sentence", sentences_of_the_study() + sentences_of_real_models())
def test_a_number_in_a_sentence_is_that_of_the_files(sentence):
    assert sentence in SENTENCES


def test_what_is_said_of_the_ranks_of_long_runs_is_in_their_logs():
    deep = lines_of("muon/long-muon-1.6e-2", "MaxRank"), 6
    first = lines_of("muon/long-muon-8e-3", "MaxRank"), 0
    for lines, layer in (deep, first):
        ranks = [line["MaxRank"][layer] for line in lines]
        assert f"(from {max(ranks):.1f} to {ranks[-1]:.1f})" in SENTENCES
    decay = lines_of("collapse/decay-adamw-8e-3", "val_loss")[-1]["val_loss"]
    usual = lines_of("muon/long-adamw-8e-3", "val_loss")[-1]["val_loss"]
    assert f"({decay:.2f} nats per byte; with 0.1 it is {usual:.2f} on" in SENTENCES
