"""An answer ends where a look at its whole text says, and no text is shown that is taken back."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from mor.engine.params import SamplingParams
from mor.engine.stops import StopChecker
from mor.tokenizer import StreamDecoder, Tokenizer, _byte_level_alphabet, train_bpe

EOS = 0
BPE = train_bpe(iter(["abab aab é漢 😀é ba aba 漢漢"] * 20), vocab_size=300)


def words_tokenizer() -> Tokenizer:
    """Not byte level: its decoder joins words by spaces."""
    vocab = {"</s>": EOS, "a": 1, "b": 2, "ab": 3, "<unk>": 4}
    raw = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(raw)


WORDS = words_tokenizer()


class Ending(NamedTuple):
    num_tokens: int
    finish_reason: str | None
    stop_reason: int | str | None


def checker_of(params: SamplingParams, tokenizer: Tokenizer | None = BPE) -> StopChecker:
    return StopChecker(params, prompt_length=3, context=1000, eos_id=EOS, tokenizer=tokenizer)


def answer(checker: StopChecker, ids: list[int]) -> tuple[Ending, list[str]]:
    """Push ids until the answer ends; return the text shown after each as well."""
    shown = []
    for token in ids:
        shown.append(checker.push(token))
        if checker.finish_reason is not None:
            break
    return Ending(checker.num_tokens, checker.finish_reason, checker.stop_reason), shown


def complete_text(ids: list[int], params: SamplingParams, tokenizer: Tokenizer) -> str:
    """The text of ids without the bytes of a character that is not complete."""
    hidden = tokenizer.special_ids if params.skip_special_tokens else ()
    stream = StreamDecoder(tokenizer)
    return "".join(stream.push(token) for token in ids if token not in hidden)


def naive_answer(
    ids: list[int], params: SamplingParams, tokenizer: Tokenizer
) -> tuple[Ending, str]:
    """Look at the whole text after every token."""
    ends = {*params.stop_ids, *(() if params.ignore_eos else (EOS,))}
    hidden = tokenizer.special_ids if params.skip_special_tokens else ()
    for count in range(1, len(ids) + 1):
        before, token, may_stop = ids[: count - 1], ids[count - 1], count > params.min_tokens
        is_end = may_stop and token in ends
        read = before if is_end and not params.include_stop_str_in_output else ids[:count]
        text = complete_text(read, params, tokenizer)
        if is_end or count == params.max_tokens:
            text = tokenizer.decode([each for each in read if each not in hidden])
        found = [
            (start + len(stop), start, stop)
            for stop in params.stop_strings
            for start in range(len(text))
            if text.startswith(stop, start)
            and start + len(stop) > len(complete_text(before, params, tokenizer))
        ]
        if may_stop and found:
            end, start, stop = min(found)
            cut = end if params.include_stop_str_in_output else start
            return Ending(count, "stop", stop), text[:cut]
        if is_end:
            is_eos = token == EOS and not params.ignore_eos
            return Ending(count, "stop", None if is_eos else token), text
        if count == params.max_tokens:
            return Ending(count, "length", None), text
    return Ending(len(ids), None, None), complete_text(ids, params, tokenizer)


# Few characters, so that stop strings overlap; most of them take more than a byte.
TEXTS = st.text(alphabet="ab", min_size=1, max_size=5) | st.text(
    alphabet="a é漢😀\ufffd", min_size=1, max_size=3
)
PARAMS = st.fixed_dictionaries(
    {
        "stop": st.lists(TEXTS | st.sampled_from(["a b", "endof", "ab|"]), max_size=4),
        "stop_token_ids": st.lists(st.integers(1, 299), max_size=2),
        "include_stop_str_in_output": st.booleans(),
        "ignore_eos": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "min_tokens": st.integers(0, 4),
        "max_tokens": st.none() | st.integers(4, 12),
    }
)
# Ids of text, and any others: half a character, an end of document in the middle.
BPE_IDS = st.lists(
    TEXTS.map(BPE.encode)
    | TEXTS.map(BPE.encode)
    | st.lists(st.integers(0, 299), min_size=1, max_size=1),
    max_size=8,
).map(lambda parts: [token for part in parts for token in part])
WORD_IDS = st.lists(st.integers(0, 3), max_size=10)


@given(
    st.tuples(st.just(BPE), BPE_IDS) | st.tuples(st.just(WORDS), WORD_IDS),
    PARAMS,
)
@settings(max_examples=200)
def test_an_answer_ends_where_its_whole_text_says(
    case: tuple[Tokenizer, list[int]], values: dict[str, Any]
) -> None:
    (tokenizer, ids), params = case, SamplingParams(**values)
    checker = checker_of(params, tokenizer)
    ending, shown = answer(checker, ids)
    expected, text = naive_answer(ids, params, tokenizer)
    assert ending == expected
    assert text.startswith("".join(shown))
    if ending.finish_reason is not None:
        assert "".join(shown) == text and checker.flush() == ""
        return
    held = text[len("".join(shown)) :]
    assert not held or any(s.startswith(held) and s != held for s in params.stop_strings)
    assert not (held and params.include_stop_str_in_output)
    hidden = tokenizer.special_ids if params.skip_special_tokens else ()
    whole = tokenizer.decode([token for token in ids if token not in hidden])
    assert "".join(shown) + checker.flush() == whole


@given(st.text(alphabet="ab é漢😀", max_size=20), st.lists(TEXTS, min_size=1, max_size=3))
def test_how_tokens_split_a_text_does_not_change_where_it_ends(text: str, stops: list[str]) -> None:
    alphabet, ids = _byte_level_alphabet(), BPE._raw.get_vocab()
    id_of_byte = {byte: ids[char] for char, byte in alphabet.items()}
    splits = [BPE.encode(text), [id_of_byte[byte] for byte in text.encode()]]
    outcomes = []
    for ids in splits:
        checker = checker_of(SamplingParams(stop=stops, max_tokens=None))
        ending, shown = answer(checker, ids)
        outcomes.append((ending[1:], "".join(shown) + checker.flush()))
    assert outcomes[0] == outcomes[1]


def test_text_that_may_begin_a_stop_string_is_held_until_it_is_decided() -> None:
    ids = [BPE.encode(char)[0] for char in "xENyEND"]
    ending, shown = answer(checker_of(SamplingParams(stop="END")), ids)
    assert shown == ["x", "", "", "ENy", "", "", ""]
    assert ending == (7, "stop", "END")
    _, shown = answer(checker_of(SamplingParams(stop="END", include_stop_str_in_output=True)), ids)
    assert shown == list("xENyEND")


def test_of_overlapping_stop_strings_the_first_to_be_complete_ends_the_answer() -> None:
    ids = [BPE.encode(char)[0] for char in "xaabc"]

    def ends(*stops: str, min_tokens: int = 0) -> tuple[int | str | None, str]:
        params = SamplingParams(stop=list(stops), min_tokens=min_tokens)
        checker = checker_of(params)
        ending, shown = answer(checker, ids)
        return ending.stop_reason, "".join(shown) + checker.flush()

    assert ends("aabc", "ab") == ends("ab", "aabc") == ("ab", "xa")
    assert ends("b", "aab", "ab") == ("aab", "x")
    assert ends("aabx", "bc") == ("bc", "xaa")
    assert ends("xaa", "a", min_tokens=4) == (None, "xaabc")
    # it began among the first tokens, but is complete only after them
    assert ends("aab", min_tokens=3) == ("aab", "x")
    assert ends("aab", "abc", min_tokens=4) == ("abc", "xa")
    assert ends("a", "aabd", min_tokens=3) == (None, "xaabc")


def test_without_stop_strings_text_is_shown_at_once() -> None:
    bird = BPE.encode("🦜")
    ending, shown = answer(checker_of(SamplingParams(max_tokens=len(bird))), bird)
    assert len(bird) > 2 and shown == ["", "", "🦜"]
    assert ending == (3, "length", None)
    # cut inside the character: what decode says of the bytes
    _, shown = answer(checker_of(SamplingParams(max_tokens=2)), bird)
    assert "".join(shown) == BPE.decode(bird[:2]) == "\ufffd"


def test_the_end_of_document_ends_and_is_not_text_unless_asked_for() -> None:
    ids = [*BPE.encode("ab"), EOS]

    def text(**values: Any) -> tuple[str | None, str]:
        ending, shown = answer(checker_of(SamplingParams(**values)), ids)
        return ending.finish_reason, "".join(shown)

    assert text() == ("stop", "ab")
    assert text(include_stop_str_in_output=True) == ("stop", "ab")
    shown_end = text(include_stop_str_in_output=True, skip_special_tokens=False)
    assert shown_end == ("stop", "ab<|endoftext|>")
    assert text(ignore_eos=True) == (None, "ab")
    assert text(ignore_eos=True, skip_special_tokens=False) == (None, "ab<|endoftext|>")


@pytest.mark.parametrize(
    ("values", "ids", "expected"),
    [
        ({}, [5, EOS], (2, "stop", None)),
        ({"stop_token_ids": [7]}, [5, 7], (2, "stop", 7)),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, [5, EOS], (2, "stop", EOS)),
        ({"min_tokens": 2, "stop_token_ids": [7]}, [7, EOS, 7], (3, "stop", 7)),
        ({"max_tokens": 2}, [5, 6], (2, "length", None)),
        ({"max_tokens": 2}, [5, EOS], (2, "stop", None)),
        ({"max_tokens": 2, "min_tokens": 2}, [5, EOS], (2, "length", None)),
        ({"max_tokens": None}, [5] * 10, (7, "length", None)),
        ({"max_tokens": 100}, [5] * 10, (7, "length", None)),
    ],
)
def test_ids_alone_are_enough(
    values: dict[str, Any], ids: list[int], expected: tuple[object, ...]
) -> None:
    checker = StopChecker(SamplingParams(**values), prompt_length=3, context=10, eos_id=EOS)
    ending, shown = answer(checker, ids)
    assert ending == expected
    assert set(shown) == {""} and checker.flush() == ""


def test_what_cannot_be_done_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^stop is 'END', but there is no tokenizer.*give stop_"):
        StopChecker(SamplingParams(stop=["END"]), prompt_length=3, context=10)
    with pytest.raises(ValueError, match=r"the prompt has 10 tokens.*may have 10; shorten"):
        StopChecker(SamplingParams(), prompt_length=10, context=10)


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, mor.engine.stops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
