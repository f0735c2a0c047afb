"""Photographs and what a folder says about them, on their way to the batches of each step.

captions    the prompts of single pictures, and words for {token} and {class} in them
variation   leaves captions out, and shuffles tags
focus       where the subject of a photograph is
beside      which files of a folder belong to which photograph
examples    what a folder says about each of its photographs
masks       where in a photograph the loss counts
subjects    the subjects that a run teaches
kohya       kohya's data-set folders as subjects
mixture     which subject and which size of picture each row has
buckets     sizes for photographs that are not square
sorting     sorts the pictures of all subjects by their sizes
latents     encodes the pictures once
inpainting  random masks for a model for painting in
rows        the rows of a run, a function of seed and index
batches     the rows of each step
"""

from ldm.data.batches import Batches
from ldm.data.beside import companions
from ldm.data.buckets import Size, cut_away
from ldm.data.captions import FILLERS, Words, fill, identifier, words, words_of
from ldm.data.examples import Example, captioned, read_examples
from ldm.data.inpainting import widen
from ldm.data.kohya import names_prompts, with_subjects_of_folders
from ldm.data.latents import check_photographs, encode_pictures
from ldm.data.rows import make_rows
from ldm.data.sorting import sizes_of_photographs, sort_class_pictures, sort_photographs
from ldm.data.subjects import Subject, read_subjects

__all__ = [
    "FILLERS",
    "Batches",
    "Example",
    "Size",
    "Subject",
    "Words",
    "captioned",
    "check_photographs",
    "companions",
    "cut_away",
    "encode_pictures",
    "fill",
    "identifier",
    "make_rows",
    "names_prompts",
    "read_examples",
    "read_subjects",
    "sizes_of_photographs",
    "sort_class_pictures",
    "sort_photographs",
    "widen",
    "with_subjects_of_folders",
    "words",
    "words_of",
]
