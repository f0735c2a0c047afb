"""A run: it trains, saves, stops and resumes at any step.

options         reads settings from the command line and TOML files
precision       fp32, fp16 and bf16
numbers         the losses of a step, on their way from the device
optimizer, ema  AdamW and its learning rate; the average of the weights
piecewise       small memory: weights in bf16, updates inside the backward pass
tracking        TensorBoard and Weights & Biases
full_tuning     trains the networks themselves
token_tuning    trains the vectors of a learned token alone
tuning          trains a LoRA, also with a token; chooses one of the three by the settings
state           everything that changes during training
content         whether a checkpoint holds such a state
checkpoint      saves that state to disk, whole or not at all
continuity      checks that a resumed run has the same settings, model and photographs
claim           chooses a run's folder and locks it
log             writes metrics.jsonl and sends metrics to the tracker
saver           writes checkpoints and keeps disk space for them
pace            says how long training will take, from its first steps
run             the objects that the parts of a training program share
class_pictures  the class prior, made by the base model
sheets          pictures of the validation prompts, before, after and in between
"""

from ldm.training import checkpoint, sheets
from ldm.training.checkpoint import free_space
from ldm.training.class_pictures import ClassPictures, distinct_class_pictures, plan_class_pictures, read_class_pictures
from ldm.training.continuity import IDENTITY_PARTS
from ldm.training.full_tuning import FullTuning
from ldm.training.numbers import SubjectLosses
from ldm.training.options import parse
from ldm.training.precision import Precision, set_exactness
from ldm.training.run import Run
from ldm.training.sheets import make_comparison, make_sheet
from ldm.training.state import TrainingState
from ldm.training.token_tuning import TokenTuning
from ldm.training.tuning import LoRATuning, tuning_of

__all__ = [
    "IDENTITY_PARTS",
    "ClassPictures",
    "FullTuning",
    "LoRATuning",
    "Precision",
    "Run",
    "SubjectLosses",
    "TokenTuning",
    "TrainingState",
    "checkpoint",
    "distinct_class_pictures",
    "free_space",
    "make_comparison",
    "make_sheet",
    "parse",
    "plan_class_pictures",
    "read_class_pictures",
    "set_exactness",
    "sheets",
    "tuning_of",
]
