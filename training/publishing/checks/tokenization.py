"""The tokenizer ends every text with a token by itself, alone as servers use it and through transformers.

That token is EOS, or another that the model was started with: Qwen3-Embedding's tokenizer appends ``<|endoftext|>``. A
text that ends with the token already gets a second one: the post-processor looks at no text. The last token is the same
either way, and both ways of tokenising do the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from training.common.errors import in_one_line
from training.publishing.checks.packed import (
    CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Finding,
    PackedFolder,
    UnreadableError,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_APPEND = "let append_eos of modeling_f2llm set its post-processor and save it again"
_TEXTS = ("a", "Where do pandas live?", "大熊猫生活在四川的山林里。", "تعيش الباندا في الغابات", "")
# Longer than what either tokenizer truncates to here.
_SHORT = 8


def check_eos(packed: PackedFolder) -> Iterator[Finding]:
    """The ``tokenizers`` library alone appends a token once, to each text of a pair, too, and when it truncates."""
    tokenizer = _tokenizer(packed)
    if _id(packed, tokenizer, "eos_token") is None:
        yield Finding(TOKENIZER_CONFIG, "names no EOS token that tokenizer.json has", _APPEND)
        return
    tokenizer.no_truncation()
    tokenizer.no_padding()
    eos = _end(packed, tokenizer)
    for text in _TEXTS:
        count = _trailing(tokenizer.encode(text).ids, eos)
        if count != 1:
            yield Finding(TOKENIZER, f"appends EOS {count} times to a text, not once", _APPEND)
            return
    first, second = (tokenizer.encode(text).ids for text in _TEXTS[:2])
    if tokenizer.encode(*_TEXTS[:2]).ids != first + second:
        yield Finding(TOKENIZER, "does not end each text of a pair with EOS", _APPEND)
    tokenizer.enable_truncation(_SHORT)
    truncated = tokenizer.encode(_long_text()).ids
    if len(truncated) != _SHORT or truncated[-1] != eos:
        yield Finding(TOKENIZER, "loses EOS when it truncates", _APPEND)


def check_auto_tokenizer(packed: PackedFolder) -> Iterator[Finding]:
    """transformers makes the same ids of a text, and pads and truncates on the right."""
    plain = _tokenizer(packed)
    # Both are read with it.
    packed.table(TOKENIZER_CONFIG)
    if not packed.is_adapter:
        packed.table(CONFIG)
    loaded = _auto_tokenizer(packed)
    plain.no_truncation()
    plain.no_padding()
    eos = loaded.eos_token or ""
    for text in (*_TEXTS, f"a{eos}"):
        if loaded(text).input_ids != plain.encode(text).ids:
            wrong = f"AutoTokenizer and the tokenizers library disagree on {text!r}"
            yield Finding(TOKENIZER_CONFIG, wrong, "save both files from one tokenizer")
            return
    sides = {"padding_side": loaded.padding_side, "truncation_side": loaded.truncation_side}
    for name, side in sides.items():
        if side != "right":
            yield Finding(TOKENIZER_CONFIG, f"{name} is {side!r}", "set it to 'right'")
    truncated = loaded(_long_text(), truncation=True, max_length=_SHORT).input_ids
    if truncated[-1] != _end(packed, plain):
        yield Finding(TOKENIZER, "loses EOS when AutoTokenizer truncates", _APPEND)


def check_special_tokens(packed: PackedFolder) -> Iterator[Finding]:
    """There is a padding token, and the configuration names it and EOS by the tokenizer's ids.

    They may be one token: the attention mask tells padding apart. The configuration's EOS may be what ends a text.
    """
    tokenizer, config = _tokenizer(packed), packed.model_config()
    end = _end(packed, tokenizer)
    ids = {name: _id(packed, tokenizer, name) for name in ("pad_token", "eos_token")}
    if ids["pad_token"] is None:
        yield Finding(TOKENIZER_CONFIG, "names no padding token that tokenizer.json has", "set pad_token")
    for name, own in ids.items() if config is not None else ():
        given = config.get(f"{name}_id")
        if own is not None and given != own and not (name == "eos_token" and given == end):
            yield Finding(_place(packed), f"{name}_id is {given!r}, but the tokenizer's is {own}", f"set it to {own}")


def check_vocabulary(packed: PackedFolder) -> Iterator[Finding]:
    """Every token has an embedding."""
    tokenizer, config = _tokenizer(packed), packed.model_config()
    # The base of an adapter need not be at hand.
    if config is None:
        return
    embeddings = config.get("vocab_size")
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if not isinstance(embeddings, int) or highest >= embeddings:
        wrong = f"has token {highest}, but the model {embeddings} embeddings"
        yield Finding(TOKENIZER, wrong, "pack the tokenizer that the model was trained with")


def _place(packed: PackedFolder) -> str:
    """Where what the configuration says is told; an adapter can change its tokenizer alone."""
    return TOKENIZER_CONFIG if packed.is_adapter else CONFIG


def _tokenizer(packed: PackedFolder) -> Tokenizer:
    from tokenizers import Tokenizer

    text = packed.text(TOKENIZER)
    try:
        return Tokenizer.from_str(text)
    # The library raises Exception itself.
    except Exception as error:
        raise UnreadableError(TOKENIZER, f"is no tokenizer ({in_one_line(error)})") from None


def _auto_tokenizer(packed: PackedFolder) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(packed.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UnreadableError(TOKENIZER_CONFIG, f"AutoTokenizer cannot load it ({in_one_line(error)})") from None


def _id(packed: PackedFolder, tokenizer: Tokenizer, name: str) -> int | None:
    """Id of a special token by its name in ``tokenizer_config.json``, as text or as a described token."""
    token = packed.table(TOKENIZER_CONFIG).get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(token) if isinstance(token, str) else None


def _end(packed: PackedFolder, tokenizer: Tokenizer) -> int | None:
    """Id of the token that the tokenizer puts after a text; that of EOS if it puts none there."""
    text = _TEXTS[0]
    ids, bare = (tokenizer.encode(text, add_special_tokens=special).ids for special in (True, False))
    return _id(packed, tokenizer, "eos_token") if ids[len(ids) - len(bare) :] == bare else ids[-1]


def _trailing(ids: list[int], token: int) -> int:
    """How often a token stands at the end."""
    count = 0
    while count < len(ids) and ids[-1 - count] == token:
        count += 1
    return count


def _long_text() -> str:
    return "pandas live in the mountains " * _SHORT
