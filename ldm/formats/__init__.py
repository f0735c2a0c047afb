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
    lora_names     the names of a LoRA's tensors, in every program's scheme
    lora_file      the .safetensors file of a LoRA

Other parts of the package import from here: `read` and `write` for models, `read_lora` and `write_lora` for LoRAs,
`open_tensors` and `save_tensors` for other tensor files, `differences`, `not_finite` and `abbreviate` to tell what is
wrong with tensors, and the constants.
"""

from ldm.formats import modelspec, picture_text
from ldm.formats.card import illustrate
from ldm.formats.checks import abbreviate, differences, not_finite
from ldm.formats.embedding import kind_of, read_embedding, write_embedding
from ldm.formats.layouts import CHECKPOINT_MODEL, LAYOUTS, read, write
from ldm.formats.lora_file import (
    MAX_RANK,
    ZERO_SNR_KEY,
    Adapter,
    Pair,
    check_lora_name,
    kohya_metadata,
    read_lora,
    write_lora,
)
from ldm.formats.lora_names import LORA_TEXT, LORA_UNET, official_to_kohya
from ldm.formats.names import BUNDLED, LEARNED, TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX, unused_text
from ldm.formats.source import SAMPLING_KEY, TRAINING_KEY, Source, family
from ldm.formats.tensors import PICKLE_SUFFIXES, Tensors, file_hash, open_tensors, save_tensors

__all__ = [
    "BUNDLED",
    "CHECKPOINT_MODEL",
    "LAYOUTS",
    "LEARNED",
    "LORA_TEXT",
    "LORA_UNET",
    "MAX_RANK",
    "PICKLE_SUFFIXES",
    "SAMPLING_KEY",
    "TEXT_PREFIX",
    "TRAINING_KEY",
    "UNET_PREFIX",
    "VAE_PREFIX",
    "ZERO_SNR_KEY",
    "Adapter",
    "Pair",
    "Source",
    "Tensors",
    "abbreviate",
    "check_lora_name",
    "differences",
    "family",
    "file_hash",
    "illustrate",
    "kind_of",
    "kohya_metadata",
    "modelspec",
    "not_finite",
    "official_to_kohya",
    "open_tensors",
    "picture_text",
    "read",
    "read_embedding",
    "read_lora",
    "save_tensors",
    "unused_text",
    "write",
    "write_embedding",
    "write_lora",
]
