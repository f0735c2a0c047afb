"""What a run measures of itself while it trains, and which step it then advises to take.

grid            losses on a fixed grid of noise and timesteps
drift           language drift: what training does to the class's pictures
advice          which step to take
best            keeps the best model
validation      measures all of that, and makes a sheet, at every validation
"""

from ldm.validation.advice import Advice, advise
from ldm.validation.drift import weights_kept
from ldm.validation.validation import Validation, hold_out

__all__ = [
    "Advice",
    "Validation",
    "advise",
    "hold_out",
    "weights_kept",
]
