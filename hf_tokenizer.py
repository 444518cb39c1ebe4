"""The tokenizer of a checkpoint as transformers reads it: tokenizer.json, tokenizer_config.json. Same ids as data.py's.

    python -c "import hf_tokenizer; print(*hf_tokenizer.files('bytes', 1024))"
    python -c "import transformers; print(transformers.AutoTokenizer.from_pretrained('out/...').encode('def main('))"

Written by hand from tiktoken's ranks, so training needs neither transformers nor tokenizers. Only for `bytes` and
`gpt2`: the other names that tiktoken knows cut text by patterns that tokenizers may read in another way.
"""

import functools
import itertools

from configurator import UserError
from data import END_OF_TEXT, tokenizer


def byte_letters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where Latin-1 prints it, or else a letter from U+0100 on.

    https://github.com/openai/gpt-2/blob/master/src/encoder.py, bytes_to_unicode
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + i) for i in range(256 - len(printable)))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens whose merge makes this one: byte pair encoding of it, stopped before the last merge."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        merged = [left + right for left, right in itertools.pairwise(parts)]
        i = min(range(len(merged)), key=lambda i: ranks.get(merged[i], len(ranks)))  # the earliest learned comes first
        parts[i : i + 2] = [merged[i]]
    return parts


@functools.lru_cache  # GPT-2's 50,000 merges take a second, once a run
def files(name: str, block_size: int) -> dict[str, dict]:
    """File name -> content; nothing, with a warning, for a tokenizer that cannot be had: that is no reason to stop."""
    if name not in ("bytes", "gpt2"):
        print(f"warning: no tokenizer.json for {name!r}; give its name to tools that read text")
        return {}
    try:
        encoding = tokenizer(name)
    except UserError as error:
        print(f"warning: the checkpoints will have no tokenizer.json: {error}")
        return {}
    ranks, letters = encoding._mergeable_ranks, byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [" ".join(spelled[half] for half in halves(token, ranks)) for token in ranks if len(token) > 1]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
            "added_tokens": [{"id": encoding.eot_token, "content": END_OF_TEXT} | flags],
            # GPT-2's pattern cuts the text into words; where nothing is merged, there is nothing to cut
            "pre_tokenizer": byte_level | {"use_regex": bool(merges)},
            "decoder": byte_level | {"use_regex": False},
            "model": {"type": "BPE", "vocab": {spelled[token]: ranks[token] for token in ranks}, "merges": merges},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
            "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # text cannot forge an end-of-text, as in the training data
        },
    }  # fmt: skip
