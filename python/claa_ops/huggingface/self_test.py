"""What a model must show before it is attached: eight forwards of a few tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from claa_ops.huggingface.cache import ClaaCache
from claa_ops.huggingface.transformers_api import (
    PreTrainedModel,
    cache_argument,
    cache_layers,
    cache_of,
    parameters,
    vocabulary_size,
)
from claa_ops.methods.claa import CLAA

_TOKENS, _PADDING, _KEPT = 16, 4, 8

# The tokens that are kept are those of the window, so that no rounding of scores can choose others.
# The selection is after the first layer that attends.
_EVERYTHING, _HALF = (
    CLAA(keep=keep, last_n=1, first_full=0, window=_KEPT, kernel_size=3) for keep in (1.0, _KEPT)
)


class SelfTest:
    """Two short prompts, one of them padded, and one token after each.

    Make it before the model is attached: it keeps the logits of the plain model.

    Raises:
        ValueError: the plain model cannot read the prompts.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        ids = torch.arange(2 * (_TOKENS + 1), device=model.device).view(2, -1) + 1
        self.ids = ids % vocabulary_size(model.config)
        self.mask = torch.ones_like(ids)
        self.mask[0, :_PADDING] = 0
        try:
            self.plain = self._prefill_and_step(self.ids, self.mask, None)
        except Exception as error:
            name = type(model).__name__
            raise ValueError(f"attach: {name} cannot read two short prompts: {error}") from error

    def run(self) -> None:
        """Raise ValueError, saying what is wrong, unless the attached model passes."""
        kinds = cache_layers(self.model.config)
        first = next(layer for layer, kind in enumerate(kinds) if kind.attends)
        everything, half = (replace(method, layer=first) for method in (_EVERYTHING, _HALF))
        kept = self._prefill_and_step(self.ids, self.mask, everything)
        # Equal to the bit, unless the model itself is not deterministic.
        strict = max(1e-3, 4 * torch.finfo(kept.dtype).eps)
        _compare("keeping all tokens must not change it", kept, self.plain, strict)

        ids, mask = self.ids[:1, _PADDING:], self.mask[:1, _PADDING:]
        padded = self._prefill_and_step(self.ids, self.mask, half, shortens=True)[:, :1]
        alone = self._prefill_and_step(ids, mask, half)
        # Other shapes round differently: in half precision enough to choose other experts.
        loose = 1e-3 if torch.finfo(alone.dtype).bits >= 32 else 0.25
        _compare("a padded row must be as the row alone", padded, alone, loose)

    def _prefill_and_step(
        self, ids: Tensor, mask: Tensor, method: CLAA | None, shortens: bool = False
    ) -> Tensor:
        """Logits ``[2, B, V]`` of the last token of the prompts, and of the token after it."""
        cache = None if method is None else ClaaCache(self.model.config, method)
        prompt, filled = self._forward(ids[:, :-1], mask[:, :-1], cache)
        if shortens and (prompt.shape[1] != _KEPT or filled.lengths[-1] > _KEPT):
            raise ValueError(
                f"keeping {_KEPT} of {_TOKENS} tokens must shorten its layers, "
                f"got {prompt.shape[1]} tokens and caches of {filled.lengths}"
            )
        step, _ = self._forward(ids[:, -1:], mask, filled)
        return torch.stack([prompt[:, -1], step[:, -1]])

    @torch.no_grad()
    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits ``[B, n, V]``, and the cache: the model's own if none is given."""
        model = self.model
        given = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in parameters(model):
            positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
            given["position_ids"] = positions[:, -ids.shape[1] :]
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            output = model(
                **given, use_cache=True, return_dict=True, **cache_argument(model, cache)
            )
        finally:
            for module in training:
                module.training = True
        return output[0], cache_of(output)


def _compare(promise: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise ValueError unless logits ``[2, B, V]`` agree, relative to the largest of each step."""
    for where, one, other in zip(("the prompt", "the next token"), found, expected, strict=True):
        error, size = (one - other).abs().max().item(), other.abs().max().item()
        if not error <= tolerance * size:
            raise ValueError(
                f"{promise}, got logits of {where} that are off by {error:.1e} of {size:.1e}"
            )
