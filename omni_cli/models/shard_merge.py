"""An adapter folded into the files of its base: one tensor at a time, in float32, rounded once.

What is written has the base's own files: their names, their headers byte for byte (names, types and shapes of tensors,
metadata), their index. A tensor that the adapter leaves alone is copied as it lies there, so whatever reads the base
reads the merged model too. Beside the adapter no more than one tensor is in memory.

Which tensor of a file a layer's weight is, transformers says (a Qwen2.5-VL's files have the names of the library before
4.52); what becomes of it, PEFT says: each of its layers merges the one weight that it is lent.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_NAME

from omni_cli.errors import DataError, OmniError
from omni_cli.models import base_files
from omni_cli.models.adapters import check_kind
from omni_cli.models.families import model_config
from omni_cli.models.model_folders import ADAPTER_WEIGHTS, INDEX, check_config, header, weight_files
from omni_cli.models.qwen_vl import empty_model

Change = Callable[[Tensor], Tensor]  # a weight of the base -> the merged one, both of the wider type
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of a file of safetensors tells of it."""

    name: str
    type: str
    shape: tuple[int, ...]
    size: int  # bytes


@dataclass(frozen=True)
class ShardMerge:
    """A merge that was found to fit: every weight that the adapter changes is in the base's files, once.

    Attributes:
        base: folder of the base's files.
        adapter: folder that PEFT wrote.
        files: the names of those with weights.
        changes: by the name that a tensor has in its file.
        types: of the tensors that change, by the names that the model has for them.
        total_bytes: of all tensors.
    """

    base: Path
    adapter: Path
    files: tuple[str, ...]
    changes: Mapping[str, Change]
    types: Mapping[str, torch.dtype]
    total_bytes: int

    def write(self, folder: Path, advance: Callable[[int], None]) -> dict[str, str]:
        """Write the merged files, their index and what is beside them; return the sha256 of every tensor by its name.

        Args:
            folder: that is empty.
            advance: told of the bytes of weights that were written.

        Raises:
            DataError: a merged weight is not finite.
        """
        digests: dict[str, str] = {}
        for name in self.files:
            digests |= _merge_file(self.base / name, folder / name, self.changes, advance)
        if (self.base / INDEX).is_file() and self.files != (SAFE_WEIGHTS_NAME,):
            (folder / INDEX).write_bytes((self.base / INDEX).read_bytes())
        base_files.write_beside(self.base, self.adapter, folder)
        return digests

    def count_changed(self, folder: Path, digests: Mapping[str, str]) -> int:
        """Return how many tensors of the written files are not those that `write` made, bit for bit."""
        found = {name: digest for file in self.files for name, digest in _digests(folder / file)}
        return sum(found.get(name) != digests.get(name) for name in found.keys() | digests.keys())


def plan(base: Path, adapter: Path) -> ShardMerge:
    """Find for every tensor of an adapter the one of its base that it changes.

    Args:
        base: folder with configuration and safetensors.
        adapter: folder that PEFT wrote.

    Raises:
        DataError: one has no place, or more than one; the files are damaged, quantised, or of another shape.
    """
    if "quantization_config" in check_config(base):
        raise DataError(f"base {str(base)!r} is quantised itself; merging needs the weights that it was made from")
    model = empty_model(model_config(str(base)))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = tuple(weight_files(base))
    tensors = [stored for name in names for stored in _tensors(base / name)]
    own_names = model_names(model, [stored.name for stored in tensors])
    wanted = _changes(model, adapter)
    found: dict[str, list[Stored]] = {name: [] for name in wanted}
    for stored in tensors:
        if (name := own_names[stored.name]) in found:
            found[name].append(stored)
    for name, places in found.items():
        _check_place(base, name, places, shapes[name])
    return ShardMerge(
        base=base,
        adapter=adapter,
        files=names,
        changes={places[0].name: wanted[name] for name, places in found.items()},
        types={name: _TYPES[places[0].type] for name, places in found.items()},
        total_bytes=sum(stored.size for stored in tensors),
    )


def model_names(model: PreTrainedModel, stored: Sequence[str]) -> dict[str, str | None]:
    """Return what a model calls each tensor of its files, as transformers finds it when it loads them.

    (`convert_and_load_state_dict_in_model` of transformers 5.23, `core_model_loading.py`.) None stands for a tensor
    that the library makes others of, or that the model does not have.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    wanted, prefix = model.state_dict(), model.base_model_prefix
    result: dict[str, str | None] = {}
    for name in stored:
        own, converted = rename_source_key(name, renamings, converters, prefix, wanted)
        if own not in wanted and name in wanted:
            own, converted = rename_source_key(name, [], [], prefix, wanted)
        result[name] = own if own in wanted and converted is None else None
    return result


def merged_weights(adapted: Any) -> dict[str, nn.Parameter]:
    """Return the weights that PEFT's merge changes, or puts in the place of the base's, by the base's own names."""
    weights: dict[str, nn.Parameter] = {}
    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            weights[f"{name}.weight"] = module.get_base_layer().weight
        elif isinstance(module, ModulesToSaveWrapper):
            learned = module.modules_to_save["default"].named_parameters()
            weights |= {f"{name}.{key}": weight for key, weight in learned}
    return weights


def _check_place(base: Path, name: str, places: Sequence[Stored], shape: tuple[int, ...]) -> None:
    if len(places) != 1:
        raise DataError(
            f"the adapter changes {name}, which the files of base {str(base)!r} hold {len(places)} times, expected "
            "once: bring back the base that it was trained on, or train it again"
        )
    stored = places[0]
    if stored.shape != shape or stored.type not in _TYPES:
        raise DataError(
            f"base {str(base)!r}: {stored.name} is {stored.type} of shape {stored.shape}, expected shape {shape} and "
            f"one of {', '.join(_TYPES)}: merge into the base's original weights, which are not quantised"
        )


def _changes(model: PreTrainedModel, adapter: Path) -> dict[str, Change]:
    """Return what an adapter makes of the weights of a model without storage, by the model's own names.

    Raises:
        DataError: a tensor of the adapter has no place in the model, or the model lacks one.
    """
    wrapped = _attached(model, adapter)
    changes: dict[str, Change] = {}
    for name, module in wrapped.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            changes[f"{name}.weight"] = _merging(module, name)
        elif isinstance(module, ModulesToSaveWrapper):
            learned = module.modules_to_save["default"].state_dict()
            changes |= {f"{name}.{key}": _replacing(weight) for key, weight in learned.items()}
    return changes


def _attached(model: PreTrainedModel, adapter: Path) -> Any:
    """Return a model without storage with an adapter that has one, every tensor of it in its place.

    Raises:
        DataError: one has no place, is missing, or changes more than the weights of dense layers.
    """
    check_kind(adapter)
    unfit, tensors = f"adapter {adapter} does not match its base model", load_file(adapter / ADAPTER_WEIGHTS)
    try:
        wrapped = _empty_adapter(model, LoraConfig.from_pretrained(adapter))
        places = _places(wrapped)
        fitting = {places[key]: tensor for key, tensor in tensors.items() if key in places}
        wrapped.load_state_dict(fitting, strict=False, assign=True)
    except OmniError:
        raise
    except Exception as error:  # what a library makes of settings that another hand wrote can be any
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise DataError(f"{unfit}: {reason}") from None
    if strangers := tensors.keys() - places.keys():
        raise DataError(f"{unfit}: {min(strangers)} has no place in it; train it again")
    if lacking := places.keys() - tensors.keys():
        raise DataError(f"{unfit}: {min(lacking)} is not in the adapter; train it again")
    return wrapped


def _empty_adapter(model: PreTrainedModel, config: LoraConfig) -> Any:
    if config.bias != "none" or config.lora_bias:
        raise DataError("the adapter also changes biases, which omni cannot merge; train it again without")
    config.base_model_name_or_path = None  # PEFT would warn of a folder that has moved; which base it is was checked
    return get_peft_model(model, config, low_cpu_mem_usage=True)


def _places(wrapped: Any) -> dict[str, str]:
    """Return where in a PEFT model each tensor of the adapter's file belongs.

    PEFT loads a file too, but casts what it loads to the type of the base and moves it to its device.
    """
    own = wrapped.state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in own.items()}
    kept = get_peft_model_state_dict(wrapped, state_dict=own, save_embedding_layers=False)
    return {key: names[id(tensor)] for key, tensor in kept.items()}


def _merging(layer: Any, name: str) -> Change:
    """Return PEFT's merge of one layer; it is lent the weight, and left without."""
    base_layer = layer.get_base_layer()
    if not isinstance(base_layer, nn.Linear):
        raise DataError(f"the adapter sits on {name}, a {type(base_layer).__name__}; omni merges into dense layers")

    def merged(weight: Tensor) -> Tensor:
        empty, base_layer.weight = base_layer.weight, nn.Parameter(weight, requires_grad=False)
        layer.merge(safe_merge=True)
        result, base_layer.weight = base_layer.weight.data, empty
        layer.merged_adapters.clear()  # the weight has gone: another may come
        return result

    return merged


def _replacing(learned: Tensor) -> Change:
    return lambda weight: learned.to(weight.dtype)


# -- files of safetensors, as bytes (https://github.com/huggingface/safetensors#format)


def _merge_file(
    source: Path, target: Path, changes: Mapping[str, Change], advance: Callable[[int], None]
) -> dict[str, str]:
    """Write one merged file, and return the sha256 of its tensors."""
    digests: dict[str, str] = {}
    with source.open("rb") as read, target.open("xb") as written:
        written.write(_head(read))
        for stored in _tensors(source):
            digest = hashlib.sha256()
            for block in _content(read, stored, changes.get(stored.name)):
                digest.update(block)
                written.write(block)
                advance(memoryview(block).nbytes)
            digests[stored.name] = digest.hexdigest()
    return digests


def _content(read: BufferedReader, stored: Stored, change: Change | None) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a tensor: as they lie there, or merged."""
    if change is None:
        yield from _blocks(read, stored.size)
    else:
        content = bytearray(stored.size)
        if read.readinto(content) != stored.size:
            raise _cut_short(read)
        yield _merged(content, stored, change)


@torch.no_grad()
def _merged(content: bytearray, stored: Stored, change: Change) -> memoryview:
    """Return the bytes of a merged tensor, of the type that it had.

    Raises:
        DataError: it is not finite.
    """
    dtype = _TYPES[stored.type]
    weight = torch.frombuffer(content, dtype=dtype).view(stored.shape)
    try:
        result = change(weight.to(torch.promote_types(dtype, torch.float32))).to(dtype)
    except ValueError as error:  # as PEFT tells of what is not finite
        raise DataError(f"{stored.name} cannot be merged: {str(error).splitlines()[0]}; train it again") from None
    if not torch.isfinite(result).all():
        raise DataError(f"{stored.name} merged is not finite as {stored.type}; train the adapter again")
    return result.contiguous().view(-1).view(torch.uint8).numpy().data


def _tensors(path: Path) -> list[Stored]:
    """Return the tensors of a file in the order in which they lie there.

    Raises:
        DataError: it is damaged.
    """
    header(path, is_quantized=True)  # the library checks that they fill the file, without gaps
    with path.open("rb") as stream:
        entries = json.loads(_head(stream)[8:])
    entries.pop("__metadata__", None)
    ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    return [
        Stored(name, entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in ordered
    ]


def _digests(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the sha256 of every tensor of a file."""
    with path.open("rb") as stream:
        _head(stream)
        for stored in _tensors(path):
            digest = hashlib.sha256()
            for block in _blocks(stream, stored.size):
                digest.update(block)
            yield stored.name, digest.hexdigest()


def _head(stream: BinaryIO) -> bytes:
    """Read a file up to its tensors: the length of the header in 8 bytes, and the header."""
    length = stream.read(8)
    return length + stream.read(int.from_bytes(length, "little"))


def _blocks(stream: BinaryIO, size: int) -> Iterator[bytes]:
    while size:
        block = stream.read(min(size, _BLOCK_BYTES))
        if not block:
            raise _cut_short(stream)
        size -= len(block)
        yield block


def _cut_short(stream: BinaryIO) -> DataError:
    return DataError(f"{stream.name}: ends before its last tensor; take the folder again from where it came")
