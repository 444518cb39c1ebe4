"""inherit.py: every tensor exactly once, from where it should be, bit for bit."""

import json
import shutil

import pytest
import torch
from conftest import call_script, options, random_model, read_metrics
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

import inherit
from plumbing import checkpoint, model_files, pretrained, storage
from plumbing.configurator import UserError


@pytest.fixture
def source(tmp_path):
    model = random_model(n_layer=4, dtype=torch.float32)
    checkpoint.save(tmp_path / "source", model, "bytes", 0)
    return tmp_path / "source"


def weights(path):
    return load_file(path / "model.safetensors")


def fresh_tensors(path, seed):
    """What a new model of this checkpoint's shape begins with."""
    torch.manual_seed(seed)
    return checkpoint.hf_tensors(checkpoint.GPT(pretrained.read_config(path)))


def layer_of(key):
    return int(key.split(".")[2]) if ".h." in key else None


# ---- which layers


@pytest.mark.parametrize(
    "text,layers",
    [
        ("0:4", [0, 1, 2, 3]),
        (":", list(range(8))),
        ("::2", [0, 2, 4, 6]),
        ("0:2,0:2", [0, 1, 0, 1]),
        ("4:", [4, 5, 6, 7]),
        ("1::3", [1, 4, 7]),
        ("7", [7]),
        ("0,2,4:6", [0, 2, 4, 5]),
        (" 0:1 , 3 ", [0, 3]),
        ("new", [None]),
        ("new:2,6:8", [None, None, 6, 7]),
        ("0, new, new:3", [0, None, None, None, None]),
    ],
)
def test_layers_are_python_slices_and_new_ones(text, layers):
    assert inherit.parse_layers(text, 8) == layers


def test_the_layers_of_the_paper_s_distillation_baseline_are_written_as_slices():
    assert inherit.parse_layers("::2,18:22", 24) == [
        0,
        2,
        4,
        6,
        8,
        10,
        12,
        14,
        16,
        18,
        20,
        22,
        18,
        19,
        20,
        21,
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0:9",
        "8",
        "4:4",
        "0:0",
        "5:2",
        "-1",
        "-2:",
        "0:4:0",
        "a",
        "0:4,",
        "1.5",
        "0:1:2:3",
        "new:0",
        "new:",
        "news",
    ],
)
def test_an_impossible_selection_is_refused(text):
    with pytest.raises(UserError, match="layers"):
        inherit.parse_layers(text, 8)


def test_take_layers_names_each_tensor_of_the_target_and_its_source():
    names = [
        "transformer.wte.weight",
        *(f"transformer.h.{i}.{part}.weight" for i in range(3) for part in ("attn", "mlp")),
    ]
    assert inherit.take_layers(names, [2, None, 0]) == {
        "transformer.wte.weight": "transformer.wte.weight",
        "transformer.h.0.attn.weight": "transformer.h.2.attn.weight",
        "transformer.h.0.mlp.weight": "transformer.h.2.mlp.weight",
        "transformer.h.1.attn.weight": None,
        "transformer.h.1.mlp.weight": None,
        "transformer.h.2.attn.weight": "transformer.h.0.attn.weight",
        "transformer.h.2.mlp.weight": "transformer.h.0.mlp.weight",
    }


# ---- bit equality


def test_all_layers_give_the_same_file(source, tmp_path):
    inherit.inherit(source, ":", tmp_path / "all")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "all" / name).read_bytes() == (source / name).read_bytes(), name
    storage.verify(tmp_path / "all")


def test_all_layers_give_the_reference_s_loss_to_the_last_bit(reference, data_dir, tmp_path):
    import train

    inherit.inherit(reference, ":", tmp_path / "all")
    losses = []
    for model in (reference, tmp_path / "all"):
        out = tmp_path / f"evaluated-{len(losses)}"
        arguments = [f"--init_from={model}", f"--data_dir={data_dir}", f"--out_dir={out}", "--max_steps=0"]
        assert call_script(train, *arguments) == 0
        losses.append(read_metrics(out)[-1]["val_loss"])
    assert losses[0] == losses[1] > 0


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
    assert pretrained.load_model(out).config.n_layer == len(chosen)
    lineage = storage.read_json(out / "lineage.json")
    assert lineage["layers"] == chosen and lineage["tensors"].keys() == ours.keys()
    assert lineage["sha256"] == {"model.safetensors": storage.sha256_of(source / "model.safetensors")}
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_the_first_layers_compute_what_they_computed_in_the_reference(source, tmp_path):
    half = pretrained.load_model(inherit.inherit(source, "0:2", tmp_path / "half"))
    idx = torch.arange(16)[None]
    theirs = list(pretrained.load_model(source).attention_matrices(idx))
    assert all(torch.equal(a, b) for a, b in zip(half.attention_matrices(idx), theirs, strict=False))


def test_the_command_prints_where_each_layer_came_from(source, tmp_path, capsys):
    command = options(reference=source, layers="new,3", out=tmp_path / "out")
    assert call_script(inherit, *command) == 0
    n_params = sum(tensor.numel() for tensor in weights(tmp_path / "out").values())
    assert f"out: layers new, 3; {n_params:,} parameters stored" in capsys.readouterr().out


# ---- fresh layers and parts, a second checkpoint on top


def test_new_layers_are_fresh_and_the_others_stay_where_they_were(source, tmp_path):
    """The paper's lazy layers, kept in place above random ones."""
    out = inherit.inherit(source, "new:2,2:4", tmp_path / "out", seed=3)
    theirs, ours, fresh = weights(source), weights(out), fresh_tensors(out, seed=3)
    for key, tensor in ours.items():
        assert torch.equal(tensor, (fresh if layer_of(key) in (0, 1) else theirs)[key]), key
    lineage = storage.read_json(out / "lineage.json")
    assert lineage["layers"] == [None, None, 2, 3]
    assert lineage["tensors"]["transformer.h.1.mlp.c_fc.weight"] == "fresh, seed 3"
    first, second = (ours[f"transformer.h.{i}.mlp.c_fc.weight"] for i in (0, 1))
    assert not torch.equal(first, second) and first.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("parts", ["attn", "ln_2,mlp", "attn,mlp", "ln_1,attn", "ln_1,attn,ln_2,mlp"])
def test_parts_take_these_and_draw_the_rest_fresh(source, tmp_path, parts):
    out = inherit.inherit(source, "1:4", tmp_path / "out", parts=parts, seed=3)
    theirs, ours, fresh = weights(source), weights(out), fresh_tensors(out, seed=3)
    for key, tensor in ours.items():
        layer = layer_of(key)
        taken = layer is None or key.split(".")[3] in parts.split(",")
        source_key = key if layer is None else key.replace(f".h.{layer}.", f".h.{layer + 1}.")
        assert torch.equal(tensor, theirs[source_key] if taken else fresh[key]), key
    assert storage.read_json(out / "lineage.json")["parts"] == parts


def test_layers_of_a_second_checkpoint_go_on_top(source, tmp_path):
    checkpoint.save(tmp_path / "other", random_model(seed=1, n_layer=4, dtype=torch.float32), "bytes", 0)
    other = tmp_path / "other"
    out = inherit.inherit(other, "0:2", tmp_path / "out", top=source, top_layers="2:4,0")
    ours, theirs, tops = weights(out), weights(other), weights(source)
    assert pretrained.read_config(out).n_layer == 5
    for key, tensor in ours.items():
        layer = layer_of(key)
        moved = {2: 2, 3: 3, 4: 0}.get(layer)
        expected = theirs[key] if moved is None else tops[key.replace(f".h.{layer}.", f".h.{moved}.")]
        assert torch.equal(tensor, expected), key
    lineage = storage.read_json(out / "lineage.json")
    assert lineage["layers"] == [
        0,
        1,
        6,
        7,
        4,
    ]  # those of the second checkpoint count from 4, the first one's end
    assert lineage["sha256"] == model_files.hashes(other) and lineage["top_sha256"] == model_files.hashes(source)
    assert lineage["tensors"]["transformer.h.4.ln_1.weight"] == "transformer.h.4.ln_1.weight"


def test_there_is_no_state_to_resume_from(reference, tmp_path):
    out = inherit.inherit(reference, "0:2", tmp_path / "out")
    assert not (out / "optimizer.safetensors").exists() and not (out / "trainer_state.json").exists()


# ---- mistakes


@pytest.mark.parametrize("wrong", [{"parts": "attention"}, {"parts": "attn,ln"}, {"layers": "0:5"}])
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
    assert "so a moved layer computes differently" in capsys.readouterr().out


def test_a_config_that_lies_about_its_layers_is_refused(source, tmp_path):
    (source / "manifest.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"n_layer": 5}))
    with pytest.raises(UserError, match=r"no tensors of layers \[4\], but config.json has them"):
        inherit.inherit(source, "0,4", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_goes_on_top_of_itself(source, tmp_path):
    out = inherit.inherit(source, "0:2", tmp_path / "out", top=source, top_layers="1,3")
    theirs, ours = weights(source), weights(out)
    for i, layer in enumerate([0, 1, 1, 3]):
        name = "mlp.c_fc.weight"
        assert torch.equal(ours[f"transformer.h.{i}.{name}"], theirs[f"transformer.h.{layer}.{name}"])


def test_a_file_of_the_hub_goes_with_one_of_ours_on_top_or_below(source, tmp_path):
    """The hub's GPT-2 has settings that ours lacks, and lacks some that ours has."""
    hub = shutil.copytree(source, tmp_path / "hub")
    (hub / "manifest.json").unlink()
    ours = json.loads((hub / "config.json").read_text())
    known = ("model_type", "n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "activation_function")
    theirs = {key: ours[key] for key in known} | {"initializer_range": 0.02, "summary_type": "cls_index"}
    (hub / "config.json").write_text(json.dumps(theirs | {"layer_norm_epsilon": 1e-5}))
    for below, top in ((hub, source), (source, hub)):
        out = inherit.inherit(below, "0:2", tmp_path / f"under-{top.name}", top=top, top_layers="2:4")
        assert pretrained.read_config(out).n_layer == 4
    scaled = random_model(scale_attn_by_inverse_layer_idx=True, dtype=torch.float32)
    checkpoint.save(tmp_path / "scaled", scaled, "bytes", 0)
    with pytest.raises(UserError, match="different layers: scale_attn"):
        inherit.inherit(hub, "0:2", tmp_path / "out", top=tmp_path / "scaled", top_layers="0:2")


def test_a_top_and_its_layers_go_together(source, tmp_path):
    for half in ({"top": source}, {"top_layers": "0:2"}):
        with pytest.raises(UserError, match="top and top_layers go together"):
            inherit.inherit(source, ":", tmp_path / "out", **half)


@pytest.mark.parametrize("shape", [{"n_embd": 16}, {"n_head": 4}, {"scale_attn_by_inverse_layer_idx": True}])
def test_a_top_whose_layers_compute_something_else_is_refused(source, tmp_path, shape):
    other = random_model(**shape, dtype=torch.float32)
    checkpoint.save(tmp_path / "other", other, "bytes", 0)
    with pytest.raises(UserError, match=f"other have different layers: {next(iter(shape))}: "):
        inherit.inherit(source, ":", tmp_path / "out", top=tmp_path / "other", top_layers=":")
    assert not (tmp_path / "out").exists()


# ---- other families

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "vocab_size": 99, "max_position_embeddings": 32,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "qwen3": Qwen3Config(
        **SMALL, num_key_value_heads=2, head_dim=8, max_window_layers=2, use_sliding_window=True
    ),
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


def test_a_stack_of_another_family_is_complete(tmp_path):
    AutoModelForCausalLM.from_config(FAMILIES["llama"]).save_pretrained(tmp_path / "source")
    out = inherit.inherit(tmp_path / "source", "0:2,0:2", tmp_path / "out")
    theirs, ours = weights(tmp_path / "source"), weights(out)
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[key], theirs[key.replace("layers.2", "layers.0").replace("layers.3", "layers.1")])
        for key in ours
    )


def test_a_fresh_layer_of_another_family_is_what_transformers_draws(tmp_path):
    AutoModelForCausalLM.from_config(FAMILIES["llama"]).save_pretrained(tmp_path / "source")
    inherit.inherit(tmp_path / "source", "0:2,new", tmp_path / "out", seed=5)
    torch.manual_seed(5)
    drawn = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "out")).state_dict()
    found, source = weights(tmp_path / "out"), weights(tmp_path / "source")
    for name, tensor in found.items():
        expected = drawn[name] if ".layers.2." in name else source[name]
        assert torch.equal(tensor, expected), name


def test_lists_with_an_entry_for_each_layer_are_sliced_too():
    config = {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"], "eos": [1, 2], "name": "abcd"}
    config["intermediate_size"] = [10, 20, 30, 40]
    target = config | {"num_hidden_layers": 2, "layer_types": ["d", "b"], "intermediate_size": [40, 20]}
    assert inherit.sliced_config([inherit.Source(None, config, 4, 0)], [3, 1]) == target
    # of a second checkpoint on top, with a depth of its own: its layers count from 4
    top = config | {"num_hidden_layers": 2, "layer_types": ["x", "y"]}
    sources = [inherit.Source(None, config, 4, 0), inherit.Source(None, top, 2, 4)]
    joined = inherit.sliced_config(sources, [3, 5])
    assert joined["layer_types"] == ["d", "y"]


def test_the_tokenizer_s_files_travel_with_the_weights(tmp_path):
    AutoModelForCausalLM.from_config(FAMILIES["llama"]).save_pretrained(tmp_path / "source")
    for name in (
        "tokenizer.json",
        "tokenizer.model",
        "generation_config.json",
        "notes.txt",
        "pytorch_model.bin",
    ):
        (tmp_path / "source" / name).write_bytes(name.encode())
    out = inherit.inherit(tmp_path / "source", "0:2", tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {
        "config.json", "lineage.json", "manifest.json", "model.safetensors", "tokenizer.json",
        "tokenizer.model", "generation_config.json",
    }  # fmt: skip
    assert (out / "tokenizer.model").read_bytes() == b"tokenizer.model"


def test_layers_of_two_kinds_keep_their_kind_where_config_json_has_only_a_rule(tmp_path):
    """Gemma 2 slides every other layer. The hub's config.json does not say which ones."""
    config = Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    table = json.loads((tmp_path / "source/config.json").read_text())
    del table["layer_types"]
    (tmp_path / "source/config.json").write_text(json.dumps(table))
    kinds = AutoConfig.from_pretrained(tmp_path / "source").layer_types
    out = inherit.inherit(tmp_path / "source", "1:4", tmp_path / "out")
    assert AutoConfig.from_pretrained(out).layer_types == kinds[1:] and len(set(kinds)) == 2


def test_a_slice_that_would_be_another_model_is_not_written(tmp_path):
    """Only layer 0 of the source is dense. In the slice 1:4, layer 0 would have to be."""
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(**SMALL, num_key_value_heads=2, head_dim=8, mlp_only_layers=[0], **experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match="its layers are of other kinds"):
        inherit.inherit(tmp_path / "source", "1:4", tmp_path / "out")
    assert not (tmp_path / "out").exists() and inherit.inherit(tmp_path / "source", "0:2", tmp_path / "out")


def test_weights_of_eight_bits_are_sliced_as_they_are(tmp_path):
    AutoModelForCausalLM.from_config(FAMILIES["llama"]).save_pretrained(tmp_path / "source")
    file, key = tmp_path / "source/model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    save_file(tensors, file, metadata={"format": "pt"})
    out = inherit.inherit(tmp_path / "source", "1:3", tmp_path / "out")
    found = load_file(out / "model.safetensors")[key.replace(".1.", ".0.")]
    assert found.dtype == torch.float8_e4m3fn and torch.equal(found.float(), tensors[key].float())


def test_a_layer_that_predicts_several_tokens_is_left_out_with_a_line(tmp_path, capsys):
    AutoModelForCausalLM.from_config(FAMILIES["llama"]).save_pretrained(tmp_path / "source")
    file = tmp_path / "source/model.safetensors"
    more = {f"model.layers.4.{name}.weight": torch.ones(2) for name in ("eh_proj", "enorm")}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    out = inherit.inherit(tmp_path / "source", "1:4", tmp_path / "out")
    assert capsys.readouterr().out.count("left out layers beyond n_layer: 4\n") == 1
    assert not [key for key in load_file(out / "model.safetensors") if "eh_proj" in key]


def test_a_family_that_says_num_layers_is_sliced(tmp_path):
    config = GPTNeoConfig(
        num_layers=4, attention_types=[[["global", "local"], 2]], hidden_size=32, num_heads=2, vocab_size=65,
        max_position_embeddings=32,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    out = inherit.inherit(tmp_path / "source", "1:4", tmp_path / "out")
    assert AutoConfig.from_pretrained(out).num_layers == 3


def test_what_travels_with_the_weights_and_what_does_not(tmp_path):
    source = tmp_path / "source"
    AutoModelForCausalLM.from_config(FAMILIES["llama"]).save_pretrained(source)
    travels = {"chat_template.jinja", "generation_config.json", "tokenizer.model", "modeling_custom.py"}
    for name in travels | {"my_hf_token.txt", "consolidated.safetensors.bak", "training_args.bin"}:
        (source / name).write_text("x")
    out = inherit.inherit(source, "0:2", tmp_path / "out")
    found = {path.name for path in out.iterdir()}
    assert found == travels | {"config.json", "lineage.json", "manifest.json", "model.safetensors"}


# ---- half width


def test_half_width_is_the_first_half_of_every_head_unit_and_dimension(tmp_path):
    """Numbered by hand: width 4, 2 heads of 2, 16 units in the MLP."""
    model = random_model(n_layer=1, n_head=2, n_embd=4, block_size=3, vocab_size=5, bias=True, dtype=torch.float32)
    checkpoint.save(tmp_path / "source", model, "bytes", 0)
    half = weights(inherit.inherit(tmp_path / "source", ":", tmp_path / "half", width=0.5))
    full, block = weights(tmp_path / "source"), "transformer.h.0."
    first = [0, 1, 4, 5, 8, 9]  # queries, keys and values of head 0, of 12 columns
    expected = {
        "transformer.wte.weight": full["transformer.wte.weight"][:, :2],
        "transformer.wpe.weight": full["transformer.wpe.weight"][:, :2],
        "transformer.ln_f.weight": full["transformer.ln_f.weight"][:2],
        "transformer.ln_f.bias": full["transformer.ln_f.bias"][:2],
        block + "attn.c_attn.weight": full[block + "attn.c_attn.weight"][:2][:, first],
        block + "attn.c_attn.bias": full[block + "attn.c_attn.bias"][first],
        block + "attn.c_proj.weight": full[block + "attn.c_proj.weight"][:2, :2],
        block + "attn.c_proj.bias": full[block + "attn.c_proj.bias"][:2],
        block + "mlp.c_fc.weight": full[block + "mlp.c_fc.weight"][:2, :8],
        block + "mlp.c_fc.bias": full[block + "mlp.c_fc.bias"][:8],
        block + "mlp.c_proj.weight": full[block + "mlp.c_proj.weight"][:8, :2],
        block + "mlp.c_proj.bias": full[block + "mlp.c_proj.bias"][:2],
    } | {f"{block}ln_{i}.{part}": full[f"{block}ln_{i}.{part}"][:2] for i in (1, 2) for part in ("weight", "bias")}
    assert half.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(half[name], tensor), name


def test_half_width_computes_what_the_whole_does_whose_other_half_is_zero(tmp_path):
    """Exact for attention and MLP. Not for the layer norms: these divide by the norm of all dimensions."""
    source = random_model(n_head=4, dtype=torch.float64)
    C, full = source.config.n_embd, source.transformer.h[1]
    checkpoint.save(tmp_path / "source", source, "bytes", 0)
    half = pretrained.load_model(inherit.inherit(tmp_path / "source", ":", tmp_path / "half", width=0.5), torch.float64)
    assert (half.config.n_embd, half.config.n_head) == (C // 2, 2)
    x = torch.randn(2, 16, C // 2, dtype=torch.float64)
    whole = torch.cat([x, torch.zeros_like(x)], -1)
    with torch.no_grad():
        full.attn.c_proj.weight[:, C // 2 :] = 0  # what the other heads and units would add
        full.mlp.c_proj.weight[:, 2 * C :] = 0
        narrow = half.transformer.h[1]
        torch.testing.assert_close(narrow.attn(x), full.attn(whole)[..., : C // 2], rtol=0, atol=1e-12)
        torch.testing.assert_close(narrow.mlp(x), full.mlp(whole)[..., : C // 2], rtol=0, atol=1e-12)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float64).eval()
    idx = torch.randint(65, (2, 16))
    torch.testing.assert_close(theirs(idx).logits, half(idx), rtol=0, atol=1e-10)


@pytest.mark.parametrize("width", [0, 1.5, 0.3])
def test_a_width_without_a_whole_number_of_heads_is_refused(source, tmp_path, width):
    with pytest.raises(UserError, match=f"width {width}"):
        inherit.inherit(source, ":", tmp_path / "out", width=width)


def test_weights_that_are_not_finite_are_named_and_not_copied(source, tmp_path):
    tensors = weights(source)
    tensors["transformer.h.1.ln_1.weight"][3] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "manifest.json").unlink()
    with pytest.raises(UserError, match="h.1.ln_1.weight holds values that are not finite"):
        inherit.inherit(source, "0:2", tmp_path / "out")
