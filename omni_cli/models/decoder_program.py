"""The language model of a vision-language model as one ONNX program: it reads prompts, and goes on token by token.

Whatever it has read comes back as keys and values, and is given again with the next tokens: with none of those it
reads a prompt. The embedding of tokens and the head are inside, so that a tower, this and a tokenizer are a model.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from omni_cli.models import wiring

NAME = "decoder"
IDS, MASK, PLACES, SEEN = "input_ids", "attention_mask", "position_ids", "image_embeds"
LOGITS = "logits"
_LEVEL, _PAST, _PRESENT = "deepstack_", "past_key_values.", "present."
_KINDS = ("key", "value")
_BATCH, _LENGTH, _PAST_LENGTH, _TOTAL, _VISUAL = "batch", "length", "past", "past_and_length", "visual_tokens"
# What it is traced with: lengths of 0 and 1 would be taken for constants, equal ones for the same.
_TRACED = {_BATCH: 2, _LENGTH: 3, _PAST_LENGTH: 5, _VISUAL: 4}


class Decoder(nn.Module):
    """From tokens, what the tower saw, and what was read before, to the next token's logits and all that is read now.

    Args:
        base: a vision-language model of transformers, not wrapped.
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.language_model = base.model.language_model
        self.head = base.lm_head
        self.placeholder = wiring.placeholder_id(base.config)
        self.has_spatial_rope = wiring.wiring_of(base).has_spatial_rope
        self.levels = len(getattr(wiring.tower_of(base).config, "deepstack_visual_indexes", ()))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, image_embeds: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the logits (batch, vocabulary) after the last token, then the keys and values of each layer.

        Args:
            input_ids: (batch, length), padded on the left.
            attention_mask: (batch, past + length), 0 where padded.
            position_ids: (3, batch, length) in time, height and width, or (batch, length) where positions are text's.
            image_embeds: (visual tokens of all rows in order, hidden); none after the prompt.
            others: of each deepstack level the same; then the keys and values of each layer, both
                (batch, key heads, past, width).
        """
        levels, past = others[: self.levels], others[self.levels :]
        is_visual = input_ids == self.placeholder
        flat = is_visual.flatten().long()
        places = (flat.cumsum(0) * flat).view_as(input_ids)  # 0: no visual token
        text = self.language_model.embed_tokens(input_ids)
        embedded = torch.where(is_visual[..., None], _at(image_embeds, places), text)
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        with ExitStack() as stack:
            # The library adds a level by a boolean index, whose length is data: ONNX cannot hold that.
            for layer, level in zip(self.language_model.layers, levels, strict=False):
                hook = layer.register_forward_hook(partial(_add, _at(level, places)))
                stack.callback(hook.remove)
            read = self.language_model(
                inputs_embeds=embedded,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
        logits = self.head(read.last_hidden_state[:, -1])
        return (logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))

    def first_inputs(self, batch: Mapping[str, Tensor], seen: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the inputs that read prompts.

        Args:
            batch: input_ids (n, l) and attention_mask (n, l), padded on the left, and position_ids (4, n, l).
            seen: what the tower says of all windows, and its deepstack levels.
        """
        places = batch["position_ids"]
        names = (SEEN, *(f"{_LEVEL}{level}" for level in range(self.levels)))
        return {
            IDS: batch["input_ids"],
            MASK: batch["attention_mask"],
            PLACES: places[1:] if self.has_spatial_rope else places[0],
            **dict(zip(names, seen, strict=True)),
            **self._past(len(batch["input_ids"]), 0),
        }

    def traced_inputs(self) -> dict[str, Tensor]:
        """Return inputs of which no length is taken for a constant."""
        windows, length, past = _TRACED[_BATCH], _TRACED[_LENGTH], _TRACED[_PAST_LENGTH]
        batch = {
            "input_ids": torch.zeros(windows, length, dtype=torch.long),
            "attention_mask": torch.ones(windows, past + length, dtype=torch.long),
            "position_ids": torch.zeros(4, windows, length, dtype=torch.long),
        }
        levels = [torch.zeros(_TRACED[_VISUAL], self.language_model.config.hidden_size)] * (1 + self.levels)
        seen = [level.clone() for level in levels]
        return {**self.first_inputs(batch, seen), **self._past(windows, past)}

    def output_names(self) -> tuple[str, ...]:
        """Return the names of what `forward` returns."""
        return (LOGITS, *(name.replace(_PAST, _PRESENT) for name in self._past_names()))

    def free_axes(self) -> dict[str, dict[int, str]]:
        """Return the axes of inputs and outputs that may have any length, by the name of each."""
        first = 1 if self.has_spatial_rope else 0
        seen = {name: {0: _VISUAL} for name in (SEEN, *(f"{_LEVEL}{level}" for level in range(self.levels)))}
        past = {name: {0: _BATCH, 2: _PAST_LENGTH} for name in self._past_names()}
        present = {name.replace(_PAST, _PRESENT): {0: _BATCH, 2: _TOTAL} for name in past}
        return {
            IDS: {0: _BATCH, 1: _LENGTH},
            MASK: {0: _BATCH, 1: _TOTAL},
            PLACES: {first: _BATCH, first + 1: _LENGTH},
            **seen,
            **past,
            LOGITS: {0: _BATCH},
            **present,
        }

    def _past_names(self) -> list[str]:
        return [f"{_PAST}{layer}.{kind}" for layer in range(len(self.language_model.layers)) for kind in _KINDS]

    def _past(self, windows: int, length: int) -> dict[str, Tensor]:
        config = self.language_model.config
        width = self.language_model.layers[0].self_attn.head_dim
        shape = (windows, config.num_key_value_heads, length, width)
        return {name: torch.zeros(shape) for name in self._past_names()}


def next_inputs(inputs: Mapping[str, Tensor], present: Sequence[Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """Return the inputs that go on by one token.

    Args:
        inputs: of the step before.
        present: all outputs of that but the logits.
        tokens: (batch, 1) that come next.
    """
    past = [name for name in inputs if name.startswith(_PAST)]
    seen = [name for name in inputs if name == SEEN or name.startswith(_LEVEL)]
    return {
        IDS: tokens,
        MASK: torch.cat([inputs[MASK], torch.ones_like(tokens)], dim=1),
        PLACES: inputs[PLACES][..., -1:] + 1,
        **{name: inputs[name][:0] for name in seen},
        **dict(zip(past, present, strict=True)),
    }


def by_kind(outputs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Return a program's outputs as logits, keys and values."""
    return {"logits": [outputs[0]], "keys": list(outputs[1::2]), "values": list(outputs[2::2])}


def _at(values: Tensor, places: Tensor) -> Tensor:
    """Return the rows of values (n, width) at places counted from 1; zero at 0, of which there may be no other."""
    return torch.cat([values.new_zeros(1, values.shape[1]), values])[places]


def _add(level: Tensor, _layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output + level
