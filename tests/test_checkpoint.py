"""checkpoint.py and storage.py: other tools open it, damage is seen, nothing is taken silently."""

import fnmatch
import json
import os
import stat
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, random_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from plumbing import checkpoint, model_files, pretrained, resume, storage
from plumbing.configurator import UserError


def equal(a, b) -> bool:
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    return all(name == other and torch.equal(p, q) for (name, p), (other, q) in pairs)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with biases, without a manifest to be able to change it."""
    model = random_model(bias=True, dtype=torch.float32)
    checkpoint.save(tmp_path / "saved", model, "bytes", 0)
    (tmp_path / "saved" / "manifest.json").unlink()
    return tmp_path / "saved", model


def change_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    save_file(change(tensors) or tensors, path / "model.safetensors")


@pytest.mark.parametrize("bias", [False, True])
def test_save_load_and_transformers_roundtrip_are_bit_equal(tmp_path, bias):
    model = random_model(bias=bias, dtype=torch.float32, scale_attn_by_inverse_layer_idx=True)
    checkpoint.save(tmp_path / "ours", model, "bytes", 0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert (theirs(torch.arange(16)[None]).logits - model(torch.arange(16)[None])).abs().max() < 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    for path in (tmp_path / "ours", tmp_path / "theirs"):
        loaded = pretrained.load_model(path)
        assert equal(loaded, model) and loaded.config == model.config


def test_keys_without_prefix_and_with_mask_buffers_load_as_openai_stores_them(saved):
    path, model = saved
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(3)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    change_tensors(path, lambda tensors: {k.removeprefix("transformer."): v for k, v in tensors.items()} | masks)
    assert equal(pretrained.load_model(path), model)


def test_a_head_of_its_own_loads_if_it_equals_the_embedding_and_not_otherwise(saved):
    path, model = saved
    change_tensors(path, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"].clone()})
    assert equal(pretrained.load_model(path), model)
    change_tensors(path, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1})
    with pytest.raises(UserError, match=r"lm_head.weight differs"):
        pretrained.load_model(path)


def test_sharded_files_load(saved):
    path, model = saved
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(path.parent / "shards", max_shard_size="20KB")
    assert len(list((path.parent / "shards").glob("*.safetensors"))) > 1
    assert equal(pretrained.load_model(path.parent / "shards"), model)


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda t: t.pop("transformer.wpe.weight") is None, "Missing key.* \"transformer.wpe.weight\""),
        (lambda t: t.update({"transformer.h.3.ln_1.weight": torch.ones(32)}), "Unexpected key.* \"transformer.h.3.ln_1.weight\""),
        (lambda t: t.update({"transformer.wpe.weight": torch.ones(9, 32)}), r"wpe.weight: copying .*\[9, 32\].*\[16, 32\]"),
    ],
)
def test_every_tensor_must_be_there_once_in_its_shape(saved, change, words):
    path, _ = saved
    change_tensors(path, lambda tensors: change(tensors) and None)
    with pytest.raises(UserError, match=words):
        pretrained.load_model(path)


@pytest.mark.parametrize("key,value", [("n_inner", 100), ("n_head", 5), ("n_positions", 9)])
def test_a_config_that_the_tensors_do_not_fit_is_refused(saved, key, value):
    path, _ = saved
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError):
        pretrained.load_model(path)


@pytest.mark.parametrize(
    "key,value",
    [("activation_function", "gelu"), ("layer_norm_epsilon", 1e-3), ("scale_attn_weights", False)],
)
def test_a_gpt2_that_model_py_would_compute_differently_is_computed_by_transformers(saved, key, value):
    path, model = saved
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {key: value}))
    idx = torch.randint(65, (2, 16))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(idx).logits
    torch.testing.assert_close(pretrained.load_model(path)(idx), theirs)
    assert (theirs - model.float()(idx)).abs().max() > 1e-4


def test_a_model_whose_biases_are_no_longer_zero_loads_as_one_with_biases(saved):
    """Fine-tuning in transformers, which always has biases, moves those of a model without."""
    path, model = saved
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"bias": False}))
    assert equal(pretrained.load_model(path), model)


@pytest.mark.parametrize("wrong", [{"bias": "false"}, {"n_layer": 3.0}, {"n_layer": "3"}])
def test_values_of_config_json_have_to_be_of_their_types(saved, wrong):
    path, _ = saved
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | wrong))
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is .*, expected"):
        pretrained.load_model(path)


def test_a_stray_index_beside_the_weights_is_not_read(saved):
    path, model = saved
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"transformer.wte.weight": "other"}}')
    assert equal(pretrained.load_model(path), model)


def test_pickles_are_never_opened(saved):
    path, _ = saved
    (path / "model.safetensors").unlink()
    torch.save({}, path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickles such as"):
        pretrained.load_model(path)


@pytest.mark.parametrize(
    "file,content,words",
    [
        ("config.json", "[]", "found a list, expected a JSON object"),
        ("config.json", '{"model_type": "gpt2", "n_layer": "x"}', "no n_head"),
        ("model.safetensors.index.json", '{"weight_map": {"transformer.wte.weight": "gone"}}', "not a readable"),
    ],
)
def test_a_foreign_directory_that_is_not_right_is_one_line(saved, file, content, words):
    path, _ = saved
    (path / file).write_text(content)
    if "index" in file:
        (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=words):
        pretrained.load_model(path)


@pytest.mark.parametrize("name,words", [("no/where/at/all", "is no checkpoint"), ("no-such-model", "is no checkpoint"), ("tests/modle", "is no checkpoint")])
def test_a_name_that_is_nothing_is_one_line(name, words):
    with pytest.raises(UserError, match=words):
        model_files.resolve(name)


def test_a_value_that_is_not_finite_is_not_saved(tmp_path):
    model = random_model()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="c_fc.weight holds values that are not finite"):
        checkpoint.save(tmp_path / "bad", model, "bytes", 0)
    assert list(tmp_path.iterdir()) == []


def test_a_moment_that_is_not_finite_is_not_saved(tmp_path):
    model = random_model(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).backward()
    optimizer.step()
    optimizer.state[model.transformer.ln_f.weight]["exp_avg"][0] = float("nan")
    with pytest.raises(UserError, match=r"ln_f.weight\|exp_avg holds values that are not finite"):
        checkpoint.save(tmp_path / "bad", model, "bytes", 0, optimizer)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_the_manifest_does_not_list_are_not_read(tmp_path):
    checkpoint.save(tmp_path / "a", random_model(), "bytes", 0)
    (tmp_path / "a/model.safetensors.index.json").write_text('{"weight_map": {"x": "elsewhere"}}')
    with pytest.raises(UserError, match="model.safetensors.index.json: .* not listed"):
        pretrained.load_model(tmp_path / "a")


def test_a_gpt2_with_a_vocabulary_of_its_own_is_not_taken_for_openai_s(saved, data_dir):
    path, _ = saved
    config = json.loads((path / "config.json").read_text())
    del config["tokenizer"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "vocab.json").write_text('{"der": 0, "die": 1}')
    with pytest.raises(UserError, match=f"{path} reads tokens of '{path}', the data in .* those of 'gpt2'"):
        pretrained.check_tokenizer(path, {"tokenizer": "gpt2", "directory": str(data_dir)})


@pytest.mark.parametrize("size,named", [(65, "'{path}'"), (50257, "'gpt2'")])
def test_a_gpt2_without_a_tokenizer_is_taken_for_openai_s_only_with_its_vocabulary(saved, data_dir, size, named):
    path, _ = saved
    config = json.loads((path / "config.json").read_text()) | {"vocab_size": size}
    del config["tokenizer"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"reads tokens of {named.format(path=path)}, the data in .* those of 'bytes'"):
        pretrained.check_tokenizer(path, {"tokenizer": "bytes", "directory": str(data_dir)})


def test_llama_cpp_finds_the_length_that_it_reads(saved):
    assert json.loads((saved[0] / "config.json").read_text())["n_ctx"] == 16


def test_the_hub_is_asked_for_what_is_needed_and_not_for_a_misspelt_path(monkeypatch):
    asked = []

    def download(name, **options):
        asked.append((name, options))
        raise OSError("gated")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError, match=r"OSError: gated; a gated or private model .* HF_TOKEN"):
        model_files.resolve("nobody/nothing")
    for misspelt in ("tests/modle", str(ROOT / "out/tow")):
        with pytest.raises(UserError, match="is no checkpoint"):
            model_files.resolve(misspelt)
    [(name, options)] = asked
    wanted = ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "chat_template.jinja", "own.py"]
    found = [any(fnmatch.fnmatch(file, each) for each in options["allow_patterns"]) for file in wanted]
    assert name == "nobody/nothing" and all(found)
    others = ["consolidated.safetensors", "pytorch_model.bin", "my_hf_token.txt"]
    assert not any(fnmatch.fnmatch(file, each) for file in others for each in options["allow_patterns"])


def test_two_processes_that_write_the_same_file_do_not_meet(tmp_path):
    code = f"from plumbing import storage; p = storage.Path({str(tmp_path / 'a')!r}); [storage.write_text(p, 'x') for _ in range(300)]"
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0] and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left on device: .*report.md"):
        storage.write_text(tmp_path / "report.md", "x")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_checkpoint_is_never_overwritten(tmp_path):
    checkpoint.save(tmp_path / "a", random_model(), "bytes", 0)
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        checkpoint.save(tmp_path / "a", random_model(seed=1), "bytes", 0)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before


def test_file_modes_follow_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        checkpoint.save(tmp_path / "a", random_model(), "bytes", 0)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "a").iterdir()} == {0o644}


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full_disk)
    with pytest.raises(UserError, match="No space left") as caught:
        checkpoint.save(tmp_path / "a", random_model(), "bytes", 0)
    assert caught.value.exit_code == 1 and list(tmp_path.iterdir()) == []


def test_a_run_whose_checkpoints_are_all_damaged_is_left_alone(tmp_path):
    checkpoint.save(tmp_path / "step-00000001", random_model(n_layer=1), "bytes", 0)
    (tmp_path / "step-00000001" / "manifest.json").write_text("[]")
    for how in (True, "auto"):
        with pytest.raises(UserError, match=r"no usable checkpoint .*1 damaged.*change out_dir"):
            resume.to_resume(tmp_path, how)
    assert (tmp_path / "step-00000001" / "model.safetensors").exists()


@settings(max_examples=30)
@given(
    states=st.lists(st.sampled_from(["whole", "no manifest", "foreign", "trash"]), max_size=6),
    keep=st.integers(1, 3),
)
def test_pruning_keeps_the_newest_whole_ones_and_touches_nothing_else(tmp_path_factory, states, keep):
    run_dir, whole = tmp_path_factory.mktemp("prune"), []
    for i, state in enumerate(states):
        name = {"foreign": f"step-{i}-mine", "trash": f".trash-step-{i:08d}"}.get(state, f"step-{i:08d}")
        (run_dir / name).mkdir()
        (run_dir / name / "a").write_text("abc")
        if state != "no manifest":
            storage.write_json(run_dir / name / "manifest.json", {"format": 1, "files": {"a": [3, "0" * 64]}})
        whole += [name] * (state == "whole")
    before = {path.name for path in run_dir.iterdir()}
    storage.prune(run_dir, keep, 99)
    assert {path.name for path in run_dir.iterdir()} == before - set(whole[:-keep])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with two checkpoints."""
    run_dir = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        checkpoint.save(run_dir / f"step-{step:08d}", random_model(seed=step, n_layer=1), "bytes", 0)
    return run_dir


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_and_any_truncation_is_seen_and_the_older_checkpoint_taken(run_dir, data):
    newest = run_dir / "step-00000002"
    file = data.draw(st.sampled_from(sorted(newest.iterdir())))
    content = file.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        damaged = content[:position]
    else:
        damaged = (
            content[:position] + bytes([content[position] ^ data.draw(st.integers(1, 255))]) + content[position + 1 :]
        )
    assert storage.latest(run_dir) == newest
    file.write_bytes(damaged)
    try:
        # a byte of the manifest may change without changing its meaning
        harmless = file.name == "manifest.json" and storage.latest(run_dir) == newest
        assert harmless or storage.latest(run_dir) in (run_dir / "step-00000001", None)
        assert not harmless or json.loads(damaged)["files"] == json.loads(content)["files"]
    finally:
        file.write_bytes(content)




def test_only_the_leftovers_of_the_same_output_are_cleared_away(tmp_path):
    for name in (".tmp-half", ".tmp-half-2"):  # the second is of an output "half-2", being written
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    checkpoint.save(tmp_path / "half", random_model(n_layer=1), "bytes", 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-half-2", "half"]
    storage.verify(tmp_path / "half")
    assert not (tmp_path / "half/old").exists()
