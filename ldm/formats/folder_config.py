"""The JSON files of a diffusers folder <-> `ModelConfig`.

Only what Stable Diffusion 1 and 2 are made of is accepted. A setting that asks for anything else is refused by name.
"""

from pathlib import Path
from typing import Any

from ldm.config import ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from ldm.errors import InputError
from ldm.runtime import exists, read_json
from ldm.tokenizer import Tokenizer

DIFFUSERS_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}

# What our networks are, in diffusers' words. A folder that says otherwise holds another architecture.
UNET_FACTS = {
    "act_fn": "silu",
    "center_input_sample": False,
    "addition_embed_type": None,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "transformer_layers_per_block": 1,
}
VAE_FACTS = {
    "act_fn": "silu",
    "in_channels": 3,
    "latents_mean": None,
    "latents_std": None,
    "out_channels": 3,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
TEXT_FACTS = {"layer_norm_eps": 1e-5}
SCHEDULER_FACTS = {"beta_schedule": "scaled_linear", "trained_betas": None}


def read_config(folder: Path) -> tuple[ModelConfig, Tokenizer]:
    """The model that the folder's JSON files describe, and its tokenizer.

    Raises InputError if a file is missing or damaged, or the model is no Stable Diffusion 1 or 2.
    """
    if not exists(folder / "model_index.json"):
        raise InputError(f"{folder} is not a diffusers folder: it has no model_index.json")
    _load(folder / "model_index.json")
    unet, vae = _load(folder / "unet" / "config.json"), _load(folder / "vae" / "config.json")
    text = _load(folder / "text_encoder" / "config.json")
    scheduler = _load(folder / "scheduler" / "scheduler_config.json")
    _check_facts(folder / "unet", unet, UNET_FACTS)
    _check_facts(folder / "vae", vae, VAE_FACTS)
    _check_facts(folder / "text_encoder", text, TEXT_FACTS)
    _check_facts(folder / "scheduler", scheduler, SCHEDULER_FACTS)

    tokenizer = Tokenizer.from_folder(folder / "tokenizer", context_length=text["max_position_embeddings"])
    config = ModelConfig(
        unet=_unet_config(folder / "unet", unet),
        vae=VAEConfig(
            channels=tuple(vae["block_out_channels"]),
            blocks=vae["layers_per_block"],
            latent_channels=vae["latent_channels"],
            norm_groups=vae.get("norm_num_groups", 32),
            scale_factor=vae.get("scaling_factor", 0.18215),  # files before 2023 do not say it
        ),
        text=TextConfig(
            vocab_size=text["vocab_size"] - sum(tokenizer.added.values()),
            context_length=text["max_position_embeddings"],
            width=text["hidden_size"],
            mlp_width=text["intermediate_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            activation=text["hidden_act"],
            pad_id=tokenizer.pad_id,
        ),
        schedule=_schedule_config(folder / "scheduler", scheduler),
        sample_size=unet["sample_size"],
    )
    return config, tokenizer


def _unet_config(folder: Path, unet: dict[str, Any]) -> UNetConfig:
    channels = tuple(unet["block_out_channels"])
    heads = unet["attention_head_dim"]  # the number of heads: the name is an old mistake of diffusers
    per_level = [heads] * len(channels) if isinstance(heads, int) else list(heads)
    if len(set(per_level)) == 1:
        head_choice: dict[str, Any] = {"heads": per_level[0], "head_dim": None}
    elif len({c / h for c, h in zip(channels, per_level, strict=True)}) == 1:
        head_choice = {"heads": None, "head_dim": channels[0] // per_level[0]}
    else:
        raise InputError(f"{folder}: attention_head_dim {heads} fits neither SD1 nor SD2")
    return UNetConfig(
        in_channels=unet["in_channels"],
        out_channels=unet["out_channels"],
        channels=channels,
        attention=tuple(kind == "CrossAttnDownBlock2D" for kind in unet["down_block_types"]),
        blocks=unet["layers_per_block"],
        **head_choice,
        linear_projection=unet.get("use_linear_projection", False),
        context_dim=unet["cross_attention_dim"],
        norm_groups=unet["norm_num_groups"],
    )


def _schedule_config(folder: Path, scheduler: dict[str, Any]) -> ScheduleConfig:
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in DIFFUSERS_PREDICTIONS:
        raise InputError(f"{folder}: prediction_type {prediction!r} is neither epsilon nor v_prediction")
    return ScheduleConfig(
        timesteps=scheduler["num_train_timesteps"],
        beta_start=scheduler["beta_start"],
        beta_end=scheduler["beta_end"],
        prediction=DIFFUSERS_PREDICTIONS[prediction],
        zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr")),
        # "linspace", the default of some schedulers of diffusers, says nothing about how the model was trained
        spacing="trailing" if scheduler.get("timestep_spacing") == "trailing" else "leading",
    )


def config_files(config: ModelConfig, eos_id: int, bos_id: int) -> dict[str, dict[str, Any]]:
    """The JSON files from which diffusers and transformers build the same model, by their paths in the folder."""
    unet, vae, text, schedule = config.unet, config.vae, config.text, config.schedule
    cross = unet.attention
    heads = unet.heads if unet.heads is not None else [unet.heads_at(c) for c in unet.channels]
    nothing = [None, None]
    return {
        "model_index.json": {
            "_class_name": "StableDiffusionInpaintPipeline" if unet.paints_in else "StableDiffusionPipeline",
            "_diffusers_version": "0.30.0",
            "feature_extractor": nothing,
            "image_encoder": nothing,
            "requires_safety_checker": False,
            "safety_checker": nothing,
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "attention_head_dim": heads,
            "block_out_channels": list(unet.channels),
            "cross_attention_dim": unet.context_dim,
            "down_block_types": ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in cross],
            "in_channels": unet.in_channels,
            "layers_per_block": unet.blocks,
            "norm_num_groups": unet.norm_groups,
            "out_channels": unet.out_channels,
            "sample_size": config.sample_size,
            "up_block_types": ["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(cross)],
            "upcast_attention": unet.upcast_attention,
            "use_linear_projection": unet.linear_projection,
        }
        | {name: value for name, value in UNET_FACTS.items() if value is not None},
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            "block_out_channels": list(vae.channels),
            "down_block_types": ["DownEncoderBlock2D"] * len(vae.channels),
            "latent_channels": vae.latent_channels,
            "layers_per_block": vae.blocks,
            "norm_num_groups": vae.norm_groups,
            "sample_size": config.resolution,
            "scaling_factor": vae.scale_factor,
            "up_block_types": ["UpDecoderBlock2D"] * len(vae.channels),
        }
        | VAE_FACTS,
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "attention_dropout": 0.0,
            "dtype": "float32",  # transformers would load the stored type; diffusers loads the other parts as fp32
            "bos_token_id": bos_id,
            "eos_token_id": eos_id,
            "hidden_act": text.activation,
            "hidden_size": text.width,
            "intermediate_size": text.mlp_width,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": text.context_length,
            "num_attention_heads": text.heads,
            "num_hidden_layers": text.layers,
            "pad_token_id": text.pad_id,
            "projection_dim": text.width,
            "vocab_size": text.vocab_size,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            "beta_end": schedule.beta_end,
            "beta_start": schedule.beta_start,
            "clip_sample": False,
            "num_train_timesteps": schedule.timesteps,
            "prediction_type": {ours: theirs for theirs, ours in DIFFUSERS_PREDICTIONS.items()}[schedule.prediction],
            "rescale_betas_zero_snr": schedule.zero_terminal_snr,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "timestep_spacing": schedule.spacing,
        }
        | SCHEDULER_FACTS,
    }


def _load(path: Path) -> dict[str, Any]:
    if not exists(path):
        raise InputError(f"{path} is missing; a diffusers folder has it")
    return _Settings(read_json(path), path)


class _Settings(dict):
    """A JSON object that knows its file. A setting that is missing raises an InputError that names the file."""

    def __init__(self, tree: dict[str, Any], path: Path):
        if not isinstance(tree, dict):
            raise InputError(f"{path} does not hold a JSON object")
        super().__init__(tree)
        self.path = path

    def __missing__(self, name: str):
        raise InputError(f"{self.path} does not say {name}")


def _check_facts(folder: Path, said: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raises InputError if a setting of the JSON file contradicts a fact. A setting that is missing does not."""
    for name, value in facts.items():
        if name in said and said[name] != value:
            raise InputError(f"{folder}: {name} is {said[name]!r}, and only {value!r} is Stable Diffusion 1 or 2")
