"""Tokenizers by name, and the tokenizer.json of a checkpoint for transformers, which gives the same ids.

    python -c "from plumbing.tokenizers import tokenizer; print(tokenizer('bytes').encode_ordinary('def'))"
    python prepare_data.py python --tokenizer=HuggingFaceTB/SmolLM2-135M --out=data/smol

prepare_data.py writes the files beside the tokens, and train.py copies them into each checkpoint.
"""

import itertools
from pathlib import Path

import numpy as np
import tiktoken

from plumbing import storage
from plumbing.configurator import UserError

END_OF_TEXT = "<|endoftext|>"


class HuggingFaceTokenizer:
    """The tokenizer.json in a directory, with tiktoken's names. UserError where it has no end-of-text."""

    def __init__(self, name: str, folder: Path):
        try:
            import tokenizers  # optional: only text for other models needs it

            self.rust = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exceptions
            raise UserError(f"{folder}/tokenizer.json: {error}; pip install tokenizers, or fix it") from None
        self.rust.encode_special_tokens = True  # text cannot forge a special token
        self.name, self.folder = name, folder
        self.n_vocab = 1 + max(self.rust.get_vocab().values())
        first, alone = (self.rust.encode("a", add_special_tokens=on).ids for on in (True, False))
        self.begin = first[: first.index(alone[0])]  # [bos] of models that were trained with one
        settings = folder / "tokenizer_config.json"
        token = storage.read_json(settings).get("eos_token") if settings.is_file() else None
        self.eot_token = self.rust.token_to_id((token["content"] if isinstance(token, dict) else token) or "")
        if self.eot_token is None:
            raise UserError(f"{settings}: eos_token is {token!r}, expected a token of the tokenizer.json")

    def encode_ordinary(self, text: str) -> list[int]:
        return self.rust.encode(text, add_special_tokens=False).ids

    def encode_to_numpy(self, text: str, disallowed_special=()) -> np.ndarray:
        # a batch of one: unlike encode(), encode_batch() lets other threads run
        return np.array(self.rust.encode_batch([text], add_special_tokens=False)[0].ids, np.uint32)

    def decode(self, ids: list[int]) -> str:
        return self.rust.decode(ids, skip_special_tokens=False)


def tokenizer(name: str | Path):
    """`bytes` (256 bytes and end-of-text), a name of tiktoken, or a Hugging Face directory. UserError."""
    if name == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
        # there is nothing to merge: the pattern only cuts the text into short pieces, for speed
        return tiktoken.Encoding(
            "bytes", pat_str=r"(?s).{1,64}", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256}
        )
    try:
        if name in tiktoken.list_encoding_names():
            return tiktoken.get_encoding(name)
        return HuggingFaceTokenizer(str(name), storage.resolve(name, "tokenizer.json"))
    except UserError as error:
        names = ", ".join(["bytes", *tiktoken.list_encoding_names()])
        raise UserError(f"tokenizer {str(name)!r}: {error}; known: {names}, or such a directory") from None
    except OSError as error:  # the errors of requests are OSErrors
        raise UserError(
            f"tokenizer {name!r} could not be downloaded ({type(error).__name__}); connect once, set "
            "TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=bytes"
        ) from None


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte: Latin-1 where it is printable, else a letter from U+0100 on.

    https://github.com/openai/gpt-2/blob/master/src/encoder.py, bytes_to_unicode
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + i) for i in range(256 - len(printable)))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that are merged into this one: byte pair encoding, stopped before the last merge."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        merged = [left + right for left, right in itertools.pairwise(parts)]
        i = min(range(len(merged)), key=lambda i: ranks.get(merged[i], len(ranks)))  # the merge learned first
        parts[i : i + 2] = [merged[i]]
    return parts


def of_directory(directory: Path, name: str | None):
    """The tokenizer of a data directory or model: the one named, else its tokenizer.json, else GPT-2's."""
    known = name == "bytes" or name in tiktoken.list_encoding_names()
    return tokenizer(directory if (directory / "tokenizer.json").is_file() and not known else name or "gpt2")


def write_files(encoding, directory: Path):
    """Write what transformers reads a tokenizer from: copied, or made for `bytes` and `gpt2`."""
    if isinstance(encoding, HuggingFaceTokenizer):
        return storage.copy_tokenizer(encoding.folder, directory)
    if encoding.name not in ("bytes", "gpt2"):
        print(f"warning: no tokenizer.json is known for {encoding.name!r}; name it to tools that need it")
        return
    ranks, letters = encoding._mergeable_ranks, byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [" ".join(spelled[half] for half in halves(token, ranks)) for token in ranks if len(token) > 1]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    tokenizer_json = {
        "version": "1.0",
        "added_tokens": [{"id": encoding.eot_token, "content": END_OF_TEXT} | flags],
        # GPT-2's pattern cuts the text into words; without merges there is no need to cut
        "pre_tokenizer": byte_level | {"use_regex": bool(merges)},
        "decoder": byte_level | {"use_regex": False},
        "model": {"type": "BPE", "vocab": {spelled[t]: ranks[t] for t in ranks}, "merges": merges},
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # text cannot forge an end-of-text
    }
    none = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    storage.write_json(directory / "tokenizer_config.json", tokenizer_config)
    storage.write_json(directory / "tokenizer.json", tokenizer_json | none)
