"""Text to token ids and back: one class over `tokenizers`, with a decoder that streams.

The end-of-document token also begins the next document, as in GPT-2: one id plays both roles.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from mor.files import write_text

END_OF_DOCUMENT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_DOCUMENT, "</s>", "<eos>", "<|end_of_text|>")
MIN_VOCAB_SIZE = 257
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""a byte in a vocabulary that falls back to bytes"""


class Tokenizer:
    """A tokenizer and the id that separates documents.

    Text never yields a special id: a literal `<|endoftext|>` is encoded as ordinary characters.
    `vocab_size` is the largest id plus one, added tokens counted. `special_ids` are the ids that
    stand for no text, `token_ids` the id of every token.
    """

    def __init__(self, raw: tokenizers.Tokenizer, *, eos_token: str | int | None = None) -> None:
        """Wrap raw, which is changed in place; eos_token (text or id) names the document end.

        Raises ValueError when no end of document is found, or when text could produce its id.
        """
        raw.no_truncation()
        raw.no_padding()
        vocab = raw.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.eos_token = _find_end(raw, vocab, eos_token)
        self.eos_token_id = vocab[self.eos_token]
        self.bos_token_id = self.eos_token_id
        added = raw.get_added_tokens_decoder().get(self.eos_token_id)
        if added is None or not added.special:
            raw.add_special_tokens([AddedToken(self.eos_token, special=True, normalized=False)])
        raw.encode_special_tokens = True
        tokens = raw.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id in tokens if tokens[token_id].special)
        self.token_ids = raw.get_vocab(with_added_tokens=True)
        self._raw = raw
        self._is_byte_level = isinstance(raw.decoder, decoders.ByteLevel)
        if self.eos_token_id in self.encode(self.eos_token):
            raise ValueError(
                f"the tokenizer encodes the text {self.eos_token!r} as its end-of-document id; "
                "choose another end with eos_token"
            )

    @classmethod
    def load(cls, path: Path, *, eos_token: str | int | None = None) -> Tokenizer:
        """Read `tokenizer.json` at path (the file, or the folder that holds it).

        eos_token  text or id of the end-of-document token, where it has no well-known name
        Raises     ValueError when the file is missing, not a tokenizer, or has no such token
        """
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"{file} does not exist; give a tokenizer.json or its folder")
        try:
            raw = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except OSError:
            raise
        except Exception as error:  # the library raises bare Exception for a broken file
            raise ValueError(f"{file} is not a tokenizer.json: {error}") from error
        try:
            return cls(raw, eos_token=eos_token)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` into folder, whole or not at all."""
        write_text(folder / "tokenizer.json", self._raw.to_str(pretty=True))

    def encode(self, text: str) -> list[int]:
        """Return the ids of text, without any special token.

        Raises ValueError for half a surrogate pair, as bytes that are no UTF-8 become
        """
        try:
            return self._raw.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise ValueError(
                "the text is no UTF-8; write it anew, or leave out what is broken"
            ) from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of every text; the texts are spread over the processor's cores."""
        encodings = self._raw.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens by name; unknown ids are left out."""
        return self._raw.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token stands for; part of a character for some, a special one's name."""
        token = self._raw.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            alphabet = _byte_level_alphabet()
            if token_id in self.special_ids or not all(char in alphabet for char in token):
                return token.encode("utf-8")  # an added token is plain text
            return bytes(alphabet[char] for char in token)
        if BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:-1], 16)])
        return token.replace("\u2581", " ").encode("utf-8")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return one string per id; joined, they are `decode(ids)` (see StreamDecoder).

        A token that ends inside a character is "" and the one that completes it shows it.
        """
        stream = StreamDecoder(self)
        pieces = [stream.push(token_id) for token_id in ids]
        if pieces:
            pieces[-1] += stream.flush()
        return pieces

    def fingerprint(self) -> str:
        """Return the SHA-256, in hex, of the tokenizer's JSON with sorted keys.

        Templates that put special tokens around a text are left out, since `encode` uses none.
        """
        parts = json.loads(self._raw.to_str()) | {"post_processor": None}
        canonical = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


class StreamDecoder:
    """Turns ids into text one at a time, in time linear in their number.

    A byte-level vocabulary is decoded from its bytes. Any other one is decoded over a short
    window that moves on when a character is whole, which keeps leading spaces right; there the
    U+FFFD of malformed byte tokens may differ in number from those of `decode`.
    """

    _MAX_PENDING = 8

    def __init__(self, tokenizer: Tokenizer, *, behind: Sequence[int] = ()) -> None:
        """behind: the last ids before, already shown, whose presence keeps a first space."""
        self._raw = tokenizer._raw
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_byte_level = tokenizer._is_byte_level
        self._token_bytes = tokenizer.token_bytes
        self._window = list(behind)
        self._shown = len(self._window)  # tokens of the window whose text was given out

    def push(self, token_id: int) -> str:
        """Return the text that this id completes; "" inside a character."""
        if self._is_byte_level:
            return self._utf8.decode(self._token_bytes(token_id))
        self._window.append(token_id)
        text = self._unshown_text()
        is_open = text.endswith("\ufffd") or not text
        if is_open and len(self._window) - self._shown < self._MAX_PENDING:
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return text

    def flush(self) -> str:
        """Return what is left (an unfinished character becomes U+FFFD) and start afresh."""
        if self._is_byte_level:
            text = self._utf8.decode(b"", final=True)
            self._utf8.reset()
            return text
        text = self._unshown_text()
        self._window, self._shown = [], 0
        return text

    def _unshown_text(self) -> str:
        shown = self._raw.decode(self._window[: self._shown], skip_special_tokens=False)
        return self._raw.decode(self._window, skip_special_tokens=False)[len(shown) :]


def train_bpe(texts: Iterator[str], *, vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE with single digits and one special token, `<|endoftext|>` (id 0).

    The same texts give the same tokenizer. It has fewer entries than vocab_size when the texts
    do not hold enough pairs that occur twice.
    Raises ValueError when vocab_size cannot hold 256 bytes and the special token.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size is {vocab_size}; give {MIN_VOCAB_SIZE} or more (256 bytes and one special)"
        )
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return Tokenizer(raw)


def _find_end(raw: tokenizers.Tokenizer, vocab: dict[str, int], wanted: str | int | None) -> str:
    if isinstance(wanted, int):
        token = raw.id_to_token(wanted)
        if token is None:
            raise ValueError(
                f"eos_token is id {wanted}, but the vocabulary has {len(vocab)} entries"
            )
        return token
    if wanted is not None:
        if wanted not in vocab:
            raise ValueError(f"eos_token {wanted!r} is not in the vocabulary; {_specials(raw)}")
        return wanted
    for token in KNOWN_ENDS:
        if token in vocab:
            return token
    names = ", ".join(KNOWN_ENDS)
    raise ValueError(f"no end-of-document token ({names}); set eos_token, {_specials(raw)}")


def _specials(raw: tokenizers.Tokenizer) -> str:
    names = [t.content for t in raw.get_added_tokens_decoder().values() if t.special]
    return (
        f"its special tokens are {', '.join(names[:20])}" if names else "it has no special tokens"
    )


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of every character that GPT-2's byte-level vocabulary writes bytes with."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    plain = {chr(byte): byte for byte in printable}
    return plain | {chr(256 + index): byte for index, byte in enumerate(others)}
