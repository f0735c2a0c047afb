"""The official single file: all networks in one .safetensors or .ckpt, as CompVis and Stability AI published them."""

import json
import re
from dataclasses import replace
from pathlib import Path

from ldm.config import SD1_INPAINT, ModelConfig
from ldm.errors import InputError
from ldm.formats import modelspec, names
from ldm.formats.checks import abbreviate
from ldm.formats.folder_config import DIFFUSERS_PREDICTIONS
from ldm.formats.source import CONFIG_KEY, PRESETS, TOKENIZER_KEY, Source, own_metadata, predicting
from ldm.formats.tensors import Tensors, open_tensors, save_tensors
from ldm.runtime import parse_json, replacing
from ldm.schedule import Schedule
from ldm.tokenizer import Tokenizer

# Tensors of official files beside the three networks: they are known, never computed with, and saved again. Loading is
# strict about all others.
CARRIED = re.compile(
    r"(sqrt_|log_)?(one_minus_|recipm?1?_)?alphas_cumprod(_prev)?|betas|posterior_\w+"
    r"|.*\.position_ids|first_stage_model\.loss\..*"
    r"|cond_stage_model\.((model|transformer)\.)?(text_projection(\.weight)?|logit_scale|attn_mask)"
)
MODELSPEC_PREDICTIONS = DIFFUSERS_PREDICTIONS | {"v": "v"}  # modelspec says epsilon or v; some write diffusers' word
FIRST_LAYER = names.UNET_PREFIX + "input_blocks.0.0.weight"
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"  # empty tensors: ComfyUI marks a model that predicts v, others its schedule


def read_single(path: Path, ema: bool = False, prediction: str | None = None) -> Source:
    """Reads an official single file. Raises InputError if it is damaged or no Stable Diffusion 1 or 2.

    ema: take the averaged UNet of a full training checkpoint. prediction: "eps" or "v", which decides between the
    two models that a file of SD2 can be; if None, the file decides, and "v" is assumed where it does not say.
    """
    tensors, metadata = open_tensors(path)
    _complete_text_names(tensors)
    config, tokenizer, prediction_from = _identify(path, tensors, metadata, prediction)
    tensors.pop(V_MARK, None), tensors.pop(ZERO_SNR_MARK, None)
    averaged = names.take_prefixed(tensors, names.EMA_PREFIX)
    unet = [key for key in tensors if key.startswith(names.UNET_PREFIX)]
    averages = {key: key.removeprefix("model.").replace(".", "") for key in unet}  # LitEma removes the dots
    has_ema = any(name in averaged for name in averages.values())
    taken = averages if ema else {}
    if absent := [key for key, name in taken.items() if name not in averaged]:
        raise InputError(f"{path} has no EMA weights for {abbreviate(absent, 1)}; load it without ema")
    tensors |= {key: averaged[name] for key, name in taken.items()}
    dropped = [names.EMA_PREFIX + name for name in averaged.keys() - set(taken.values())]

    extra = {key: tensors.pop(key) for key in list(tensors) if CARRIED.fullmatch(key)}
    if config.text.openclip:
        last = f"{names.OPENCLIP_PREFIX}transformer.resblocks.{config.text.layers}."  # stored, never run
        extra |= {key: tensors.pop(key) for key in list(tensors) if key.startswith(last)}
        text = names.from_openclip(names.take_prefixed(tensors, names.OPENCLIP_PREFIX), config.text)
        tensors |= {names.TEXT_PREFIX + key: tensor for key, tensor in text.items()}
    about = {"metadata": own_metadata(metadata), "has_ema": has_ema, "prediction_from": prediction_from}
    source = Source(config, tokenizer, tensors, extra, dropped, **about)
    tensors |= {own: tensors.pop(name) for name, own in source.learned_names().items() if name in tensors}
    return source


def _complete_text_names(tensors: Tensors) -> None:
    """Renames the tensors of a text encoder of SD1 whose names lack `text_model.`, as some programs write them."""
    if any(key.startswith(f"{names.TEXT_PREFIX}text_model.") for key in tensors):
        return
    for part in ("embeddings.", "encoder.", "final_layer_norm."):
        for key, tensor in names.take_prefixed(tensors, names.TEXT_PREFIX + part).items():
            tensors[f"{names.TEXT_PREFIX}text_model.{part}{key}"] = tensor


def _identify(
    path: Path, tensors: Tensors, metadata: dict[str, str], prediction: str | None
) -> tuple[ModelConfig, Tokenizer, str]:
    """Configuration, tokenizer, and what told the prediction: from our own metadata, or the text encoder's names."""
    if CONFIG_KEY in metadata:
        try:
            config = ModelConfig.from_dict(parse_json(metadata[CONFIG_KEY], CONFIG_KEY))
            return config, Tokenizer.from_metadata(metadata[TOKENIZER_KEY]), "the file's metadata"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: its metadata is damaged: {error}") from None
    stated, stated_by = _stated_prediction(tensors, metadata)
    first = tensors.get(FIRST_LAYER)
    paints_in = first is not None and first.ndim == 4 and first.shape[1] == SD1_INPAINT.unet.in_channels
    if names.TEXT_PREFIX + "text_model.embeddings.token_embedding.weight" in tensors:
        config, reason = predicting(PRESETS["sd1"], stated or "eps"), "SD 1.x always does"
    elif names.OPENCLIP_PREFIX + "token_embedding.weight" in tensors:
        guess = "eps" if paints_in else "v"  # Stability AI's only model for painting in predicts eps
        config = PRESETS[{"eps": "sd2", "v": "sd2_v"}[prediction or stated or guess]]
        reason = "assumed for SD 2.x" + ("" if paints_in else "; a 512-base model needs prediction eps")
    else:
        raise InputError(f"{path} does not look like Stable Diffusion 1 or 2: it has no text encoder that we know")
    if paints_in:
        config = config.for_painting_in()
    if ZERO_SNR_MARK in tensors and (prediction or config.schedule.prediction) == "v":
        schedule = replace(config.schedule, zero_terminal_snr=True, spacing="trailing")
        config = replace(config, schedule=schedule)
    tokenizer = Tokenizer.clip(config.text.context_length, config.text.pad_id)
    return config, tokenizer, stated_by or reason


def _stated_prediction(tensors: Tensors, metadata: dict[str, str]) -> tuple[str | None, str | None]:
    """What other programs' files say that the model predicts, and where they say it; None twice if they do not."""
    if V_MARK in tensors:
        return "v", f"the file's tensor {V_MARK}"
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):  # ComfyUI writes the second, which no spec has
        if (stated := MODELSPEC_PREDICTIONS.get(metadata.get(key))) is not None:
            return stated, "the file's metadata"
    return None, None


def write_single(path: Path, source: Source) -> list[str]:
    """Writes an official single file. Its header has the configuration, so that models of any width load again.

    Tensors that the original's classes expect and the source lacks are added: the schedule's tables are computed, and
    OpenCLIP's parts that never run are zeros. Those parts have the text encoder's type, also the source's own.
    Returns the names of the source's tensors that are not written.
    Raises InputError for a name that `read` would not take for a single file.
    """
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: the name of a single file to save should end in .safetensors")
    tables, filler = Schedule(source.config.schedule).official_buffers(), names.unused_text(source.config.text)
    carried = tables | source.extra
    if source.config.schedule.zero_terminal_snr:  # the source's own tables may be those from before
        carried |= tables
    dtype = next(tensor.dtype for name, tensor in source.tensors.items() if name.startswith(names.TEXT_PREFIX))
    for name, tensor in filler.items():
        tensor = source.extra.get(name, tensor)
        filler[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    header = {
        "format": "pt",
        CONFIG_KEY: json.dumps(source.config.to_dict()),
        TOKENIZER_KEY: source.tokenizer.to_metadata(),
    }
    header |= modelspec.describe(source.config, source.title()) | source.metadata
    with replacing(path) as temporary:
        save_tensors(temporary, carried | filler | source.official_tensors(), header)
    return sorted(source.dropped)
