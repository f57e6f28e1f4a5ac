"""Answers held to a grammar: of each next token only those may be chosen by which a text of the grammar goes on.

llguidance walks the grammar: 3 MB, no dependencies, masks for a batch in microseconds, rules bounded in tokens. Its own
adapter for Hugging Face tokenizers takes an added token in angle brackets for a special one, also where it is plain
text, as `<think>` of Qwen3 is; so it is given the bytes of each token here.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from torch import Tensor
from transformers import LogitsProcessor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from omni_cli.errors import DataError

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")  # (256, 8) of each byte
_EIGHTS = torch.from_numpy(_BITS).view(torch.int64)[:, 0]  # the same as one number: quick to unpack masks by
_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


class Grammar:
    """A grammar over the tokens of one byte-level tokenizer: of 150,000 tokens made in two to three seconds.

    Args:
        lark: as llguidance reads it; special tokens are in none of its texts.
        most_tokens: by which each of its texts has ended.
        tokenizer: of the model.
        end: the token that ends an answer.

    Raises:
        DataError: the tokenizer is not byte-level.
    """

    def __init__(self, lark: str, most_tokens: int, tokenizer: Any, end: str) -> None:
        self.most_tokens = most_tokens
        self._end = int(tokenizer.convert_tokens_to_ids(end))
        self._start = LLMatcher(LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, self._end))), lark)
        assert not self._start.is_error(), self._start.get_error()

    def over(self, rows: int) -> "HeldToGrammar":
        """Return what holds one batch of answers to it."""
        return HeldToGrammar([self._start.deep_copy() for _ in range(rows)], self._end)


class HeldToGrammar(LogitsProcessor):
    """Leaves each row of a batch only the tokens that its grammar allows; it must come after all other processors.

    Attributes:
        tokens: of each row's answer so far, the one that ends it among them.
        off_grammar: how many of them were not those that would have been chosen, as these were not allowed.

    Args:
        matchers: one a row, at the start of its grammar.
        end: id of the token that ends an answer; whatever follows it is padding.
    """

    def __init__(self, matchers: Sequence[LLMatcher], end: int) -> None:
        self.tokens, self.off_grammar = [0] * len(matchers), [0] * len(matchers)
        self._matchers, self._end = matchers, end
        self._open = list(range(len(matchers)))  # rows whose answer goes on

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Set scores (rows, vocabulary) to -inf in place where a token is not allowed: `generate` gives a copy.

        Raises:
            DataError: a score is NaN.
        """
        if any(self.tokens):
            self._take(input_ids[:, -1].tolist())
        likeliest = scores.argmax(1, keepdim=True)  # a NaN, where there is one
        self._check(scores.gather(1, likeliest)[:, 0])
        forbidden = self._forbidden(scores)
        is_off = forbidden.gather(1, likeliest)[:, 0].tolist()
        for row in self._open:
            self.tokens[row] += 1
            self.off_grammar[row] += is_off[row]
        return scores.masked_fill_(forbidden, -torch.inf)

    def _check(self, largest: Tensor) -> None:
        """Refuse a model without a likeliest token: held to a grammar it would seem to answer, with the same numbers.

        Raises:
            DataError: the largest score (rows,) of an answer that goes on is NaN.
        """
        if any(largest[self._open].isnan().tolist()):
            raise DataError(
                "the model scores its next token NaN, so that no answer is its own: its weights are damaged, or too "
                "large for the precision; answer by other weights, or in float32"
            )

    def _take(self, chosen: Sequence[int]) -> None:
        """Go on by the tokens that were chosen."""
        self._open = [row for row in self._open if chosen[row] != self._end]
        for row in self._open:
            is_taken = self._matchers[row].consume_token(chosen[row])
            assert is_taken, self._matchers[row].get_error()

    def _forbidden(self, scores: Tensor) -> Tensor:
        """Return which tokens must not be chosen (rows, vocabulary); none where an answer has ended."""
        rows, width = scores.shape
        packed = np.zeros((rows, -(-width // 8)), np.uint8)
        for row in self._open:
            mask = np.frombuffer(self._matchers[row].compute_bitmask(), np.uint8)[: packed.shape[1]]
            packed[row] = 255  # a model may have more tokens than its tokenizer
            packed[row, : len(mask)] = ~mask
        eights = _EIGHTS.to(scores.device).index_select(0, torch.from_numpy(packed).to(scores.device).flatten().int())
        return eights.view(torch.bool).view(rows, -1)[:, :width]


class _Vocabulary:
    """A byte-level tokenizer as llguidance asks for one."""

    def __init__(self, tokenizer: Any, end: int) -> None:
        added, known = tokenizer.added_tokens_decoder, tokenizer.get_vocab()
        self.eos_token_id, self.bos_token_id = end, None
        self.special_token_ids = [index for index, token in added.items() if token.special]
        self.tokens = [b""] * (max(known.values()) + 1)
        for text, index in known.items():
            self.tokens[index] = text.encode() if index in added else _bytes_of(text)
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text.decode(), add_special_tokens=False)
        return ids


def _bytes_of(token: str) -> bytes:
    """Return the bytes of a token, each of which byte-level vocabularies write as one printable character."""
    if unknown := set(token) - _BYTE_OF.keys():
        raise DataError(
            f"the tokenizer's token {token!r} holds {min(unknown)!r}, which stands for no byte; only answers of models "
            "with a byte-level tokenizer, as Qwen's is, can be held to their format"
        )
    return bytes(_BYTE_OF[character] for character in token)
