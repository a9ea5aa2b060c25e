"""How vLLM deals layers to cache groups, what it pads, and how hidden states fit its pages.

Arithmetic alone, without vLLM: the worker, the scheduler and ``claa-ops serve`` count alike.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Groups:
    """The cache groups of a model whose first ``front`` layers see the whole prompt.

    vLLM's blocks are all of one size: a page of each layer of a group, and each group has as many
    layers. So the front and the back are each split into groups of ``size`` layers, and what is
    left over is padding: pages that nobody writes.

    Args:
        front: layers that see the whole prompt.
        back: layers behind the selection.
        compressed: how many of the front's caches are compressed when a prompt is over.

    Raises:
        ValueError: one of the two has no layer.

    Example:
        >>> Groups(front=10, back=20).size
        10
        >>> groups = Groups(front=9, back=21)
        >>> groups.size, groups.padding
        (9, 6)
    """

    front: int
    back: int
    compressed: int = 0

    def __post_init__(self) -> None:
        if self.front < 1 or self.back < 1:
            raise ValueError(
                "Groups: there must be a layer before and one after the selection, got "
                f"{self.front} before and {self.back} after"
            )

    @property
    def size(self) -> int:
        """Layers in a group: of the smallest kind, or of the largest if that is not much larger."""
        kinds = [each for each in (self._whole, self.compressed, self.back) if each]
        least, most = min(kinds), max(kinds)
        return most if most < 1.5 * least else least

    @property
    def front_groups(self) -> int:
        """How many groups, and so block tables, the front has."""
        return -(-self._whole // self.size) + self.compressed_groups

    @property
    def compressed_groups(self) -> int:
        """How many of these hold compressed caches."""
        return -(-self.compressed // self.size)

    @property
    def back_groups(self) -> int:
        """How many groups the back has."""
        return -(-self.back // self.size)

    @property
    def padding(self) -> int:
        """Pages in one block of each group that no layer writes."""
        return (self.front_groups + self.back_groups) * self.size - self.front - self.back

    @property
    def _whole(self) -> int:
        return self.front - self.compressed

    def pages(self, keep: float, keep_kv: float = 1.0) -> float:
        """Pages held for a block of tokens of a prompt that is over.

        Args:
            keep: the share of them that goes deeper.
            keep_kv: and that compressed caches keep.
        """
        whole = self.front_groups - self.compressed_groups
        return self.size * (whole + self.compressed_groups * keep_kv + self.back_groups * keep)

    def waste(self, keep: float, keep_kv: float = 1.0) -> float:
        """The share of the held pages that is padding."""
        needed = self._whole + self.compressed * keep_kv + self.back * keep
        return 1 - needed / self.pages(keep, keep_kv)

    def gain(self, keep: float, keep_kv: float = 1.0) -> float:
        """How many times the prompt tokens of plain vLLM fit the same memory."""
        return (self.front + self.back) / self.pages(keep, keep_kv)


def layers_near(
    layer: int,
    *,
    num_layers: int,
    keep: float,
    reach: int = 3,
    keep_kv: float = 1.0,
    first_full: int = 0,
) -> list[tuple[int, Groups]]:
    """The selection layers within ``reach`` of a wanted one, by how little their padding wastes.

    Args:
        layer: the wanted selection layer, from 0; the layers up to it see the whole prompt.
        num_layers: layers of the model.
        keep: the share of a prompt's tokens that go deeper.
        reach: how far to look.
        keep_kv: the share that the caches of the layers up to it keep, but for the first
            ``first_full`` of them.
        first_full: see ``keep_kv``.

    Returns:
        Pairs of a layer and its groups: the least waste first, of equal waste the nearest, of
        equally near the lower.

    Raises:
        ValueError: the wanted layer is not one after which tokens can be dropped.

    Example:
        >>> [(near, groups.padding) for near, groups in layers_near(8, num_layers=30, keep=0.1)][:2]
        [(9, 0), (5, 0)]
    """
    if not 0 <= layer < num_layers - 1:
        raise ValueError(f"layers_near: layer must be in [0, {num_layers - 2}], got {layer}")
    first, last = max(0, layer - reach), min(num_layers - 2, layer + reach)
    near = []
    for at in range(first, last + 1):
        compressed = max(0, at + 1 - first_full) if keep_kv < 1 else 0
        near.append((at, Groups(at + 1, num_layers - at - 1, compressed)))
    return sorted(
        near, key=lambda pair: (pair[1].waste(keep, keep_kv), abs(pair[0] - layer), pair[0])
    )


@dataclass(frozen=True)
class HiddenPages:
    """How hidden states lie in pages that were made for keys and values.

    A block holds ``tokens`` of them. Each of the group's layers holds ``columns`` of the width in
    its page: layer i those from ``i * columns`` on.
    """

    tokens: int
    columns: int

    @classmethod
    def fit(cls, *, width: int, layers: int, block_size: int, entry: int) -> HiddenPages:
        """As many tokens in a block as fit, in a number that divides or is divided by its size.

        Args:
            width: elements of a hidden state.
            layers: layers of a group.
            block_size: tokens whose keys and values are in a page.
            entry: elements of a token's keys and values in one layer.

        Raises:
            ValueError: a hidden state is larger than a block.

        Example:
            >>> HiddenPages.fit(width=4096, layers=8, block_size=16, entry=2048)
            HiddenPages(tokens=64, columns=512)
            >>> HiddenPages.fit(width=4096, layers=1, block_size=16, entry=2048)
            HiddenPages(tokens=8, columns=4096)
        """
        needed = -(-width // layers)
        tokens, columns = block_size, entry
        # Powers of two, so that the groups' block sizes have a small common multiple: prefix hits
        # are as long as a multiple of it.
        while columns % 4 == 0 and columns // 2 >= needed:
            tokens, columns = tokens * 2, columns // 2
        while columns < needed:
            if tokens % 2:
                raise ValueError(
                    f"HiddenPages: a block must hold the {width} elements of a hidden state, got "
                    f"{block_size} x {entry} elements in each of {layers} layers"
                )
            tokens, columns = tokens // 2, columns * 2
        return cls(tokens, columns)
