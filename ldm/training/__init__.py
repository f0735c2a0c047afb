"""A training run: from settings and photographs to a tuned model. It stops and resumes at any step.

setting         one setting, and a group of them
settings_subjects  several subjects in one run
settings_data, settings_training, settings_loss, settings_validation, settings_output      the groups
settings        every setting of a run, and whether a run that resumes may change it
captions        the prompts of single pictures, and words for {token} and {class} in them
variation       leaves captions out, and shuffles tags
focus           where the subject of a photograph is
beside          which files of a folder belong to which photograph
examples        what a folder says about each of its photographs
masks           where in a photograph the loss counts
subjects        the subjects that a run teaches
kohya           kohya's data-set folders as subjects
options         reads settings from the command line and TOML files
settings_toml   writes them as TOML, from which the run can be repeated
mixture         which subject and which size of picture each row has
buckets         sizes for photographs that are not square
sorting         sorts the pictures of all subjects by their sizes
latents         encodes the pictures once
inpainting      random masks for a model for painting in
rows            the rows of a run, a function of seed and index
batches         the rows of each step
class_pictures  the class prior, made by the base model
precision       fp32, fp16 and bf16
tuning          which parameters train: a LoRA, or the whole networks; a token with them
token_tuning    the vectors of a learned token alone
optimizer, ema  AdamW and its learning rate; the average of the weights
piecewise       small memory: weights in bf16, updates inside the backward pass
state           everything that changes during training
content         whether a checkpoint holds such a state
checkpoint      saves that state to disk, whole or not at all
numbers         the losses of a step, on their way from the device
continuity      checks that a resumed run has the same settings, model and photographs
claim           chooses a run's folder and locks it
log             writes metrics.jsonl and sends metrics to the tracker
saver           writes checkpoints and keeps disk space for them
ledger, memory  predict how much memory the run needs
note            a sentence or two that a run says about itself before it begins
note_prompts, note_photographs      how the prompts are read; what the photographs are like
preflight       says what a run will do before it begins
pace            says how long it will take, from its first steps
run             the objects that the parts of a training program share
sheets          pictures of the validation prompts, before, after and in between
grid            losses on a fixed grid of noise and timesteps
drift           language drift: what training does to the class's pictures
best            keeps the best model
advice          which step to take
validation      measures all of that while the run trains
tracking        TensorBoard and Weights & Biases
"""

from ldm.training.advice import Advice, advise
from ldm.training.batches import Batches
from ldm.training.class_pictures import ClassPictures, plan_class_pictures, read_class_pictures
from ldm.training.examples import Example, read_examples
from ldm.training.inpainting import draw_mask, widen
from ldm.training.latents import check_photographs, encode, encode_pictures
from ldm.training.masks import load_mask
from ldm.training.memory import Memory, predict
from ldm.training.numbers import SubjectLosses
from ldm.training.options import parse
from ldm.training.precision import set_exactness
from ldm.training.preflight import tell_preflight
from ldm.training.rows import CropDraws, LatentDraws, Rows, make_rows
from ldm.training.run import Run
from ldm.training.settings import Settings
from ldm.training.sheets import make_comparison, make_sheet, sheet_path
from ldm.training.sorting import sort_class_pictures, sort_photographs
from ldm.training.state import TrainingState
from ldm.training.subjects import Subject, read_subjects
from ldm.training.token_tuning import TokenTuning
from ldm.training.tuning import LoRATuning, tuning_of
from ldm.training.validation import Validation, hold_out
from ldm.training.variation import vary

__all__ = [
    "Advice",
    "Batches",
    "ClassPictures",
    "CropDraws",
    "Example",
    "LatentDraws",
    "LoRATuning",
    "Memory",
    "Rows",
    "Run",
    "Settings",
    "Subject",
    "SubjectLosses",
    "TokenTuning",
    "TrainingState",
    "Validation",
    "advise",
    "check_photographs",
    "draw_mask",
    "encode",
    "encode_pictures",
    "hold_out",
    "load_mask",
    "make_comparison",
    "make_rows",
    "make_sheet",
    "parse",
    "plan_class_pictures",
    "predict",
    "read_class_pictures",
    "read_examples",
    "read_subjects",
    "set_exactness",
    "sheet_path",
    "sort_class_pictures",
    "sort_photographs",
    "tell_preflight",
    "tuning_of",
    "vary",
    "widen",
]
