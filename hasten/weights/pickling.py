"""Makes quantised weights pickle with their class.

torch pickles every subclass of `nn.Parameter` as a plain `nn.Parameter`. A weight of bitsandbytes would come back without
the class by which its layers, PEFT and `formats` recognise it: no fused op, no merge.
"""

import copyreg
from typing import Any

from torch import nn

from hasten.weights.formats import find_format


def register_pickling(model: nn.Module) -> None:
    """Registers with `copyreg` how the quantised weights inside `model` pickle; an overlay does so when it is pickled. It holds for
    the process, since torch's class has no other way. A class that defines its own `__reduce_ex__` keeps it."""
    for module in model.modules():
        found = find_format(module) if isinstance(module, nn.Linear) else None
        reduce: Any = None if found is None else found.reduce
        kind: Any = type(module._parameters.get("weight"))
        if reduce is not None and kind.__reduce_ex__ is nn.Parameter.__reduce_ex__:
            copyreg.pickle(kind, reduce)
