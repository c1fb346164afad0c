"""Text as it comes: stop strings across tokens, characters across tokens, and what ends an answer."""

from __future__ import annotations

import itertools
import json

import pytest
from engine_cases import settings_of
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deltakeeper.engine import Engine, Request
from deltakeeper.engine.detokenizer import Detokenizer
from deltakeeper.engine.stops import StopStrings
from deltakeeper.engine.text_side import TextSides, base_side
from deltakeeper.errors import EngineError, SideFileError
from deltakeeper.overlay.side_files import hash_side_files
from deltakeeper.testing.models import build_model


def byte_tokenizer():
    """A tokenizer whose tokens 4 to 259 are the 256 bytes, behind four special ones."""
    special = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(special | {c: 4 + i for i, c in enumerate(letters)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")


def word_tokenizer():
    """Words with a SentencePiece mark for the space before them; token 4 + i is word i."""
    words = ["▁the", "▁cat", "▁sat", "s", "▁on", ".", "▁", "▁mat"]
    special = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3}
    backend = Tokenizer(models.WordLevel(special | {w: 4 + i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


class Slow:
    """A tokenizer without an incremental decoder."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def decode(self, ids, **settings):
        return self._tokenizer.decode(ids, **settings)


BYTES, WORDS = byte_tokenizer(), word_tokenizer()


@pytest.mark.parametrize("wrap", [lambda t: t, Slow])
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=12), prompt=st.text(max_size=4))
def test_pieces_are_whole_characters_and_add_up(wrap, text, prompt):
    prompt_ids = BYTES.encode(prompt, add_special_tokens=False) or [1]
    detokenizer = Detokenizer(wrap(BYTES), prompt_ids)
    pieces = [detokenizer.add(token) for token in BYTES.encode(text, add_special_tokens=False)]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text


@pytest.mark.parametrize("wrap", [lambda t: t, Slow])
def test_a_character_cut_off_at_the_end_is_replaced(wrap):
    ids = BYTES.encode("a€", add_special_tokens=False)
    detokenizer = Detokenizer(wrap(BYTES), [1])
    assert [detokenizer.add(token) for token in ids[:-1]] == ["a", "", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("wrap", [lambda t: t, Slow])
def test_bytes_that_are_no_character_do_not_stop_the_text(wrap):
    stray = BYTES.encode("é", add_special_tokens=False)[1]  # a continuation byte without its beginning
    detokenizer = Detokenizer(wrap(BYTES), [1])
    text = "".join(detokenizer.add(t) for t in [stray, *BYTES.encode("ok", add_special_tokens=False)])
    assert text + detokenizer.flush() == "\ufffdok"


@pytest.mark.parametrize("wrap", [lambda t: t, Slow])
def test_a_prompt_that_ends_inside_a_character_is_no_part_of_the_answer(wrap):
    cut = BYTES.encode("x€", add_special_tokens=False)[:-1]
    detokenizer = Detokenizer(wrap(BYTES), cut)
    text = "".join(detokenizer.add(t) for t in BYTES.encode("ok", add_special_tokens=False))
    assert (text + detokenizer.flush()).endswith("ok")
    assert "x" not in text


@pytest.mark.parametrize("wrap", [lambda t: t, Slow])
def test_spaces_before_words_survive_and_special_tokens_do_not(wrap):
    detokenizer = Detokenizer(wrap(WORDS), [4, 5])  # the cat
    pieces = [detokenizer.add(token) for token in (6, 2, 8, 4, 11, 9)]
    assert "".join(pieces) + detokenizer.flush() == " sat on the mat."
    first = Detokenizer(wrap(WORDS), [2])
    assert "".join(first.add(token) for token in (4, 5, 7)) == "the cats"


def test_without_a_tokenizer_there_is_no_text():
    detokenizer = Detokenizer(None, [5])
    assert detokenizer.add(6) == "" and detokenizer.flush() == ""


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_stop_strings_are_found_wherever_tokens_are_cut(text, stops, cuts):
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    matcher = StopStrings(stops)
    shown, met = "", None
    for start, end in itertools.pairwise(edges):
        certain, met = matcher.add(text[start:end])
        shown += certain
        assert text.startswith(shown)
        if met is not None:
            break
    else:
        shown += matcher.flush()
    ends = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    if met is None:
        assert not ends and shown == text
    else:
        # the first one that is complete ends the text, before where it starts
        done = min(at + len(stop) for at, stop in ends)
        reached = next(edge for edge in edges if edge >= done)
        complete = [(at, stop) for at, stop in ends if at + len(stop) <= reached]
        assert shown == text[: min(complete)[0]]
        assert met in [stop for at, stop in complete if at == min(complete)[0]]


def test_text_that_may_become_a_stop_string_is_held_back():
    matcher = StopStrings(["User:"])
    assert matcher.add("Hello Us") == ("Hello ", None)
    assert matcher.add("e") == ("", None)
    assert matcher.add("ful") == ("Useful", None)
    assert matcher.add(" User") == (" ", None)
    assert matcher.add(": hi") == ("", "User:")


@pytest.fixture(scope="module")
def model():
    model = build_model("llama", vocab_extra=200)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model


def answer_of(model, tokenizer=BYTES, **request):
    with Engine(model, tokenizer, settings=settings_of()) as engine:
        stream = engine.submit(Request((5, 6, 7), **{"max_new_tokens": 24} | request))
        while engine.step():
            pass
        return list(stream), stream.completion()


def test_a_stop_string_ends_the_answer(model):
    tokens, whole = answer_of(model)
    assert whole.finish_reason == "length" and len(whole.tokens) == 24
    assert "".join(token.text for token in tokens) == whole.text == BYTES.decode(whole.tokens)
    stop = whole.text[4:7]
    at = whole.text.find(stop)
    tokens, cut = answer_of(model, stop=("never said", stop))
    assert (cut.text, cut.finish_reason, cut.stop) == (whole.text[:at], "stop", stop)
    assert whole.tokens[: len(cut.tokens)] == cut.tokens
    assert "".join(token.text for token in tokens) == cut.text
    _, untouched = answer_of(model, stop=(whole.text[-1] + "?",))  # held back at the end, and given out
    assert untouched.text == whole.text


def test_a_stop_token_ends_the_answer_and_has_no_text(model):
    _, whole = answer_of(model)
    stop = next(t for i, t in enumerate(whole.tokens) if t not in whole.tokens[:i] and i > 2)
    _, cut = answer_of(model, stop_tokens=(stop,))
    assert cut.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
    assert (cut.finish_reason, cut.stop) == ("stop", stop)
    assert cut.text == BYTES.decode(cut.tokens[:-1])


def test_the_end_of_text_token_ends_the_answer_unless_ignored(model):
    _, whole = answer_of(model)
    eos = next(t for i, t in enumerate(whole.tokens) if t not in whole.tokens[:i] and i > 2)
    model.generation_config.eos_token_id = [1, eos]
    try:
        _, cut = answer_of(model)
        assert cut.tokens == whole.tokens[: whole.tokens.index(eos) + 1]
        assert (cut.finish_reason, cut.stop) == ("stop", None)
        assert answer_of(model, ignore_eos=True)[1].tokens == whole.tokens
    finally:
        model.generation_config.eos_token_id = None


def test_stop_strings_need_a_tokenizer(model):
    with Engine(model, None, settings=settings_of()) as engine, pytest.raises(EngineError, match="no tokenizer"):
        engine.submit(Request((5,), stop=("x",)))


class Delta:
    version = "ab"
    vocabulary = 300

    def __init__(self, folder, files):
        own = hash_side_files(folder)
        self.side_folder, self.side_files = folder, {name: own[name] for name in files if name in own}


def side_of(sides, delta):
    while (side := sides.get(delta.version, delta)) is None:
        pass
    return side


@pytest.fixture
def sides(model):
    sides = TextSides(base_side(model, BYTES))
    yield sides
    sides.close()


def test_a_tenant_brings_its_own_tokenizer_and_end_of_text(sides, tmp_path):
    WORDS.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    names = [path.name for path in tmp_path.iterdir()]
    delta = Delta(tmp_path, names)
    side = side_of(sides, delta)
    assert side.tokenizer.decode([4, 5]) == "the cat"
    assert (side.eos, side.vocabulary) == (frozenset({7, 9}), 300)
    assert sides.get("ab", Delta(tmp_path, names)) is side
    del delta
    assert not sides._kept  # a tokenizer goes with the delta that it was read for


def test_what_a_tenant_lacks_is_the_bases(sides, tmp_path):
    side = side_of(sides, Delta(tmp_path, ["README.md"]))
    assert side.tokenizer is BYTES and side.vocabulary == 300


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": {"a": null}}', "[" * 100_000]
)
def test_a_broken_generation_config_is_the_tenants_error(sides, tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(SideFileError, match="generation config"):
        side_of(sides, Delta(tmp_path, ["generation_config.json"]))


def test_a_broken_tokenizer_is_the_tenants_error(sides, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SideFileError, match="the tokenizer in"):
        side_of(sides, Delta(tmp_path, ["tokenizer.json"]))
