"""Where blocks are inserted by `method: block-expansion`. Part of the run's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from moect.moe_config import check_blocks, chosen_blocks, option


@dataclass
class ExpansionConfig:
    """Blocks inserted into the base (`method: block-expansion`).

    Raises:
        ValueError: `layers` names no blocks.
    """

    __pydantic_config__ = {"extra": "forbid"}

    layers: str | list[int] = option(
        "every-4", "blocks that are followed by a copy: `all`, `every-N` (blocks N-1, 2N-1, …), or a list of indices"
    )

    def __post_init__(self):
        check_blocks(self.layers, "expansion.layers")

    def layer_indices(self, num_layers: int) -> list[int]:
        """The chosen blocks, ascending.

        Raises:
            ValueError: as `chosen_blocks`.
        """
        return chosen_blocks(self.layers, num_layers, "expansion.layers")
