"""Which kernel torch attends with: where none of the fused ones is to be had it takes the slow one without a word.

Then scores of every token with every other are written to memory: 11 times slower at 4,096 tokens, and 16 times the
memory, as measured on an AMD GPU whose fused kernels were switched off (facts: unsloth PR 8821).
"""

import torch
from torch.nn.attention import SDPBackend

UNFUSED = SDPBackend.MATH.name
_TOKENS = 256
# As published: of Qwen2.5-VL-7B's language model (queries share keys and are causal), and of its tower.
_LANGUAGE, _TOWER = (28, 4, 128, True), (16, 16, 80, False)


def chosen_kernels(device: str, dtype: torch.dtype) -> dict[str, str]:
    """Return the kernel that a language model and a vision tower attend with here, by name of `SDPBackend`.

    Args:
        device: kind of device, such as `cuda`.
        dtype: that it computes in.
    """
    shapes = {"language model": _LANGUAGE, "vision tower": _TOWER}
    return {name: _chosen(*shape, device=device, dtype=dtype) for name, shape in shapes.items()}


def _chosen(heads: int, shared: int, width: int, is_causal: bool, *, device: str, dtype: torch.dtype) -> str:
    query = torch.empty(1, heads, _TOKENS, width, device=device, dtype=dtype)
    key = torch.empty(1, shared, _TOKENS, width, device=device, dtype=dtype)
    chosen = torch._fused_sdp_choice(query, key, key, is_causal=is_causal, enable_gqa=heads != shared)
    return SDPBackend(chosen).name
