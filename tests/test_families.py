"""Other families of transformers, and GPT-2 as the hub has it, through train.py and the recipe."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, call_script, options, read_metrics, run_script
from safetensors.torch import load_file

import inherit
import inheritune
import sample
import train
from plumbing import checkpoint, pretrained, storage
from plumbing.configurator import UserError

transformers = pytest.importorskip("transformers")
SHAPE = {
    "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "pad_token_id": None,
    "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 256,
}  # fmt: skip
FAMILIES = {
    "Llama": {"num_key_value_heads": 2}, "Qwen3": {"num_key_value_heads": 2, "head_dim": 8}, "GPTNeoX": {},
    "Gemma3Text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1}, "Falcon": {},
}  # fmt: skip
FREE = {key: value for key, value in TINY.items() if key not in ("n_layer", "n_head", "n_embd", "vocab_size")}


def save(folder, config, data_dir, dtype=torch.float32):
    """A random model laid out like the hub's, with the tokenizer of the data."""
    torch.manual_seed(3)
    transformers.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    storage.copy_tokenizer(data_dir, folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory, data_dir):
    config = getattr(transformers, f"{request.param}Config")(**SHAPE | FAMILIES[request.param])
    return save(tmp_path_factory.mktemp(request.param), config, data_dir)


@pytest.fixture(scope="module")
def llama(tmp_path_factory, data_dir):
    return save(tmp_path_factory.mktemp("llama"), transformers.LlamaConfig(**SHAPE), data_dir)


@pytest.fixture(scope="module")
def hub_gpt2(tmp_path_factory, data_dir):
    """Half precision, biases, 64 positions, as the hub's GPT-2s."""
    shape = {"n_layer": 4, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 257}
    tokens = {"bos_token_id": 256, "eos_token_id": 256}
    config = transformers.GPT2Config(**shape, **tokens)
    return save(tmp_path_factory.mktemp("gpt2"), config, data_dir, torch.float16)


def run(init_from, data_dir, out_dir, **changes):
    settings = FREE | {"init_from": str(init_from), "data_dir": str(data_dir), "out_dir": str(out_dir)} | changes
    return train.train(train.TrainConfig(**settings))


def val_losses(run_dir) -> list[float]:
    return [line["val_loss"] for line in read_metrics(run_dir) if "val_loss" in line]


def test_loss_and_gradients_are_transformers_own(family):
    ours = pretrained.load_model(family, torch.float64)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(family, dtype=torch.float64)
    x, y = torch.randint(257, (2, 2, 32))
    ours(x, y).backward()
    logits = theirs.eval()(x).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    loss.backward()
    assert abs(ours(x, y) - loss) < 1e-10
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=0, atol=1e-10)


def test_training_lowers_the_loss_resumes_to_the_same_bits_and_opens_in_transformers(family, data_dir, tmp_path):
    straight = run(family, data_dir, tmp_path / "straight")
    losses = val_losses(tmp_path / "straight")
    assert losses[-1] < losses[0] - 0.3
    (tmp_path / "half").mkdir()
    (tmp_path / "straight/step-00000010").rename(tmp_path / "half/step-00000010")
    resumed = run(family, data_dir, tmp_path / "half", resume=True)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(straight)
    idx = torch.randint(257, (2, 32))
    torch.testing.assert_close(pretrained.load_model(straight)(idx), theirs.eval()(idx).logits, rtol=0, atol=0)
    assert transformers.AutoTokenizer.from_pretrained(straight).encode("def") == list(b"def")


def test_two_processes_equal_one(llama, data_dir, tmp_path):
    arguments = options(**FREE | {"dtype": "float64", "max_steps": 5, "init_from": llama, "data_dir": data_dir})
    assert call_script(train, *arguments, f"--out_dir={tmp_path}/one") == 0
    done = run_script("train.py", *arguments, f"--out_dir={tmp_path}/two", processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "step-00000005/model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("source", ["llama", "hub_gpt2"])
def test_a_trained_model_is_the_reference_of_a_recipe_that_is_killed_and_resumed(source, data_dir, tmp_path, request):
    """The identity target of all layers has the reference's loss to the last bit, before its first step."""
    model, out_dir = request.getfixturevalue(source), tmp_path / "out"
    settings = FREE | {"reference": model, "data_dir": data_dir, "out_dir": out_dir, "start_layers": 4, "sequences": 2}
    arguments = [*options(**settings | {"max_steps": 6, "save_interval": 2}), "--baselines", "random", "lazy layers"]
    process = subprocess.Popen([sys.executable, "inheritune.py", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(out_dir.glob("inherited-4/step-00000002")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert call_script(inheritune, *arguments) == 0
    reference, target = (val_losses(out_dir / run)[0] for run in ("reference", "inherited-4"))
    assert reference == target
    recipe, text = json.loads((out_dir / "recipe.json").read_text()), (out_dir / "report.md").read_text()
    assert [each["name"] for each in recipe["models"]] == ["reference", "inherited, 4 layers", "random", "lazy layers"]
    row = next(line for line in text.splitlines() if line.startswith("| inherited"))
    assert row.split("|")[5].strip() == row.split("|")[6].strip() == "?"  # what the reference cost is unknown
    assert "no smaller target" not in row  # none was tried
    random = pretrained.load_model(storage.latest(out_dir / "random-4"))
    assert random.config.n_layer == 4 and random.config.vocab_size == 257 and random.config.block_size == 32
    assert random.config.bias  # as the reference has them
    assert transformers.AutoModelForCausalLM.from_pretrained(storage.latest(out_dir / "lazy-layers-4"))


def test_a_shorter_context_is_the_first_positions_and_a_longer_one_is_refused(hub_gpt2):
    stored = load_file(hub_gpt2 / "model.safetensors")["transformer.wpe.weight"].float()
    cropped = pretrained.load_model(hub_gpt2, options={"block_size": 16})
    assert cropped.config.block_size == 16 and torch.equal(cropped.transformer.wpe.weight, stored[:16])
    meta = {"tokenizer": "bytes", "directory": str(hub_gpt2)}
    with pytest.raises(UserError, match="block_size: checkpoint 64, settings 128"):
        checkpoint.open_model(str(hub_gpt2), meta, torch.float32, {"block_size": 128})


def test_data_of_another_tokenizer_is_one_line_with_the_command_that_fits(llama, tmp_path, data_dir):
    other = save(tmp_path / "other", transformers.LlamaConfig(**SHAPE), data_dir)
    content = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(content.replace('"a": 97', '"a": 98').replace('"b": 98', '"b": 97'))
    with pytest.raises(UserError, match=f"prepare it anew with --tokenizer={other}"):
        run(other, data_dir, tmp_path / "out")
    (tmp_path / "corpus.txt").write_text("".join(f"line {i} ab\n" for i in range(400)))
    arguments = ["files", tmp_path / "corpus.txt", f"--tokenizer={other}", f"--out={tmp_path / 'data'}"]
    done = run_script("prepare_data.py", *arguments, "--sample_by=line", "--val_fraction=0.2")
    assert done.returncode == 0, done.stderr
    assert run(other, tmp_path / "data", tmp_path / "out", max_steps=2).name == "step-00000002"


def test_the_single_gpu_preset_runs_at_a_hundredth_of_its_size(hub_gpt2, data_dir, tmp_path):
    small = {
        "reference": hub_gpt2, "data_dir": data_dir, "out_dir": tmp_path / "out", "max_steps": 10,
        "warmup_steps": 1, "tokens_per_step": 256, "micro_batch": 4, "start_layers": 2, "tolerance": 9.0,
        "block_size": 32, "sequences": 2, "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    assert call_script(inheritune, "config/single_gpu.toml", *options(**small)) == 0
    assert "| random, twice the steps" in (tmp_path / "out/report.md").read_text()


def test_ranks_are_tracked_and_gradient_checkpointing_changes_no_weight(llama, data_dir, tmp_path):
    plain = run(llama, data_dir, tmp_path / "plain", max_steps=2)
    settings = {"max_steps": 2, "track_rank": True, "gradient_checkpointing": True}
    tracked = run(llama, data_dir, tmp_path / "tracked", **settings)
    assert (plain / "model.safetensors").read_bytes() == (tracked / "model.safetensors").read_bytes()
    line = next(line for line in read_metrics(tmp_path / "tracked") if "MaxRank" in line)
    assert len(line["MaxRank"]) == 4 and all(1 <= rank <= line["T"] for rank in line["MaxRank"])


def test_flops_count_each_weight_of_a_matrix_product_and_attention(llama):
    products = 4 * (4 * 32 * 32 + 3 * 32 * 48) + 257 * 32  # layers, and the head
    config = pretrained.load_model(llama).config
    assert config.flops_per_token() == 6 * products + 12 * 4 * 32 * 64  # 64 positions
    assert config.num_params() == products + 257 * 32 + 9 * 32 == pretrained.read_config(llama).num_params()


@pytest.mark.parametrize("name", ["half width", "attention and its norm"])
def test_a_baseline_that_is_for_gpt2_is_refused_before_the_first_step(llama, data_dir, tmp_path, name):
    settings = FREE | {"reference": str(llama), "data_dir": str(data_dir), "out_dir": str(tmp_path)}
    with pytest.raises(UserError, match=f"{name}: parts and width are for GPT-2"):
        inheritune.recipe(inheritune.RecipeConfig(**settings, start_layers=2, baselines=[name]))


def test_a_source_without_a_checkpoint_before_its_decay_is_refused(hub_gpt2, tmp_path):
    settings = FREE | {"reference": str(hub_gpt2), "out_dir": str(tmp_path)}
    from_the_first_step = FREE | {"n_layer": 4, "decay_fraction": 1.0, "schedule": "wsd", "warmup_steps": 0}
    for changes in (settings, from_the_first_step | {"out_dir": str(tmp_path)}):
        with pytest.raises(UserError, match="inherited, WSD: its source has no checkpoint before its decay"):
            inheritune.recipe(inheritune.RecipeConfig(**changes, start_layers=2, once=["inherited, WSD"]))


def test_text_is_never_written_with_the_tokens_of_another_family(llama, tmp_path, capsys):
    """A Llama without tokenizer files is refused. sample.py takes gpt2's tokens for a GPT-2 alone."""
    bare = shutil.copytree(llama, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "manifest.json"):
        (bare / name).unlink(missing_ok=True)
    assert call_script(sample, bare, "--max_new_tokens=1", "--device=cpu") == 2
    assert f"tokenizer '{bare}': " in capsys.readouterr().err


def test_a_number_of_layers_that_a_trained_reference_does_not_have_is_refused(hub_gpt2):
    with pytest.raises(UserError, match="n_layer is 6, but .* has 4 layers"):
        inheritune.RecipeConfig(**FREE | {"reference": str(hub_gpt2), "n_layer": 6})


def test_parts_of_another_family_are_refused(llama, tmp_path):
    with pytest.raises(UserError, match="parts and width are for GPT-2, and .* is 'llama'"):
        inherit.inherit(llama, "0:2", tmp_path / "out", parts="ln_1,attn")
