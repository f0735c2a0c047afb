"""What a run says before it begins.

note            a sentence or two that a run says about itself
prompts         how the prompts are read
photographs     what the photographs are like
ledger, memory  predict how much memory the run needs
preflight       says all of that, and what the run will do
"""

from ldm.preflight.memory import predict
from ldm.preflight.note import counted
from ldm.preflight.preflight import tell

__all__ = [
    "counted",
    "predict",
    "tell",
]
