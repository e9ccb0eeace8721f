"""step3p7: the fused layout without the decorator, and a clamp that differs from layer to layer."""

from torch import nn

from gangline.models.adapters.stacked import StackedAdapter
from gangline.models.view import LayoutFlags


class Step3p7Adapter(StackedAdapter):
    """Same call and layout as decorated experts; ``_apply_gate`` carries the layer's own clamp."""

    name = "step3p7"

    def claims(self, module: nn.Module) -> bool:
        """Whether this is step3p7's experts module."""
        return type(module).__name__ == "Step3p7Experts"

    def flags(self, module: nn.Module) -> LayoutFlags:
        """Its gate function is its own."""
        return {"default_gate": False}
