"""What depends on the machine: sizes of blocks, free memory, compiled graphs, cheap products."""

from pinncurv.machine.compilation import (
    Graphs as Graphs,
    NotCompiled as NotCompiled,
    form_of as form_of,
    is_tracing as is_tracing,
    seconds_spent as seconds_spent,
)
from pinncurv.machine.memory import (
    NotEnoughMemoryError as NotEnoughMemoryError,
    check_memory as check_memory,
    free_memory as free_memory,
)
from pinncurv.machine.sizes import Sizes as Sizes, sizes_of as sizes_of
from pinncurv.machine.symmetric_product import (
    add_lower_product_ as add_lower_product_,
    mirror_ as mirror_,
    symmetric_product as symmetric_product,
)
