"""Text to ids and back: what people write never becomes a control token, and characters come out whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from winnow.errors import CorruptBlock, InvalidRequest, UnknownName, Unsupported
from winnow.types import Message
from winnow.workers.model.detokenizer import byte_alphabet
from winnow.workers.model.tiny import make_tiny_model
from winnow.workers.model.tokenizer import IncrementalDetokenizer, Tokenizer

Tiny = Callable[..., Path]
IM_START, IM_END = 1, 2
TEXTS = st.text(max_size=60) | st.text(alphabet="ab 中文👩‍👩‍👧é́\n\t<|im_end|>", max_size=40)
# hand-picked: what breaks naive detokenisers
HARD = [
    "",
    " ",
    "  leading",
    "trailing  ",
    "naïve café",
    "e\u0301",
    "日本語テスト",
    "👩\u200d👩\u200d👧 family",
    "\ufffd",
    "a\x00b",
    "\r\n\n",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder, (IM_END, 0))


def in_pieces(tokenizer: Tokenizer, ids: list[int], sizes: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    out, start = [], 0
    for size in [*sizes, len(ids)]:
        out.append(detokenizer.push(ids[start : start + size]))
        start += size
    return [*out, detokenizer.flush()]


def sentencepiece_like() -> Tokenizer:
    """A vocabulary in SentencePiece style, with byte tokens and a space put before the text."""
    letters = "▁ abcdefghijklmnopqrstuvwxyz"
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters])}
    pipeline = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    pipeline.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pipeline.add_special_tokens(["</s>"])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=pipeline, eos_token="</s>"))


@given(text=TEXTS)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_come_back_one_id_at_a_time(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert "".join(in_pieces(tokenizer, ids, [1] * len(ids))) == text


@given(ids=st.lists(st.integers(0, 330), max_size=60), sizes=st.lists(st.integers(0, 4), max_size=30))
def test_pieces_of_any_ids_join_to_the_whole(tokenizer: Tokenizer, ids: list[int], sizes: list[int]) -> None:
    expected = tokenizer._with_special.decode(ids, skip_special_tokens=True)  # the library's own decoder
    assert tokenizer.decode(ids) == expected
    assert "".join(in_pieces(tokenizer, ids, sizes)) == expected


@given(text=TEXTS, sizes=st.lists(st.integers(0, 4), max_size=30))
def test_every_piece_of_a_real_text_is_whole_characters(tokenizer: Tokenizer, text: str, sizes: list[int]) -> None:
    pieces = in_pieces(tokenizer, tokenizer.encode(text), sizes)
    assert "".join(pieces) == text
    assert pieces[-1] == ""
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_an_unfinished_character_waits_and_flush_replaces_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("👍")
    assert len(ids) == 4
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in ids[:3]] == ["", "", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push(ids) == "👍"  # ready for a new text


def test_broken_bytes_do_not_hold_the_text_back(tokenizer: Tokenizer) -> None:
    lead = tokenizer.encode("👍")[0]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push([lead]) == ""
    assert detokenizer.push(tokenizer.encode("a")) == "\ufffda"


@given(text=st.text(alphabet="abc xyz中👍é", max_size=30), sizes=st.lists(st.integers(0, 3), max_size=20))
def test_sentencepiece_texts_keep_their_spaces(text: str, sizes: list[int]) -> None:
    tokenizer = _SENTENCEPIECE
    ids = tokenizer.encode(text)
    assert "".join(in_pieces(tokenizer, ids, sizes)) == tokenizer._with_special.decode(ids)


_SENTENCEPIECE = sentencepiece_like()


def test_the_space_sentencepiece_puts_first_is_dropped_once() -> None:
    ids = _SENTENCEPIECE.encode("a b")
    assert in_pieces(_SENTENCEPIECE, ids, [1, 1, 1, 1]) == ["", "a", " ", "b", "", ""]


def test_control_tokens_in_text_are_characters(tokenizer: Tokenizer) -> None:
    text = "x<|im_end|>y<|im_start|>"
    ids = tokenizer.encode(text)
    assert not {0, IM_START, IM_END} & set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, special=True).count(IM_END) == 1


def test_vocabulary_and_end_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_ids == (IM_END, 0)
    assert tokenizer.bos_ids == ()
    assert tokenizer.vocab_size == 290
    assert sorted(byte_alphabet().values()) == list(range(256))


HARMLESS = [
    [Message("user", "hello")],
    [Message("system", "Be brief."), Message("user", "  two spaces\n\nand lines\n")],
    [Message("user", "a"), Message("assistant", "b"), Message("user", "ends with <")],
    [Message("user", ""), Message("assistant", "|>"), Message("user", "日本 👍")],
]


@pytest.mark.parametrize("messages", HARMLESS, ids=range(len(HARMLESS)))
@pytest.mark.parametrize("generate", [True, False])
def test_harmless_chats_equal_transformers(folder: Path, tokenizer: Tokenizer, messages: list[Message], generate: bool) -> None:
    theirs = AutoTokenizer.from_pretrained(str(folder))
    turns = [{"role": m.role, "content": m.content} for m in messages]
    expected = theirs.apply_chat_template(turns, add_generation_prompt=generate, return_dict=False)
    assert tokenizer.encode_chat(messages, add_generation_prompt=generate) == expected
    assert tokenizer.chat(messages, add_generation_prompt=generate) == theirs.apply_chat_template(
        turns, add_generation_prompt=generate, tokenize=False
    )


PARTS = ["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "<|", "user\n", "x ", "\n"]


@given(
    contents=st.lists(
        st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "<|", "user\n", "x ", "\n"]), max_size=6).map(
            "".join
        ),
        min_size=1,
        max_size=4,
    )
)
def test_no_message_can_write_a_control_token(tokenizer: Tokenizer, contents: list[str]) -> None:
    messages = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    ids = tokenizer.encode_chat(messages)
    assert ids.count(IM_START) == len(messages) + 1
    assert ids.count(IM_END) == len(messages)
    assert tokenizer._with_special.decode(ids, skip_special_tokens=False) == tokenizer.chat(messages)


EACH = "{% for m in messages %}<|im_start|>{{ m['content'] | FILTER }}<|im_end|>{% endfor %}"


class TestTemplates:
    def with_template(self, folder: Path, template: str | None) -> Tokenizer:
        fast = PreTrainedTokenizerFast.from_pretrained(str(folder))
        fast.chat_template = template
        return Tokenizer(fast)

    def test_a_template_that_strips_is_followed(self, folder: Path) -> None:
        tokenizer = self.with_template(
            folder, "{% for m in messages %}<|im_start|>{{ m['content'] | trim }}<|im_end|>{% endfor %}"
        )
        ids = tokenizer.encode_chat([Message("user", "  <|im_end|> ")])
        assert ids == [IM_START, *tokenizer.encode("<|im_end|>"), IM_END]

    def test_a_template_that_rewrites_refuses_only_control_tokens(self, folder: Path) -> None:
        tokenizer = self.with_template(
            folder, "{% for m in messages %}<|im_start|>{{ m['content'] | upper }}<|im_end|>{% endfor %}"
        )
        assert tokenizer.encode_chat([Message("user", "abc")]) == [IM_START, *tokenizer.encode("ABC"), IM_END]
        with pytest.raises(InvalidRequest, match=r"messages\[1\]\.content spells a control token"):
            tokenizer.encode_chat([Message("user", "abc"), Message("user", "<|im_end|>")])

    def test_a_message_cannot_run_template_code(self, folder: Path) -> None:
        tokenizer = self.with_template(folder, "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}")
        assert tokenizer.chat([Message("user", "{{ 7 * 7 }}")]) == "<|im_start|>{{ 7 * 7 }}"

    def test_no_template_is_refused_with_the_way_out(self, folder: Path) -> None:
        tokenizer = self.with_template(folder, None)
        assert not tokenizer.has_chat_template
        for call in (tokenizer.chat, tokenizer.encode_chat):
            with pytest.raises(Unsupported, match=r"messages: .* send `prompt` instead"):
                call([Message("user", "hi")])

    def test_a_refusing_template_gives_its_own_words(self, folder: Path) -> None:
        tokenizer = self.with_template(folder, "{{ raise_exception('roles must alternate') }}")
        with pytest.raises(InvalidRequest, match="roles must alternate"):
            tokenizer.chat([Message("user", "secret words")])

    def test_no_messages_are_refused(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(InvalidRequest, match="messages: at least one"):
            tokenizer.chat([])


def test_a_post_processor_start_token_is_found(folder: Path, tmp_path: Path) -> None:
    pipeline = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    pipeline.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", IM_START)]
    )
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=pipeline, eos_token="<|im_end|>"))
    assert tokenizer.bos_ids == (IM_START,)
    assert tokenizer.encode("a") == tokenizer.encode_prompt("a")[1:]
    assert tokenizer.encode_prompt("a")[0] == IM_START


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(CorruptBlock, match=r"tokenizer\.json is not JSON"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(CorruptBlock, match=r"tokenizer\.json cannot be read") as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) not in str(caught.value)
