"""What a model must show before it is attached: seven forwards of a few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from claa_ops.methods.claa import CLAA
from claa_ops.prefill.cache import ClaaCache
from claa_ops.prefill.transformers_api import (
    PreTrainedModel,
    cache_argument,
    parameters,
    vocabulary_size,
)

_TOKENS, _PADDING, _KEPT = 16, 4, 8

# The tokens that are kept are those of the window, so that no rounding of scores can choose others.
_EVERYTHING, _HALF = (
    CLAA(keep=keep, layer=0, last_n=1, first_full=0, window=_KEPT, kernel_size=3)
    for keep in (1.0, _KEPT)
)


class SelfTest:
    """Two short prompts, one of them padded, and one token after each.

    Made before the model is attached: keeps the logits of the plain model.

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
            plain = self._forward(self.ids, self.mask, None)
        except Exception as error:
            name = type(model).__name__
            raise ValueError(f"attach: {name} cannot read two short prompts: {error}") from error
        # The last tokens of the prompts, and those after them.
        self.plain = plain[:, -2:].transpose(0, 1)

    def run(self) -> None:
        """Raise ValueError, saying what is wrong, unless the attached model passes."""
        found = self._prefill_and_step(self.ids, self.mask, _EVERYTHING)
        promise = "keeping all tokens must not change it"
        # Equal to the bit, unless the model itself is not deterministic.
        strict = max(1e-3, 4 * torch.finfo(found.dtype).eps)
        _compare(promise, "the prompt", found[0], self.plain[0], strict)
        # A token is decoded in another shape than as one of a prompt, and in another batch, so it
        # is rounded otherwise: in half precision enough to choose other experts.
        loose = 1e-3 if torch.finfo(found.dtype).bits >= 32 else 0.25
        _compare(promise, "the next token", found[1], self.plain[1], loose)

        ids, mask = self.ids[:1, _PADDING:], self.mask[:1, _PADDING:]
        padded = self._prefill_and_step(self.ids, self.mask, _HALF, shortens=True)[:, :1]
        alone = self._prefill_and_step(ids, mask, _HALF)
        promise = "a padded row must be as the row alone"
        _compare(promise, "the prompt", padded[0], alone[0], loose)
        _compare(promise, "the next token", padded[1], alone[1], loose)

    def _prefill_and_step(
        self, ids: Tensor, mask: Tensor, method: CLAA, shortens: bool = False
    ) -> Tensor:
        """Logits ``[2, B, V]`` of the last token of the prompts, and of the token after it."""
        cache = ClaaCache(self.model.config, method)
        prompt = self._forward(ids[:, :-1], mask[:, :-1], cache)
        if shortens and (prompt.shape[1] != _KEPT or cache.lengths[-1] > _KEPT):
            raise ValueError(
                f"keeping {_KEPT} of {_TOKENS} tokens must shorten its layers, "
                f"got {prompt.shape[1]} tokens and caches of {cache.lengths}"
            )
        return torch.stack([prompt[:, -1], self._forward(ids[:, -1:], mask, cache)[:, -1]])

    @torch.no_grad()
    def _forward(self, ids: Tensor, mask: Tensor, cache: ClaaCache | None) -> Tensor:
        """Logits ``[B, n, V]``."""
        model = self.model
        given = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in parameters(model):
            positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
            given["position_ids"] = positions[:, -ids.shape[1] :]
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            use_cache = cache is not None
            output = model(**given, use_cache=use_cache, **cache_argument(model, cache))
        finally:
            for module in training:
                module.training = True
        return output[0]


def _compare(promise: str, where: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    error, size = (found - expected).abs().max().item(), expected.abs().max().item()
    if not error <= tolerance * size:
        raise ValueError(
            f"{promise}, got logits of {where} that are off by {error:.1e} of {size:.1e}"
        )
