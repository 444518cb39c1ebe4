"""plumbing/decoders.py: matrices, text and begin-of-text tokens of other families; no foreign code runs."""

import json
import math
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file

import analyze_attention
from plumbing import decoders, pretrained
from plumbing.configurator import UserError

SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.3,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "Llama": {"num_key_value_heads": 2}, "Qwen3": {"num_key_value_heads": 2, "head_dim": 8}, "GPTNeoX": {},
    "Lfm2": {}, "Falcon": {}, "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1}, "Gemma3Text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
}  # fmt: skip


def tiny(family: str, **changes):
    """A randomly initialised model of a family of transformers, with eager attention."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**SHAPE | changes)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def wrapped(hf) -> decoders.Decoder:
    return decoders.Decoder(hf, {}, None, 0.0).eval()


def save(folder: Path, family: str, documents: list[str], bos: bool, **changes) -> Path:
    """A tiny model on disk with a tokenizer of its own, which may put a begin-of-text token in front."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    special = ["<end>", "<bos>"]
    tokenizer.train_from_iterator(documents, vocab_size=290, special_tokens=special, show_progress=False)
    if bos:
        tokenizer._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token="<end>", bos_token="<bos>"
    )
    tiny(family, **FAMILIES[family] | changes).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory, documents) -> Path:
    return save(tmp_path_factory.mktemp("llama"), "Llama", documents, bos=False)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "GPTNeoX", "Gemma3Text", "Falcon", "OPT"])
def test_the_matrices_are_the_family_s_own_output_attentions(family):
    model, idx, found = tiny(family, **FAMILIES[family]), torch.randint(300, (3, 40)), {}
    analyze_attention.visit_attention(wrapped(model), idx, found.__setitem__)
    with torch.no_grad():
        own = model(idx, output_attentions=True).attentions
    assert list(found) == [0, 1, 2]
    for layer, matrices in enumerate(own):
        torch.testing.assert_close(found[layer], matrices)


def test_flops_of_attention_are_those_of_the_heads_own_size():
    """Qwen3 and Gemma may have heads whose sizes do not add up to n_embd: here 4 x 16 beside 32."""
    model = tiny("Qwen3", **FAMILIES["Qwen3"] | {"head_dim": 16})
    products = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    assert wrapped(model).config.flops_per_token() == 6 * products + 12 * 3 * (4 * 16) * 128


@pytest.mark.parametrize("family", ["Llama", "ours"])
def test_a_layer_s_matrices_are_gone_before_the_next_layer_has_its_own(family):
    ours = family == "ours"
    model = (
        random_model(n_layer=6, block_size=20, dtype=torch.float32)
        if ours
        else wrapped(tiny(family, num_hidden_layers=6))
    )
    given, alive = [], []

    def visit(layer, matrices):
        alive.append([reference() is not None for reference in given])
        given.append(weakref.ref(matrices))

    analyze_attention.visit_attention(model, torch.randint(60, (2, 20)), visit)
    assert len(given) == 6 and not any(map(any, alive))


def test_layers_without_attention_are_not_visited_and_a_model_without_any_is_refused():
    kinds = ["conv", "full_attention", "conv"]
    hybrid, found = tiny("Lfm2", num_key_value_heads=2, block_multiple_of=1, layer_types=kinds), {}
    analyze_attention.visit_attention(wrapped(hybrid), torch.randint(300, (2, 20)), found.__setitem__)
    assert list(found) == [1]
    with pytest.raises(UserError, match="MambaForCausalLM has no attention matrix"):
        analyze_attention.visit_attention(
            wrapped(tiny("Mamba", state_size=4)), torch.randint(300, (2, 20)), found.__setitem__
        )


@pytest.mark.parametrize("what", ["negative", "above the diagonal", "sums", "nan"])
def test_what_is_no_causal_attention_matrix_is_one_line_that_names_the_layer(what, monkeypatch):
    model = random_model(dtype=torch.float32)
    module = model.transformer.h[1].attn
    original = module.attention_weights

    def broken(q, k):
        A = original(q, k).clone()
        if what == "negative":  # the rows still sum to 1
            A[:, 1, 3, 0], A[:, 1, 3, 1] = A[:, 1, 3, 0] + A[:, 1, 3, 1] + 0.1, -0.1
        A[:, 1, 3, 3] += {"sums": 0.1, "nan": math.nan}.get(what, 0)
        return A.roll(1, -1) if what == "above the diagonal" else A

    monkeypatch.setattr(module, "attention_weights", broken)
    with pytest.raises(UserError, match="layer 1: no causal attention matrix") as caught:
        analyze_attention.measure(model, torch.zeros(2, 8, dtype=torch.long), [], 2)
    assert caught.value.exit_code == 1


def test_text_of_a_different_tokenizer_is_refused_with_the_command_that_prepares_it(llama, data_dir, tmp_path):
    config = analyze_attention.AnalyzeConfig(str(llama), data_dir=str(data_dir), out=str(tmp_path / "out"))
    with pytest.raises(UserError, match=f"--tokenizer={llama}"):
        analyze_attention.analyze(config)
    assert not (tmp_path / "out").exists()


def test_an_untrained_model_has_the_shape_but_not_the_weights(llama):
    trained, fresh = pretrained.load_model(llama).stored_tensors(), pretrained.load_model(llama, fresh=True).stored_tensors()
    key = "model.layers.1.self_attn.k_proj.weight"
    assert trained.keys() == fresh.keys() and not torch.equal(trained[key], fresh[key])
    assert trained[key].shape == fresh[key].shape and trained[key].dtype == torch.float32


def test_the_first_gpt_whose_attention_returns_a_list_is_measured():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.OpenAIGPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=65)
    hf, idx, seen = transformers.AutoModelForCausalLM.from_config(config).eval(), torch.arange(20)[None], []
    decoders.Decoder(hf, {}, 32, 0.0).visit_attention(idx, lambda layer, A: seen.append(A))
    hf.set_attn_implementation("eager")
    expected = hf(idx, output_attentions=True).attentions
    assert len(seen) == 2 and all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_code_that_comes_with_a_model_is_not_run(llama, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(llama, tmp_path / "trap")
    (folder / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    names = {"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.C", "AutoTokenizer": ["trap.C", "trap.C"]}
    for model_type in ("llama", "nobody"):
        table = json.loads((llama / "config.json").read_text()) | {
            "model_type": model_type,
            "auto_map": names,
        }
        (folder / "config.json").write_text(json.dumps(table))
        monkeypatch.setattr("builtins.input", lambda *_: "y")
        if model_type == "llama":
            pretrained.load_model(folder)
            assert "the code that comes with it (auto_map) is not run" in capsys.readouterr().out
        else:
            with pytest.raises(UserError, match="trust_remote_code|custom code"):
                pretrained.load_model(folder)
    assert not (tmp_path / "ran").exists()


def test_what_is_wrong_with_a_model_of_another_family_is_one_line(llama, tmp_path, monkeypatch):
    def error(folder) -> str:
        with pytest.raises(UserError) as caught:
            pretrained.load_model(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
        return str(caught.value)

    incomplete = shutil.copytree(llama, tmp_path / "incomplete")
    tensors = load_file(incomplete / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, incomplete / "model.safetensors", metadata={"format": "pt"})
    assert "no weights for model.layers.1.self_attn.k_proj.weight" in error(incomplete)

    pickled = shutil.copytree(llama, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(llama / "model.safetensors"), pickled / "pytorch_model.bin")
    assert "safetensors" in error(pickled)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "transformers (pip install it)" in error(llama)
