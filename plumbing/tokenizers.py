"""Tokenizers by name, and the tokenizer.json of a checkpoint for transformers, with the same ids.

    python -c "from plumbing.tokenizers import tokenizer; print(tokenizer('gpt2').encode('def'))"
    python prepare_data.py python --tokenizer=HuggingFaceTB/SmolLM2-135M --out=data/smol

prepare_data.py writes the files beside the tokens, and train.py copies them into each checkpoint.
"""

from pathlib import Path

import numpy as np
import tiktoken
import tokenizers

from plumbing import model_files, storage
from plumbing.configurator import UserError

END_OF_TEXT = "<|endoftext|>"
KNOWN = ["bytes", *tiktoken.list_encoding_names()]


class HuggingFaceTokenizer:
    """The tokenizer.json in a directory, with tiktoken's names. UserError without end-of-text."""

    def __init__(self, name: str, folder: Path):
        try:
            self.rust = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exceptions
            raise UserError(f"{folder}/tokenizer.json: {error}; fix or replace it") from None
        self.rust.encode_special_tokens = True  # text cannot forge a special token
        self.name, self.folder = name, folder
        self.n_vocab = 1 + max(self.rust.get_vocab().values())
        first, alone = (self.rust.encode("a", add_special_tokens=on).ids for on in (True, False))
        self.begin = first[: first.index(alone[0])]  # [bos] of models that were trained with one
        token = storage.read_json(folder / "tokenizer_config.json").get("eos_token", END_OF_TEXT)
        content = token["content"] if isinstance(token, dict) else token  # GPT-2's file has none
        self.eot_token = self.rust.token_to_id(content or "")
        if self.eot_token is None:
            raise UserError(f"{folder}: eos_token is {token!r}, expected one of tokenizer.json's")

    def encode_to_numpy(self, text: str, disallowed_special=()) -> np.ndarray:
        # a batch of one: unlike encode(), encode_batch() lets other threads run
        encoded = self.rust.encode_batch([text], add_special_tokens=False)[0]
        return np.array(encoded.ids, np.uint32)

    def encode_ordinary(self, text: str) -> list[int]:
        return self.encode_to_numpy(text).tolist()

    def decode(self, ids: list[int]) -> str:
        return self.rust.decode(ids, skip_special_tokens=False)


def tokenizer(name: str | Path):
    """`bytes` (256 and end-of-text), a name of tiktoken, or a Hugging Face directory. UserError."""
    if name == "bytes":
        # there is nothing to merge: the pattern only cuts the text into short pieces, for speed
        return tiktoken.Encoding(
            name,
            pat_str=r"(?s).{1,64}",
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={END_OF_TEXT: 256},
        )
    try:
        if name in KNOWN:
            return tiktoken.get_encoding(name)
        return HuggingFaceTokenizer(str(name), model_files.resolve(name, "tokenizer.json"))
    except (UserError, OSError) as error:  # the errors of requests are OSErrors
        raise UserError(
            f"tokenizer {str(name)!r}: {error}; known: {', '.join(KNOWN)}, and models of the hub; "
            "offline, set TIKTOKEN_CACHE_DIR or HF_HOME to a folder that has it"
        ) from None


# ---- tokenizer.json


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte: Latin-1 where it is printable, else one from U+0100 on."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    others = (letter for letter in alphabet if ord(letter) >= 0x100)
    return [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]


def write_files(encoding, directory: Path):
    """Write what transformers reads a tokenizer from: copied, or made for `bytes` and `gpt2`."""
    if isinstance(encoding, HuggingFaceTokenizer):
        return storage.copy_tokenizer(encoding.folder, directory)
    if encoding.name not in ("bytes", "gpt2"):
        print(f"warning: no tokenizer.json is known for {encoding.name!r}; tools may ask for one")
        return
    ranks, letters = encoding._mergeable_ranks, byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    # like tiktoken, merge any two tokens that make a third
    pairs = [(token[:i], token[i:]) for token in ranks for i in range(1, len(token))]
    pairs = [pair for pair in pairs if ranks.keys() >= set(pair)]
    merges = [(spelled[left], spelled[right]) for left, right in pairs]
    rust = tokenizers.Tokenizer(tokenizers.models.BPE({spelled[t]: ranks[t] for t in ranks}, merges))
    rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's words
    rust.decoder = tokenizers.decoders.ByteLevel()
    rust.add_special_tokens([END_OF_TEXT])  # the next id
    rust.save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # text cannot forge an end-of-text
    }
    storage.write_json(directory / "tokenizer_config.json", tokenizer_config)
