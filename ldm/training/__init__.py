"""What a run is: from settings and photographs to a tuned model, stopped and resumed at any step.

settings        every setting of a run, and whether a run that resumes may change it
options         from the command line and TOML files to settings
latents         pictures, encoded once
batches         the rows of each step, a function of seed and index
class_pictures  the class prior, made by the base model
precision       fp32, fp16 and bf16
optimizer, ema  AdamW and its learning rate; the average of the weights
state           what changes while a run trains
content         whether a checkpoint holds such a state
checkpoint      that state on disk, whole or not there
continuity      whether a run that resumes is the run that it resumes
claim           the folder of a run, and that no other run is at work there
log             metrics.jsonl and the tracker
saver           when a run saves, and that there is space for it
run             what the parts of a training program share
validation      sheets of pictures, before and after
tracking        TensorBoard and Weights & Biases
"""

from ldm.training.batches import Batches, CropDraws, LatentDraws, Rows, make_rows
from ldm.training.class_pictures import ClassPictures
from ldm.training.latents import encode, encode_pictures
from ldm.training.options import parse
from ldm.training.precision import set_exactness
from ldm.training.run import Run
from ldm.training.settings import Settings
from ldm.training.state import TrainingState
from ldm.training.validation import make_comparison, make_sheet, sheet_path

__all__ = [
    "Batches",
    "ClassPictures",
    "CropDraws",
    "LatentDraws",
    "Rows",
    "Run",
    "Settings",
    "TrainingState",
    "encode",
    "encode_pictures",
    "make_comparison",
    "make_rows",
    "make_sheet",
    "parse",
    "set_exactness",
    "sheet_path",
]
