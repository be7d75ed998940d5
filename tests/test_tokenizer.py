"""Promises of mor.tokenizer: round trips, no special id out of text, exact streaming."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from mor.tokenizer import END_OF_DOCUMENT, MIN_VOCAB_SIZE, StreamDecoder, Tokenizer, train_bpe

TEXTS = [
    "The cat sat on the mat, the 2024 cats, naïve café 😀 and 漢字.\n\n    indented  text\n"
] * 20


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(iter(TEXTS), vocab_size=320)


def sentencepiece_like(special: str = "</s>") -> tokenizers.Tokenizer:
    """A Llama-2 style vocabulary: word marks, byte tokens, a stripped leading space."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b", "é"]
    vocab = {name: index for index, name in enumerate(names)}
    merges = [("▁", "a"), ("▁", "b")]
    raw = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    raw.add_special_tokens([AddedToken(special, special=True, normalized=False)])
    return raw


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_text_survives_encoding_and_streaming(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.encode_batch([text, "a"]) == [ids, bpe.encode("a")]
    pieces = bpe.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


@given(st.lists(st.integers(0, 330), max_size=30))
@settings(max_examples=300, deadline=None)
def test_pieces_of_any_ids_join_to_decode(bpe: Tokenizer, ids: list[int]) -> None:
    assert "".join(bpe.pieces(ids)) == bpe.decode(ids)


@given(st.text(alphabet="ab é😀漢\n"))
@settings(max_examples=200, deadline=None)
def test_other_vocabularies_stream_too(text: str) -> None:
    tokenizer = Tokenizer(sentencepiece_like())
    ids = tokenizer.encode(text)
    assert "".join(tokenizer.pieces(ids)) == tokenizer.decode(ids) == text


def test_a_piece_appears_with_the_token_that_completes_it(bpe: Tokenizer) -> None:
    ids = [*bpe.encode("a"), *bpe.encode("🦜"), *bpe.encode(" the")]  # 1, 3 and 1 tokens
    pieces = bpe.pieces(ids)
    assert pieces == ["a", "", "", "🦜", " the"]
    stream = StreamDecoder(bpe)
    assert stream.push(bpe.encode("🦜")[0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(bpe.encode("a")[0]) == "a"
    assert stream.flush() == ""


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_streaming_takes_linear_time(bpe: Tokenizer, kind: str) -> None:
    tokenizer = bpe if kind == "byte level" else Tokenizer(sentencepiece_like())
    ids = tokenizer.encode("a b " * 5000)
    start_s = time.perf_counter()
    assert len("".join(tokenizer.pieces(ids))) >= 19_999
    assert time.perf_counter() - start_s < 5  # decoding everything at each token takes minutes


def test_special_text_never_yields_the_special_id(bpe: Tokenizer) -> None:
    text = f"a{END_OF_DOCUMENT}b"
    assert bpe.eos_token_id not in bpe.encode(text)
    assert bpe.eos_token_id not in bpe.encode_batch([text])[0]
    assert bpe.decode(bpe.encode(text)) == text
    other = Tokenizer(sentencepiece_like())
    assert other.eos_token_id not in other.encode("a</s>b")


def test_an_end_token_that_is_not_special_becomes_special() -> None:
    raw = tokenizers.Tokenizer.from_str(train_bpe(iter(TEXTS), vocab_size=300)._raw.to_str())
    raw.add_tokens([AddedToken("<eos>", special=False)])
    tokenizer = Tokenizer(raw, eos_token="<eos>")
    assert tokenizer.eos_token_id not in tokenizer.encode("a<eos>b")


def test_a_vocabulary_that_cannot_keep_text_and_end_apart_is_refused() -> None:
    raw = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "?": 2}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match="encodes the text '</s>'"):
        Tokenizer(raw)


def test_one_id_ends_and_begins_documents_and_truncation_is_off(bpe: Tokenizer) -> None:
    assert bpe.bos_token_id == bpe.eos_token_id == 0
    raw = tokenizers.Tokenizer.from_str(bpe._raw.to_str())
    raw.enable_truncation(2)
    raw.enable_padding(length=50)
    assert Tokenizer(raw).encode("The cat sat") == bpe.encode("The cat sat")


def test_training_is_deterministic_and_splits_digits(bpe: Tokenizer) -> None:
    again = train_bpe(iter(TEXTS), vocab_size=320)
    assert again.fingerprint() == bpe.fingerprint()
    assert bpe.vocab_size <= 320
    assert len(bpe.encode("2024")) == 4
    assert train_bpe(iter(TEXTS[:1]), vocab_size=10_000).vocab_size < 1000
    assert train_bpe(iter(()), vocab_size=MIN_VOCAB_SIZE).vocab_size == MIN_VOCAB_SIZE
    with pytest.raises(ValueError, match="vocab_size is 256; give 257 or more"):
        train_bpe(iter(TEXTS), vocab_size=256)


def test_saved_and_loaded_is_the_same(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint() == bpe.fingerprint()
        assert loaded.encode(TEXTS[0]) == bpe.encode(TEXTS[0])


def test_broken_or_missing_files_are_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        Tokenizer.load(tmp_path)
    file = tmp_path / "tokenizer.json"
    for content in (b"{}", b"not json", b'{"model": 3}', b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"is not a tokenizer\.json") as caught:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(caught.value)


def test_the_end_token_is_found_or_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    for known in ("</s>", "<eos>", "<|end_of_text|>", END_OF_DOCUMENT):
        file.write_text(sentencepiece_like(known).to_str(), encoding="utf-8")
        assert Tokenizer.load(file).eos_token == known
    file.write_text(sentencepiece_like("<stop>").to_str(), encoding="utf-8")
    with pytest.raises(ValueError, match="set eos_token, its special tokens are <stop>"):
        Tokenizer.load(file)
    with pytest.raises(ValueError, match="'<nope>' is not in the vocabulary"):
        Tokenizer.load(file, eos_token="<nope>")
    with pytest.raises(ValueError, match="eos_token is id 9999"):
        Tokenizer.load(file, eos_token=9999)
    named = Tokenizer.load(file, eos_token="<stop>")
    assert Tokenizer.load(file, eos_token=named.eos_token_id).eos_token == "<stop>"


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, mor.tokenizer, mor.data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_half_a_surrogate_pair_is_named_as_what_it_is():
    """As Python reads bytes of a command line that are no UTF-8."""
    tokenizer = train_bpe(iter(["some text"] * 9), vocab_size=270)
    with pytest.raises(ValueError, match="the text is no UTF-8"):
        tokenizer.encode("x\udcff")
