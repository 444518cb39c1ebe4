"""Tokenizers by name, and the tokenizer.json of a checkpoint for transformers, which gives the same ids.

    python -c "from plumbing.tokenizers import tokenizer; print(tokenizer('bytes').encode_ordinary('def'))"
    python -c "import transformers as t; print(t.AutoTokenizer.from_pretrained('out/...').encode('def'))"
"""

import functools
import itertools

import tiktoken

from plumbing.configurator import UserError

END_OF_TEXT = "<|endoftext|>"


def tokenizer(name: str) -> tiktoken.Encoding:
    """`bytes` has 256 bytes and end-of-text. Any other name is tiktoken's. Raises UserError."""
    if name == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
        # there is nothing to merge: the pattern only cuts the text into short pieces, for speed
        return tiktoken.Encoding(
            "bytes", pat_str=r"(?s).{1,64}", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256}
        )
    try:
        return tiktoken.get_encoding(name)
    except ValueError:
        names = ", ".join(["bytes", *tiktoken.list_encoding_names()])
        raise UserError(f"unknown tokenizer {name!r}; known: {names}") from None
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


@functools.lru_cache  # GPT-2's 50,000 merges take a second
def hf_files(name: str, block_size: int) -> dict[str, dict]:
    """File name -> JSON content, for `bytes` and `gpt2`. Other names get no files, with a warning."""
    try:
        encoding = tokenizer(name if name in ("bytes", "gpt2") else "")
    except UserError:
        print(f"warning: the checkpoints have no tokenizer.json for {name!r}; name it to tools that need it")
        return {}
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
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
        "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # text cannot forge an end-of-text
    }
    none = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {"tokenizer.json": tokenizer_json | none, "tokenizer_config.json": tokenizer_config}
