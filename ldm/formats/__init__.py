"""Files <-> tensors: reads and writes the files that Stable Diffusion models come in.

    names          tables between the naming schemes of official files, diffusers folders and OpenCLIP
    archive        the zip archive that torch.save writes, with every number checked
    unpickle       a pickle machine that runs nothing
    ckpt           a pickled .ckpt as tensors, by these two
    modelspec      the header entries by which other programs know a model file
    tensors        .safetensors files, pickles and shards by name; writes .safetensors
    checks         what is wrong with a model's tensors, in words
    embedding      the file of a learned token
    source         `Source`: what a model file or folder holds
    folder_config  the JSON files of a diffusers folder <-> `ModelConfig`
    single         the official single file
    card           the model card of a diffusers folder
    folder         the diffusers folder
    layouts        `read` and `write` for both
    picture_text   how a picture was made <-> the text in its PNG file

Other parts of the package import from here: `read` and `write` for models, `open_tensors` and `save_tensors` for other
tensor files, `differences`, `not_finite` and `abbreviate` to tell what is wrong with tensors, and the constants.
"""

from ldm.formats import modelspec, picture_text
from ldm.formats.card import illustrate
from ldm.formats.checks import abbreviate, differences, not_finite
from ldm.formats.embedding import kind_of, read_embedding, write_embedding
from ldm.formats.layouts import CHECKPOINT_MODEL, LAYOUTS, read, write
from ldm.formats.names import LEARNED, TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX, unused_text
from ldm.formats.source import SAMPLING_KEY, TRAINING_KEY, Source, family
from ldm.formats.tensors import PICKLE_SUFFIXES, Tensors, open_tensors, save_tensors

__all__ = [
    "CHECKPOINT_MODEL",
    "LAYOUTS",
    "LEARNED",
    "PICKLE_SUFFIXES",
    "SAMPLING_KEY",
    "TEXT_PREFIX",
    "TRAINING_KEY",
    "UNET_PREFIX",
    "VAE_PREFIX",
    "Source",
    "Tensors",
    "abbreviate",
    "differences",
    "family",
    "illustrate",
    "kind_of",
    "modelspec",
    "not_finite",
    "open_tensors",
    "picture_text",
    "read",
    "read_embedding",
    "save_tensors",
    "unused_text",
    "write",
    "write_embedding",
]
