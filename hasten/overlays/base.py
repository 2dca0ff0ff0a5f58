"""What all overlays share: facts on the class, the stock class they came from, a name that shows them."""

from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn


class Overlay(nn.Module):
    """Base of the overlays. Never instantiated: `patching` makes `type(stock.__name__, (overlay, stock), ...)`."""

    facts: ClassVar[Any] = None
    stock_class: ClassVar[type[nn.Module]]
    runs: ClassVar[str] = ""
    one_product: ClassVar[tuple[str, ...]] = ()
    """Children that read one input: on a GPU their weights are laid behind each other, so that one product reads them."""

    if TYPE_CHECKING:  # the stock class's attributes, which the overlay finds on the instance

        def __getattr__(self, name: str) -> Any: ...

    def _get_name(self) -> str:
        return f"hasten:{type(self).__name__}"
