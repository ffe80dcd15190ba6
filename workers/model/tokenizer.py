"""Text to token ids and back, and chats to prompts. User text can never become a control token.

Two instances of the same `tokenizers` pipeline are held: one that recognises special tokens in the text, for what the
chat template itself writes, and one that treats every control token as plain characters, for what people write.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast

from winnow.errors import CorruptBlock, InvalidRequest, UnknownName, Unsupported
from winnow.types import Message
from winnow.workers.model.detokenizer import HasTokenBytes, IncrementalDetokenizer, TokenBytes

__all__ = ["IncrementalDetokenizer", "Tokenizer", "tokenizer_files"]

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that say how it tokenises; those that exist."""
    return [folder / name for name in _FILES if (folder / name).is_file()]


class Tokenizer(HasTokenBytes):
    """A tokenizer with its chat template.

    Attributes:
        eos_ids: ids that end a text, from the model's generation config, config and tokenizer.
        bos_ids: ids the model expects at the start of a raw prompt; often empty.
        vocab_size: number of ids, added tokens included; the model's own may be padded beyond it.
        token_bytes: what each id adds to a text.
    """

    def __init__(self, fast: PreTrainedTokenizerFast, eos_ids: Iterable[int] = ()) -> None:
        self._fast = fast
        self._with_special: tokenizers.Tokenizer = fast.backend_tokenizer
        self._with_special.no_padding()
        self._with_special.no_truncation()
        own = [fast.eos_token_id] if fast.eos_token_id is not None else []
        self.eos_ids = tuple(dict.fromkeys([*eos_ids, *own]))
        self.vocab_size: int = self._with_special.get_vocab_size(with_added_tokens=True)
        self.bos_ids: tuple[int, ...] = tuple(self._with_special.encode("", add_special_tokens=True).ids)
        if self.bos_ids and self.bos_ids[-1] in self.eos_ids and len(self.bos_ids) > 1:
            self.bos_ids = self.bos_ids[:-1]  # a post-processor that also ends the text
        added = self._with_special.get_added_tokens_decoder()
        template = fast.chat_template if isinstance(fast.chat_template, str) else ""
        self._control = {
            token.content: idx
            for idx, token in added.items()
            if token.special or idx in self.eos_ids or (token.content in template and not token.content.isspace())
        }
        self._lstrip = {token.content for token in added.values() if token.lstrip}
        self._rstrip = {token.content for token in added.values() if token.rstrip}
        longest_first = sorted(self._control, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._plain = _without_control(self._with_special, set(self._control))
        self.token_bytes = TokenBytes(self._with_special)

    @classmethod
    def from_folder(cls, folder: Path, eos_ids: Iterable[int] = ()) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja of a Hugging Face folder.

        Raises:
            UnknownName: no tokenizer.json.
            CorruptBlock: one of the files cannot be read.
        """
        if not (folder / "tokenizer.json").is_file():
            raise UnknownName(
                "model: the folder has no tokenizer.json; write one with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            )
        for file in tokenizer_files(folder):
            if file.suffix == ".json":
                try:
                    json.loads(file.read_bytes())
                except ValueError:
                    raise CorruptBlock(f"model: {file.name} is not JSON; copy or download it again") from None
        try:
            fast = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # tokenizers raises bare Exception for a file it cannot make sense of
            raise CorruptBlock(
                f"model: tokenizer.json cannot be read ({type(error).__name__}); copy or download it again"
            ) from None
        return cls(fast, eos_ids)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja."""
        self._fast.save_pretrained(str(folder))

    @property
    def has_chat_template(self) -> bool:
        """`chat` and `encode_chat` can be used."""
        return bool(self._fast.chat_template)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text. Nothing is added at either end.

        Args:
            special: control tokens written in the text become control tokens. Only for text that the program wrote
                itself; with False a "<|im_end|>" in it is just its characters.
        """
        chosen = self._with_special if special else self._plain
        ids: list[int] = chosen.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a raw prompt: `bos_ids`, then the text with no control tokens recognised."""
        return [*self.bos_ids, *self.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens left out, undecodable bytes as U+FFFD. Ids outside the vocabulary add nothing."""
        detokenizer = IncrementalDetokenizer(self)
        return detokenizer.push(ids) + detokenizer.flush()

    def chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt text of a chat, by the model's own template. For ids use `encode_chat`, which is safe.

        Raises:
            Unsupported: the model has no template.
            InvalidRequest: no messages, or the template refuses them.
        """
        if not self._fast.chat_template:
            raise Unsupported("messages: this model has no chat template; send `prompt` instead")
        if not messages:
            raise InvalidRequest("messages: at least one is needed, got 0")
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = str(self._fast.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt))
        except Exception as error:  # templates are programs of the model's makers: they raise what they like
            reason = f"the model's chat template refuses them ({_template_reason(error)})"
            raise InvalidRequest(f"messages: {reason}; change the roles or their order") from None
        return text

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a chat: control tokens where the template writes them, never where a message does.

        The template is rendered once with the real contents and once with a random mark in place of each content. If both
        hold the same control tokens the text is harmless and is encoded in one go, exactly as transformers would. If a
        message spells a control token, text between the template's own control tokens is encoded as plain characters.

        Raises:
            Unsupported, InvalidRequest: as `chat`; InvalidRequest also when a message spells a control token and the
                template rewrites messages in a way that leaves their place unknown.
        """
        text = self.chat(messages, add_generation_prompt=add_generation_prompt)
        if not any(self._spells_control(message.content) for message in messages):
            return self.encode(text, special=True)
        salt = secrets.token_hex(8)
        marks = [f"\x02{salt}{i}\x03" for i in range(len(messages))]
        marked = self.chat(
            [Message(message.role, mark) for message, mark in zip(messages, marks, strict=True)],
            add_generation_prompt=add_generation_prompt,
        )
        stretches = self._stretches(marked)
        contents = self._placed(text, stretches, marks, [message.content for message in messages])
        template_controls = [name for name, _ in stretches if name]
        if template_controls == self._control_pattern.findall(text):
            return self.encode(text, special=True)
        ids: list[int] = []
        for name, literal in stretches:
            if name:
                ids.append(self._control[name])
            plain = _fill(literal, marks, contents)
            if plain:
                ids.extend(self.encode(plain))
        return ids

    def _spells_control(self, content: str) -> bool:
        """The content holds a control token, or one of its edges could form one together with its surroundings."""
        return bool(self._control_pattern.search(content)) or any(
            content.endswith(name[:i]) or content.startswith(name[i:]) for name in self._control for i in range(1, len(name))
        )

    def _stretches(self, marked: str) -> list[tuple[str, str]]:
        """(control token or "", text after it) pairs; tokens that swallow the spaces around them have done so."""
        out: list[tuple[str, str]] = []
        name, start = "", 0
        for match in self._control_pattern.finditer(marked):
            out.append((name, marked[start : match.start()]))
            name, start = match.group(), match.end()
        out.append((name, marked[start:]))
        for i, (name, literal) in enumerate(out):
            if name in self._rstrip:
                literal = literal.lstrip()
            if i + 1 < len(out) and out[i + 1][0] in self._lstrip:
                literal = literal.rstrip()
            out[i] = (name, literal)
        return out

    def _placed(self, text: str, stretches: list[tuple[str, str]], marks: list[str], contents: list[str]) -> list[str]:
        """The contents as the template writes them: as they are, or stripped. Checked against the real rendering."""
        for variant in (contents, [content.strip() for content in contents]):
            joined = "".join(name + _fill(literal, marks, variant) for name, literal in stretches)
            if joined == text or (self._lstrip | self._rstrip and "".join(joined.split()) == "".join(text.split())):
                return variant
        bad = next((i for i, content in enumerate(contents) if self._control_pattern.search(content)), 0)
        raise InvalidRequest(
            f"messages[{bad}].content spells a control token of this model, and its chat template rewrites messages; "
            "take the token out of the text, or send `prompt` instead"
        )


def _fill(literal: str, marks: list[str], contents: list[str]) -> str:
    for mark, content in zip(marks, contents, strict=True):
        literal = literal.replace(mark, content)
    return literal


def _without_control(tokenizer: tokenizers.Tokenizer, control: set[str]) -> tokenizers.Tokenizer:
    """A copy that reads control tokens as plain characters: they are marked special, and special ones are not looked for."""
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["special"] or token["content"] in control
    copy = tokenizers.Tokenizer.from_str(json.dumps(state))
    copy.encode_special_tokens = True
    return copy


def _template_reason(error: Exception) -> str:
    """A template's own words for a refusal; never the text of a message."""
    import jinja2

    if type(error) is jinja2.exceptions.TemplateError:
        return " ".join(itertools.islice(str(error).split(), 20))
    return type(error).__name__
