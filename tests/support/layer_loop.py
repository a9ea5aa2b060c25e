"""CLAA by hand in the layers of any tiny model, hybrid ones too: a loop around plain layers.

Own selection, caches' contents, masks and scores, for one prompt without padding; what a layer
computes of the tokens, entries and states that it is given is left to transformers, with eager
attention and a plain cache. It shares no code with claa_ops.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from support.hand_loop import Settings, best


class LayerLoop:
    """A model whose prompt is selected from; ``settings.layer`` is any layer of the model.

    ``settings.last_n`` and ``settings.first_full`` count the layers that have attention.
    """

    def __init__(self, model: PreTrainedModel, settings: Settings) -> None:
        assert model.config._attn_implementation == "eager"
        self.model, self.settings = model, settings
        self.cache = DynamicCache(config=model.config)
        self.seen = 0  # how many tokens
        self.kept: list[int] | None = None  # of the prompt, once it was selected from
        self.ranking: list[list[list[float]]] = []  # of each layer that attends, its head's scores
        self.positions: list[list[int]] = []  # of each layer, those of its entries
        self.weights: Tensor | None = None
        for index, layer in enumerate(model.model.layers):
            layer.forward = self._around(index, layer.forward)
            for module in layer.modules():
                module.register_forward_hook(self._note_weights)
            self.positions.append([])

    @torch.no_grad()
    def read(self, ids: list[int]) -> Tensor:
        """The logits ``[vocabulary]`` after the prompt, or after more tokens."""
        places = torch.arange(self.seen, self.seen + len(ids))[None]
        output = self.model(torch.tensor([ids]), position_ids=places, past_key_values=self.cache)
        self.seen += len(ids)
        return output.logits[0, -1]

    def answer(self, ids: list[int], steps: int) -> Tensor:
        """Logits ``[steps, vocabulary]`` of a greedy answer to these tokens, the last one fed."""
        logits = [self.read(ids)]
        for _ in range(steps - 1):
            logits.append(self.read([int(logits[-1].argmax())]))
        self.read([int(logits[-1].argmax())])
        return torch.stack(logits)

    def _note_weights(self, module: torch.nn.Module, args: tuple, output: object) -> None:
        found = output[1] if isinstance(output, tuple) and len(output) == 2 else None
        if isinstance(found, Tensor) and found.dim() == 4:
            self.weights = found[0]  # [H, n, entries]

    def _around(self, index: int, plain: Callable) -> Callable:
        def forward(hidden: Tensor, *args: object, **kwargs: object) -> object:
            prefilling = self.seen == 0
            new = list(range(self.seen, self.seen + hidden.shape[1]))
            if prefilling and self.kept is not None:
                new = self.kept
                rotary = kwargs.get("position_embeddings")
                if rotary is not None:
                    kwargs["position_embeddings"] = tuple(x[:, new] for x in rotary)
            if "mamba_attention_mask" in kwargs:
                kwargs["mamba_attention_mask"] = None
            self.weights = None
            kwargs["attention_mask"] = self._mask(index, new)
            output = plain(hidden, *args, **kwargs)
            if self.weights is not None:
                self.positions[index] += new
            if prefilling and self.weights is not None:
                self._rank_and_compress(index, new)
            if prefilling and index == self.settings.layer and len(new) > self.settings.kept:
                heads = [head for layer in self.ranking[-self.settings.last_n :] for head in layer]
                importance = [max(column) for column in zip(*heads, strict=True)]
                chosen = best(importance, self.settings.kept, self.settings.window)
                self.kept = [new[i] for i in chosen]
                if isinstance(output, tuple):
                    output = (output[0][:, chosen], *output[1:])
                else:
                    output = output[:, chosen]
            return output

        return forward

    def _mask(self, index: int, new: list[int]) -> Tensor | None:
        """Additive, ``[1, 1, n, entries]``."""
        kind = self.model.config.layer_types[index]
        if kind not in ("full_attention", "sliding_attention", "hybrid"):
            return None
        held = self.positions[index] + new
        window = self.model.config.sliding_window if kind == "sliding_attention" else len(held) ** 9
        if kind == "sliding_attention" and self.seen:  # all that the plain cache holds
            held = held[-(self.cache.layers[index].keys.shape[2] + len(new)) :]
        seen = [[0 <= place - key < window for key in held] for place in new]
        return torch.where(torch.tensor(seen), 0.0, -1e9)[None, None]

    def _rank_and_compress(self, index: int, new: list[int]) -> None:
        settings, layer = self.settings, self.cache.layers[index]
        groups = layer.keys.shape[1]
        context, half = len(new) - settings.window, settings.kernel // 2
        summed = self.weights[:, context:, :context].double().sum(1)  # [H, context]
        pooled = [
            [sum(row[max(0, j - half) : j + half + 1]) / settings.kernel for j in range(context)]
            for row in summed.tolist()
        ]
        per = len(pooled) // groups
        scores = [
            [sum(column) for column in zip(*pooled[per * g : per * (g + 1)], strict=True)]
            for g in range(groups)
        ]
        self.ranking.append(scores)
        sliding = self.model.config.layer_types[index] == "sliding_attention"
        compressible = len(self.ranking) > settings.first_full and not sliding
        if compressible and len(new) > settings.capacity:
            kept = [best(head, settings.capacity, settings.window) for head in scores]
            layer.keys, layer.values = (
                torch.stack([x[:, g, rows] for g, rows in enumerate(kept)], dim=1)
                for x in (layer.keys, layer.values)
            )
            self.positions[index] = [-1] * settings.capacity  # somewhere before
