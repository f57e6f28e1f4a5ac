"""Loading Qwen-VL models and calling them the one right way: our rope ids, a frozen tower outside autograd."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file, extract_commit_hash

from omni_cli import files
from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.models.families import family_of, hub_arguments, is_path, model_config
from omni_cli.models.model_folders import CONFIG, check_config, check_weights, read_config, reading

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# The vision tower and the head stay in 16 bit; "visual" alone would spare nothing (transformers 5.23).
# Half a byte a weight; a byte for the scale of each 64, and four for the scale of each 256 of those (double quantised).
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
_DEVICES = re.compile(r"cpu|cuda(:\d+)?")
_NOT_QUANTISED = ["model.visual", "lm_head"]
_TOKENS = ("<|video_pad|>", "<|im_end|>")  # in every prompt, after every answer
_MOST_LACKING = 2  # times the weights held that a configuration may ask for until those that lack are named
_MOST_PACKED = 8  # quantised weights in one number of a file: AWQ and GPTQ put eight of 4 bits into 32


def load_model(source: str, dtype: torch.dtype, quantization: str = "none") -> PreTrainedModel:
    """Load weights from the safetensors of a folder or the hub.

    Raises:
        OmniError: they are not there, or the hub cannot be reached.
        DataError: the folder is damaged, some are missing, or have other shapes: the library would draw them at random.
    """
    if Path(source).is_dir():
        _check_size(source)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # told of, that they may be named
    if quantization == "nf4":
        options["quantization_config"] = _nf4(dtype)
    with reading("load model", source):
        model, found = AutoModelForImageTextToText.from_pretrained(**hub_arguments(source), **options)
    if other := sorted(found["mismatched_keys"]):
        name, held, asked = other[0]
        raise DataError(
            f"model {source!r}: {name} has the shape {tuple(held)}, its config.json asks for {tuple(asked)}; "
            "take the folder again from where it came"
        )
    if absent := sorted(found["missing_keys"]):
        raise DataError(f"model {source!r} lacks {len(absent)} of its weights, first {absent[0]}; fetch it again")
    return cast(PreTrainedModel, model)


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
        weight.numel() * (_NF4_BYTES if is_nf4 and weight.ndim == 2 and ".layers." in name else dtype.itemsize)
        for name, weight in model.named_parameters()
    ]
    return round(sum(each))


def load_tokenizer(source: str) -> Any:
    """Load a tokenizer from a folder or the hub.

    Raises:
        OmniError: it is not there, or the hub cannot be reached.
        DataError: a folder's is damaged, or knows no token for a picture of a video.
    """
    if (Path(source) / CONFIG).is_file():
        read_config(Path(source))  # the library looks into it too
    with reading("load the tokenizer of", source):
        tokenizer = AutoTokenizer.from_pretrained(**hub_arguments(source))
        lacks = [token for token in _TOKENS if token not in tokenizer.get_vocab()]
    if lacks:
        raise DataError(f"the tokenizer of {source!r} knows no {lacks[0]}; expected a Qwen-VL model's")
    return tokenizer


def base_of(model: nn.Module) -> Any:
    """Return the Qwen-VL model inside a PEFT model or a data-parallel wrapper."""
    inner: Any = model.module if hasattr(model, "module") and isinstance(model.module, nn.Module) else model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def tower_is_frozen(model: nn.Module) -> bool:
    """Say whether no weight of the vision tower learns."""
    return not any(weight.requires_grad for weight in base_of(model).model.visual.parameters())


def video_features(model: nn.Module, pixel_values: Tensor, grids: Tensor) -> Any:
    """Return the vision tower's output, outside autograd where the tower is frozen.

    Args:
        model: a Qwen-VL model, wrapped or not.
        pixel_values: (patches, values) of all windows, as `Preprocess.pixel_values` makes them.
        grids: (windows, 3) patches in time, height and width.
    """
    base = base_of(model)
    learning = torch.is_grad_enabled() and not tower_is_frozen(model)
    with torch.set_grad_enabled(learning):
        return base.get_video_features(pixel_values, grids, return_dict=True)


def repeat_features(features: Any, windows: int) -> Any:
    """Return the output of one window as if each of `windows` had been looked at: exact, and as cheap as one."""
    features.pooler_output = features.pooler_output * windows  # a tuple of one tensor a window
    if getattr(features, "deepstack_features", None) is not None:
        features.deepstack_features = [level * windows for level in features.deepstack_features]
    return features


def forward_logits(model: nn.Module, batch: Any, features: Any, keep: Tensor) -> Tensor:
    """Return logits (windows, kept positions, vocabulary).

    Args:
        model: the model as the Trainer sees it, so that data-parallel hooks run.
        batch: input_ids (n, l), attention_mask (n, l) and position_ids (4, n, l).
        features: what `video_features` returned.
        keep: (k,) positions whose logits are wanted; the head is not run on any other.
    """
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        mm_encoder_outputs={"video": features},
        logits_to_keep=keep,
        use_cache=False,
    )
    logits: Tensor = output.logits
    return logits


@torch.no_grad()
def generate_text(
    model: nn.Module, tokenizer: Any, batch: Any, features: Any, *, max_new_tokens: int, end: str
) -> list[str]:
    """Answer greedily, whatever sampling or penalties the model's own settings ask for; the batch is padded left.

    Args:
        model: a Qwen-VL model.
        tokenizer: its tokenizer.
        batch: input_ids (n, l), attention_mask (n, l) and position_ids (4, n, l).
        features: what `video_features` returned.
        max_new_tokens: longest answer.
        end: the token that ends an answer.
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
            position_ids=batch["position_ids"],
            mm_encoder_outputs={"video": features},
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


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write weights (of the adapter alone, where there is one), configuration and tokenizer in the hub's layout."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
        return f"{source}@{_hub_commit(source)}"
    check_weights(folder, is_quantized="quantization_config" in check_config(folder))
    weights = sorted(folder.glob("*.safetensors"))
    return files.hash_json({path.name: files.sha256_of(path) for path in [*weights, folder / CONFIG]})


def _check_hub_id(source: str) -> None:
    if is_path(source):
        raise UsageError(f"model {source!r}: no such folder here; expected a folder with weights, or a hub id such as "
                         "ORGANISATION/NAME")  # fmt: skip


def _hub_commit(model: str) -> str:
    try:
        return str(extract_commit_hash(cached_file(model, "config.json"), None))
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise OmniError(f"model {model!r}: no such folder here, and not from the hub: {reason}") from None


def _nf4(dtype: torch.dtype) -> Any:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_NOT_QUANTISED,
    )
