"""Loading Qwen-VL models and calling them the one right way: our rope ids, a frozen tower outside autograd."""

import copy
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file, extract_commit_hash

from omni_cli import files
from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.models import packing, parts, quantised, sharded, wiring
from omni_cli.models.families import family_of, hub_arguments, is_path, model_config, split_revision
from omni_cli.models.model_folders import CONFIG, check_config, check_weights, read_config, reading

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Half a byte a weight; a byte for the scale of each 64, and four for the scale of each 256 of those (double quantised).
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
_DEVICES = re.compile(r"cpu|cuda(:\d+)?")
_TURN_END = "<|im_end|>"  # after every answer
_VIDEO_TOKENS = ("<|video_pad|>", "<video>", "<IMG_CONTEXT>")  # one of them is in every prompt
_MOST_LACKING = 2  # times the weights held that a configuration may ask for until those that lack are named
_MOST_PACKED = 8  # quantised weights in one number of a file: AWQ and GPTQ put eight of 4 bits into 32


def load_model(source: str, dtype: torch.dtype, quantization: str = "none") -> PreTrainedModel:
    """Load weights from the safetensors of a folder or the hub.

    Raises:
        UsageError: they are to be quantised, and bitsandbytes is not installed.
        OmniError: they are not there, or the hub cannot be reached, or what is quantised or multiplied is wrong.
        DataError: the folder is damaged, some are missing, or have other shapes: the library would draw them at random.
    """
    quantise = {"quantization_config": quantised.nf4(dtype)} if quantization == "nf4" else {}
    if Path(source).is_dir():
        _check_size(source)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # told of, that they may be named
    with reading("load model", source):
        model, found = AutoModelForImageTextToText.from_pretrained(**hub_arguments(source), **options, **quantise)
    if other := sorted(found["mismatched_keys"]):
        name, held, asked = other[0]
        raise DataError(
            f"model {source!r}: {name} has the shape {tuple(held)}, its config.json asks for {tuple(asked)}; "
            "take the folder again from where it came"
        )
    if absent := sorted(found["missing_keys"]):
        raise DataError(f"model {source!r} lacks {len(absent)} of its weights, first {absent[0]}; fetch it again")
    if quantise or quantised.quantised_layers(model):
        quantised.ready(model, dtype)
    return cast(PreTrainedModel, model)


def as_loaded(model: PreTrainedModel, dtype: str, quantization: str) -> PreTrainedModel:
    """Return a model that was drawn here as if it had been loaded in this type and quantised so."""
    if quantization == "none":
        return cast(PreTrainedModel, place(model, "cpu", dtype))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = load_model(folder, DTYPES[dtype], quantization)
    loaded.name_or_path = loaded.config.name_or_path = model.name_or_path  # by which an adapter knows its base
    return loaded


def _check_size(folder: str) -> None:
    """Refuse a folder whose configuration asks for more than its weights are, before memory is taken for it.

    Raises:
        UsageError: it is of a family that omni does not know, an adapter or a run.
        DataError: it does, or its files are damaged.
    """
    family_of(folder)
    config = model_config(folder)
    is_quantized = getattr(config, "quantization_config", None) is not None
    held = check_weights(Path(folder), is_quantized=is_quantized)
    wanted = sum(weight.numel() for weight in empty_model(config).parameters())
    if wanted > _MOST_LACKING * held * (_MOST_PACKED if is_quantized else 1):
        raise DataError(
            f"model {folder!r}: its config.json asks for {wanted:,} weights, its files hold {held:,}; "
            "take the folder again from where it came"
        )


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model whose weights have shapes and no storage.

    Raises:
        DataError: no model can be made of a folder's configuration.
    """
    with reading("plan model", config.name_or_path or config.model_type), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def weight_bytes(model: nn.Module, dtype: torch.dtype, quantization: str) -> int:
    """Return the bytes of a model's weights; where it is quantised, all but the decoder's matrices keep their type."""
    is_nf4 = quantization == "nf4"
    each = [
        weight.numel() * (_NF4_BYTES if is_nf4 and weight.ndim == 2 and quantised.DECODER in name else dtype.itemsize)
        for name, weight in model.named_parameters()
    ]
    return round(sum(each))


def load_tokenizer(source: str, named: Mapping[str, str] | None = None) -> Any:
    """Load a tokenizer from a folder or the hub.

    Args:
        source: folder or hub id.
        named: tokens that it is to know by a name of their own.

    Raises:
        OmniError: it is not there, or the hub cannot be reached.
        DataError: a folder's is damaged, or knows no token for a picture of a video.
    """
    if (Path(source) / CONFIG).is_file():
        read_config(Path(source))  # the library looks into it too
    with reading("load the tokenizer of", source):
        more = {"model_specific_special_tokens": dict(named)} if named else {}
        tokenizer = AutoTokenizer.from_pretrained(**hub_arguments(source), **more)
        known = tokenizer.get_vocab()
    lacks = [some[0] for some in ((_TURN_END,), _VIDEO_TOKENS) if known.keys().isdisjoint(some)]
    if lacks:
        raise DataError(f"the tokenizer of {source!r} knows no {lacks[0]}; expected a Qwen-VL model's")
    return tokenizer


def base_of(model: nn.Module) -> Any:
    """Return the Qwen-VL model inside a PEFT model or a data-parallel wrapper."""
    inner: Any = model.module if hasattr(model, "module") and isinstance(model.module, nn.Module) else model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def tower_is_frozen(model: nn.Module) -> bool:
    """Say whether neither the vision tower nor what maps its output to the language model's width learns."""
    return not parts.learning_counts(base_of(model)).keys() & {"vision", "merger"}


def video_features(model: nn.Module, pixel_values: Tensor, grids: Tensor) -> Any:
    """Return the vision tower's output, outside autograd where the tower is frozen.

    Args:
        model: a vision-language model, wrapped or not.
        pixel_values: of all windows, as `Preprocess.pixel_values` makes them.
        grids: (windows, 3) patches in time, height and width.
    """
    base = base_of(model)
    learning = torch.is_grad_enabled() and not tower_is_frozen(model)
    with torch.set_grad_enabled(learning), _frozen_layers_outside_autograd(base):
        return wiring.wiring_of(base).look(base, pixel_values, grids)


@contextmanager
def _frozen_layers_outside_autograd(base: Any) -> Iterator[None]:
    """Cut a tower of which at most the mergers learn off below them; what has no gradient needs no checkpoint.

    The library makes the embedded patches ask for gradients where layers are checkpointed, and with them every layer.
    """
    if parts.learning_names(base, "vision"):
        yield
        return
    embedding, tower = wiring.embedding_of(base), wiring.tower_of(base)
    hook = embedding.register_forward_hook(lambda _module, _inputs, output: wiring.detached(output))
    checkpointed = [module for module in tower.modules() if getattr(module, "gradient_checkpointing", False)]
    try:
        for module in checkpointed:
            module.gradient_checkpointing = False
        yield
    finally:
        hook.remove()
        for module in checkpointed:
            module.gradient_checkpointing = True


def forward_logits(model: nn.Module, batch: Any, features: Any, keep: Tensor) -> Tensor:
    """Return logits (kept positions, vocabulary) of packed rows.

    Args:
        model: the model as the Trainer sees it, so that data-parallel hooks run.
        batch: what `packing.pack` returned.
        features: what `video_features` returned.
        keep: (k,) positions whose logits are wanted; the head is not run on any other.
    """
    output = model(
        input_ids=batch["input_ids"],
        mm_encoder_outputs={wiring.wiring_of(base_of(model)).heard_as: features},
        logits_to_keep=keep,
        **packing.told_apart(base_of(model), batch),
    )
    logits: Tensor = output.logits[0]
    return logits


@torch.no_grad()
def generate_text(
    model: nn.Module,
    tokenizer: Any,
    batch: Any,
    features: Any,
    *,
    max_new_tokens: int,
    end: str,
    processors: Sequence[LogitsProcessor] = (),
) -> list[str]:
    """Answer greedily, whatever sampling or penalties the model's own settings ask for; the batch is padded left.

    Args:
        model: a Qwen-VL model.
        tokenizer: its tokenizer.
        batch: input_ids (n, l), attention_mask (n, l) and position_ids (4, n, l).
        features: what `video_features` returned.
        max_new_tokens: longest answer.
        end: the token that ends an answer.
        processors: change the logits before the largest is chosen.
    """
    length = batch["input_ids"].shape[1]
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.convert_tokens_to_ids(end),
        pad_token_id=tokenizer.pad_token_id,
    )
    with _generating_by(base_of(model), greedy):
        tokens = model.generate(  # type: ignore[operator]  # GenerationMixin, which nn.Module does not declare
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=wiring.positions(base_of(model), batch["position_ids"]),
            mm_encoder_outputs={wiring.wiring_of(base_of(model)).heard_as: features},
            logits_processor=LogitsProcessorList(processors),
        )
    return list(tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True))


@contextmanager
def _generating_by(base: Any, config: GenerationConfig) -> Iterator[None]:
    """Set a model's own generation settings aside: `generate` fills in from them whatever a call leaves open."""
    own, base.generation_config = base.generation_config, config
    try:
        yield
    finally:
        base.generation_config = own


def pad_rows(rows: Sequence[Tensor], value: int, *, left: bool = False) -> Tensor:
    """Stack tensors (…, length) into (n, …, longest)."""
    longest = max(row.shape[-1] for row in rows)
    padded = []
    for row in rows:
        missing = longest - row.shape[-1]
        padded.append(nn.functional.pad(row, (missing, 0) if left else (0, missing), value=value))
    return torch.stack(padded)


def place(model: nn.Module, device: str, dtype: str | None) -> nn.Module:
    """Move a model to a device; cast its weights, where they are not quantised, and never its rope tables.

    Raises:
        UsageError: there is no such device or type.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    if not _DEVICES.fullmatch(device):
        raise UsageError(f"--device {device}: expected cpu, cuda or cuda:N")
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}; expected cpu, cuda or cuda:N") from None
    if dtype is not None:
        for weight in model.parameters():
            if weight.is_floating_point():
                weight.data = weight.data.to(DTYPES[dtype])
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.to(DTYPES[dtype])  # its kernel on a CPU takes weights and statistics of one type
    return model


def save_model(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write weights (of the adapter alone, where there is one), configuration and tokenizer in the hub's layout.

    Args:
        model: where it is cut over ranks, every one must call this, and rank 0 writes.
        tokenizer: its tokenizer.
        folder: to write.
        dtype: of the weights that are written; as they are held where it is absent.
    """
    weights = sharded.gathered(model, dtype) if dtype else None
    if weights != {}:
        with sharded.as_uncut(model):
            model.save_pretrained(folder, state_dict=weights)
        if dtype:
            _config_of(model, dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _config_of(model: Any, dtype: torch.dtype) -> PreTrainedConfig:
    """Return a model's configuration as of weights of another type: the library tells what a model is held in."""
    config = copy.deepcopy(model.config)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.dtype = dtype
    return cast(PreTrainedConfig, config)


def weights_fingerprint(source: str) -> str:
    """Return a hash of the weights and the configuration in a local folder, or a hub id and its commit.

    Raises:
        UsageError: it is a path, and no folder is there, or one that is no model.
        DataError: the folder has no configuration or no safetensors, or they are damaged.
        OmniError: the hub cannot be reached and its cache does not hold the model.
    """
    folder = Path(source)
    if not folder.is_dir():
        _check_hub_id(source)
        return f"{split_revision(source)[0]}@{_hub_commit(source)}"
    check_weights(folder, is_quantized="quantization_config" in check_config(folder))
    weights = sorted(folder.glob("*.safetensors"))
    return files.hash_json({path.name: files.sha256_of(path) for path in [*weights, folder / CONFIG]})


def _check_hub_id(source: str) -> None:
    if is_path(source):
        raise UsageError(f"model {source!r}: no such folder here; expected a folder with weights, or a hub id such as "
                         "ORGANISATION/NAME")  # fmt: skip


def _hub_commit(model: str) -> str:
    name, revision = split_revision(model)
    try:
        return str(extract_commit_hash(cached_file(name, "config.json", revision=revision), None))
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise OmniError(f"model {model!r}: no such folder here, and not from the hub: {reason}") from None
