"""Elementwise chains that a long prompt spends its memory bandwidth on: one kernel each on CUDA, plain torch elsewhere.

At 32K tokens of an 8B model these chains take a tenth of a prefill when every operation reads and writes its tensor on its
own. torch.compile writes the fused kernel; short inputs stay plain, where launch costs decide and graphs remove them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import structlog
import torch
from torch import Tensor

log = structlog.get_logger(__name__)
MIN_TOKENS = 1024
Chain = Callable[..., Tensor]


def fused(chain: Chain) -> Chain:
    """`chain`, compiled where its first argument is a CUDA tensor of at least MIN_TOKENS rows.

    Numerics: a fused chain keeps float32 between its operations and rounds to the model's dtype once.
    """
    failed = False

    @functools.wraps(chain)
    def call(x: Tensor, *rest: object) -> Tensor:
        nonlocal failed
        if failed or not x.is_cuda or x.shape[0] < MIN_TOKENS:
            return chain(x, *rest)
        try:
            return _compiled(chain)(x, *rest)
        except torch._dynamo.exc.TorchDynamoException as error:  # no C compiler or no triton: slower, not wrong
            failed = True
            log.warning("a chain runs unfused: it does not compile here", chain=chain.__name__, error=type(error).__name__)
            return chain(x, *rest)

    return call


@functools.cache
def _compiled(chain: Chain) -> Chain:
    # Not dynamic=True: the number of tokens becomes symbolic by itself at its second value, while head and MLP sizes stay
    # constants. With every size symbolic these kernels ran three to seven times slower.
    return torch.compile(chain, fullgraph=True)
