"""Methods as a user may write them."""

from dataclasses import dataclass

from claa_ops.methods import Pruning
from claa_ops.selection.padding import mask_padding


@dataclass(frozen=True)
class Norms(Pruning):
    """Ranks by the norms of the hidden states in all layers so far."""

    reads_hidden = True

    def informs(self, state, layer):
        return layer <= max(self.stages(state.num_layers))

    def rank(self, layer, before):
        now = layer.hidden[:, : layer.context].float().norm(dim=-1)
        return now if before is None else before + now


@dataclass(frozen=True)
class Mass(Pruning):
    """As many tokens of each prompt as carry a share of its ranking's mass."""

    share: float = 0.3
    differs_by_row = True

    def select(self, state, layer):
        if layer not in self.stages(state.num_layers):
            return None
        ranking = mask_padding(state.importance, state.start, 0.0).double()
        mass = ranking.sort(dim=1, descending=True).values.cumsum(dim=1)
        needed = 1 + (mass < self.share * mass[:, -1:]).sum(dim=1)
        return self.keep_best(state, state.importance, needed + self.window, window=self.window)
