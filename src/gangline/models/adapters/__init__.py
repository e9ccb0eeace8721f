"""One adapter per way of holding experts."""

from gangline.models.adapters.dbrx import DbrxAdapter
from gangline.models.adapters.decorated import DecoratedAdapter
from gangline.models.adapters.jetmoe import JetMoeAdapter
from gangline.models.adapters.llama4 import Llama4Adapter
from gangline.models.adapters.longcat import LongcatAdapter
from gangline.models.adapters.modules import NllbAdapter, SwitchAdapter
from gangline.models.adapters.stacked import StackedAdapter
from gangline.models.adapters.step3p7 import Step3p7Adapter

ADAPTERS: tuple[StackedAdapter, ...] = (
    DecoratedAdapter(),
    DbrxAdapter(),
    JetMoeAdapter(),
    Llama4Adapter(),
    LongcatAdapter(),
    NllbAdapter(),
    Step3p7Adapter(),
    SwitchAdapter(),
)

__all__ = ["ADAPTERS", "StackedAdapter"]
