"""inherit.py: every tensor exactly once, from where it should be, bit for bit."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, call_script, random_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen3Config

from plumbing import checkpoint
import inherit
from plumbing import storage
from plumbing.configurator import UserError


@pytest.fixture
def source(tmp_path):
    model = random_model(n_layer=4, dtype=torch.float32)
    checkpoint.save(tmp_path / "source", model, "bytes", 0)
    return tmp_path / "source"


def weights(path):
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize(
    "text,layers",
    [
        ("0:4", [0, 1, 2, 3]), (":", list(range(8))), ("::2", [0, 2, 4, 6]), ("0:2,0:2", [0, 1, 0, 1]),
        ("4:", [4, 5, 6, 7]), ("1::3", [1, 4, 7]), ("7", [7]), ("0,2,4:6", [0, 2, 4, 5]), (" 0:1 , 3 ", [0, 3]),
    ],
)  # fmt: skip
def test_layers_are_python_slices(text, layers):
    assert inherit.parse_layers(text, 8) == layers


@pytest.mark.parametrize("text", ["", "0:9", "8", "4:4", "5:2", "-1", "-2:", "0:4:0", "a", "0:4,", "1.5", "0:1:2:3"])
def test_an_impossible_selection_is_refused(text):
    with pytest.raises(UserError, match="layers '"):
        inherit.parse_layers(text, 8)


def test_all_layers_give_the_same_file(source, tmp_path):
    inherit.inherit(source, ":", tmp_path / "all")
    assert (tmp_path / "all" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert (tmp_path / "all" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_all_layers_give_the_reference_s_loss_to_the_last_bit(reference, data_dir, tmp_path, capsys):
    import train

    inherit.inherit(reference, ":", tmp_path / "all")
    losses = []
    for model in (reference, tmp_path / "all"):
        capsys.readouterr()
        assert call_script(train, f"--init_from={model}", f"--data_dir={data_dir}", "--eval_only") == 0
        losses.append(capsys.readouterr().out.split("val loss ")[1].split(" ±")[0])
    assert losses[0] == losses[1] and float(losses[0]) > 0


@pytest.mark.parametrize("layers", ["0:2", "::2", "2:4", "0:2,0:2", "3"])
def test_kept_blocks_and_everything_outside_the_blocks_are_bit_equal(source, tmp_path, layers):
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    out = inherit.inherit(source, layers, tmp_path / "out")
    theirs, ours, chosen = weights(source), weights(out), inherit.parse_layers(layers, 4)
    outside = {key for key in theirs if ".h." not in key}
    assert outside == {f"transformer.{k}" for k in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")}
    assert all(torch.equal(ours[key], theirs[key]) for key in outside)
    blocks = [key.split(".h.0.")[1] for key in theirs if ".h.0." in key]
    for i, layer in enumerate(chosen):
        for part in blocks:
            assert torch.equal(ours[f"transformer.h.{i}.{part}"], theirs[f"transformer.h.{layer}.{part}"])
    assert len(ours) == len(outside) + len(chosen) * len(blocks)
    assert checkpoint.load_model(out).config.n_layer == len(chosen)
    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage["layers"] == chosen and lineage["tensors"].keys() == ours.keys()
    assert lineage["sha256"] == {"model.safetensors": storage.sha256_of(source / "model.safetensors")}
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_the_first_layers_compute_what_they_computed_in_the_reference(source, tmp_path):
    half = checkpoint.load_model(inherit.inherit(source, "0:2", tmp_path / "half"))
    idx = torch.arange(16)[None]
    theirs = list(checkpoint.load_model(source).attention_matrices(idx))
    assert all(torch.equal(a, b) for a, b in zip(half.attention_matrices(idx), theirs, strict=False))


@pytest.mark.parametrize("parts", ["attn", "mlp", "attn,mlp", "attn,ln", "attn,mlp,ln"])
def test_parts_take_these_and_draw_the_rest_fresh(source, tmp_path, parts):
    out = inherit.inherit(source, "0:3", tmp_path / "out", parts=parts, seed=3)
    torch.manual_seed(3)
    fresh = checkpoint.hf_tensors(checkpoint.GPT(checkpoint.read_config(out)))
    theirs, ours = weights(source), weights(out)
    for key, tensor in ours.items():
        part = key.split(".")[3].split("_")[0] if ".h." in key else None  # attn, mlp or ln
        assert torch.equal(tensor, (theirs if part is None or part in parts.split(",") else fresh)[key]), key
    assert not torch.equal(theirs["transformer.h.0.mlp.c_fc.weight"], fresh["transformer.h.0.mlp.c_fc.weight"])


@pytest.mark.parametrize("wrong", [{"parts": "attention"}, {"layers": "0:5"}])
def test_a_mistake_leaves_nothing(source, tmp_path, wrong):
    with pytest.raises(UserError):
        inherit.inherit(**{"reference": source, "layers": "0:2", "out": tmp_path / "out"} | wrong)
    assert not (tmp_path / "out").exists()


def test_the_output_is_never_the_input(source):
    with pytest.raises(UserError, match="exists already"):
        inherit.inherit(source, "0:2", source)
    storage.verify(source)


def test_a_layer_that_moves_under_the_inverse_layer_scale_is_warned_about(tmp_path, capsys):
    checkpoint.save(tmp_path / "s", random_model(scale_attn_by_inverse_layer_idx=True), "bytes", 0)
    inherit.inherit(tmp_path / "s", "0:2", tmp_path / "first")
    assert "warning" not in capsys.readouterr().out
    inherit.inherit(tmp_path / "s", "1:3", tmp_path / "last")
    assert "warning: layer i of this model divides its attention logits" in capsys.readouterr().out


def test_layers_of_a_second_checkpoint_go_on_top(source, tmp_path):
    checkpoint.save(tmp_path / "other", random_model(seed=1, n_layer=4, dtype=torch.float32), "bytes", 0)
    other = tmp_path / "other"
    out = inherit.inherit(other, "0:2", tmp_path / "out", top=source, top_layers="2:4,0")
    ours, theirs, tops = weights(out), weights(other), weights(source)
    assert checkpoint.read_config(out).n_layer == 5
    for key, tensor in ours.items():
        layer = int(key.split(".")[2]) if ".h." in key else None
        moved = {2: 2, 3: 3, 4: 0}.get(layer)
        expected = theirs[key] if moved is None else tops[key.replace(f".h.{layer}.", f".h.{moved}.")]
        assert torch.equal(tensor, expected), key
    origin = json.loads((out / "lineage.json").read_text())["tensors"]
    assert origin["transformer.h.4.ln_1.weight"] == "top:transformer.h.0.ln_1.weight"
    assert origin["transformer.h.1.ln_1.weight"] == "transformer.h.1.ln_1.weight"


def test_the_top_must_have_the_same_shape(source, tmp_path):
    checkpoint.save(tmp_path / "narrow", random_model(n_embd=16), "bytes", 0)
    with pytest.raises(UserError, match="cannot go on top of .*config.json differs in n_embd"):
        inherit.inherit(source, ":", tmp_path / "out", top=tmp_path / "narrow", top_layers="0:1")


def test_the_cost_of_a_reference_is_carried_along(reference, tmp_path):
    first = inherit.inherit(reference, "0:2", tmp_path / "first")
    state = json.loads((storage.latest(reference) / "trainer_state.json").read_text())
    spent = {key: state[key] for key in ("tokens", "flops")}
    assert list(json.loads((first / "lineage.json").read_text())["ancestors"].values()) == [spent]
    assert checkpoint.cost(first) == spent
    assert not (first / "optimizer.safetensors").exists() and not (first / "trainer_state.json").exists()


SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 99,
    "max_position_embeddings": 32,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, max_window_layers=2, use_sliding_window=True),
    "gpt_neox": GPTNeoXConfig(**SMALL),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard_size", ["10MB", "20KB"])
def test_another_family_sliced_computes_its_first_hidden_states(tmp_path, family, shard_size):
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    theirs.save_pretrained(tmp_path / "source", max_shard_size=shard_size)
    assert (tmp_path / "source/model.safetensors.index.json").exists() == (shard_size == "20KB")
    out = inherit.inherit(tmp_path / "source", "0:3", tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(out).eval()
    idx = torch.arange(20)[None]
    expected = theirs(idx, output_hidden_states=True).hidden_states
    found = ours(idx, output_hidden_states=True).hidden_states
    assert ours.config.num_hidden_layers == 3 and len(found) == 4
    assert all(torch.equal(found[i], expected[i]) for i in range(3))
    norm = getattr(theirs.base_model, "norm", None) or theirs.base_model.final_layer_norm
    assert torch.equal(found[3], norm(expected[3]))  # the last one is given after the final norm
    if family == "qwen3":  # a list with an entry for each layer: which of them slide a window
        types = theirs.config.layer_types
        assert ours.config.layer_types == types[:3] and len(set(types)) == 2


def test_lists_with_an_entry_for_each_layer_are_sliced_too():
    config = {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"], "eos": [1, 2], "name": "abcd"}
    assert inherit.sliced_config(config, [3, 1], 4) == {
        "num_hidden_layers": 2, "layer_types": ["d", "b"], "eos": [1, 2], "name": "abcd"
    }  # fmt: skip


def test_a_config_that_lies_about_its_layers_is_refused(source, tmp_path):
    (source / "manifest.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    with pytest.raises(UserError, match=r"layers \[0, 1, 2, 3\], but config.json says 3"):
        inherit.inherit(source, "0:2", tmp_path / "out")


def test_memory_stays_near_the_largest_tensor(tmp_path):
    """A file of 256 MB in tensors of 8 MB. (Of 1 GB in tensors of 16 MB it took 20 MB.)"""
    path = tmp_path / "source"
    path.mkdir()
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.{j}.weight" for i in range(8) for j in range(4))]
    storage.write_tensors(path / "model.safetensors", sorted(names), lambda _: torch.ones(2**21))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 8}))
    script = f"""
import inherit, resource
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
inherit.inherit({str(path)!r}, "0:8", {str(tmp_path / "out")!r})
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/model.safetensors").stat().st_size > 256 * 2**20
    assert float(done.stdout.split()[-1]) < 5 * 8
