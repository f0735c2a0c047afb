"""The names that programs give to the tensors of a LoRA, and one scheme for all of them: kohya's.

A tensor's name is a module's name and a part. kohya's module name is the one in diffusers with `_` for `.`, after
`lora_unet_` or `lora_te_`; its parts are `lora_down.weight`, `lora_up.weight` and `alpha`:

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight
    lora_te_text_model_encoder_layers_0_mlp_fc1.alpha

Every program of the field reads these names, and no other scheme is read by all. Files are written in it; the others
are read. Which module an underscore splits can't be told from the name alone, hence the tables of all modules.
"""

import re
from functools import lru_cache

from ldm.config import MAX_COUNTS, MAX_LEVELS, UNetConfig
from ldm.formats.names import TEXT_PREFIX, UNET_PREFIX, Table, invert, rename, unet_table

LORA_UNET, LORA_TEXT = "lora_unet_", "lora_te_"  # how kohya's module names begin

# A UNet that has every module that one within the limits can have: diffusers' names do not depend on anything else.
LARGEST = UNetConfig(channels=(1,) * MAX_LEVELS, attention=(True,) * MAX_LEVELS, blocks=MAX_COUNTS["blocks"])

ATTENTION = tuple(f"attn{i}.{part}" for i in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0"))
TRANSFORMER = ("proj_in", "proj_out") + tuple(
    f"transformer_blocks.0.{part}" for part in (*ATTENTION, "ff.net.0.proj", "ff.net.2")
)
TEXT_ATTENTION = tuple(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj"))
TEXT_BLOCK = (*TEXT_ATTENTION, "mlp.fc1", "mlp.fc2")

# What may follow a module's name, in kohya's, peft's, and diffusers' present and former files.
PART = re.compile(
    r"(?:\.lora_(?:(?P<kohya>down|up)|(?P<peft>[AB])(?:\.default)?)"
    r"|(?:\.lora|\.lora_linear_layer|_lora)\.(?P<diffusers>down|up))\.weight|(?P<alpha>\.alpha)"
)


def split(key: str) -> tuple[str, str] | None:
    """A tensor's name -> its module's name, as it is written, and "down", "up" or "alpha". None for another name."""
    start = max(key.rfind(mark) for mark in (".lora", "_lora.", ".alpha"))
    found = PART.fullmatch(key, max(start, 0))
    if not found:
        return None
    part = found["kohya"] or found["diffusers"] or {"A": "down", "B": "up"}.get(found["peft"]) or "alpha"
    return key[:start], part


def kohya_name(written: str, config: UNetConfig) -> str | None:
    """kohya's name of a module that a file names in any of the schemes; None if no Stable Diffusion has it.

    config: of the UNet, which decides what the numbers in official names mean.
    """
    name = written.removeprefix("base_model.model.").replace(".processor.", ".")  # peft's, and diffusers' up to 0.21
    name = re.sub(r"(\.attn\d\.to_out)$", r"\1.0", name)
    name = re.sub(r"self_attn\.to_(q|k|v|out)$", r"self_attn.\1_proj", name)
    return _schemes(config).get(name)


def official_to_kohya(name: str, config: UNetConfig) -> str | None:
    """kohya's name of a module of our networks, given under its official name; None for a module that no LoRA changes.

    config: of the UNet.
    """
    return _schemes(config).get(name)


def diffusers_name(module: str) -> str:
    """kohya's module name -> diffusers', with `unet.` or `text_encoder.text_model.` before it."""
    return _diffusers_names()[module]


@lru_cache
def _diffusers_names() -> Table:
    """kohya's name of every module that a Stable Diffusion can have -> diffusers'."""
    names = []
    for module in unet_table(LARGEST).values():
        if ".attentions." in module:
            names += [f"unet.{module}.{part}" for part in TRANSFORMER]
        elif "norm" not in module:
            names.append(f"unet.{module}")
    blocks = [f"text_encoder.text_model.encoder.layers.{i}" for i in range(MAX_COUNTS["layers"])]
    names += [f"{block}.{part}" for block in blocks for part in TEXT_BLOCK]
    begin = {"unet": LORA_UNET, "text_encoder": LORA_TEXT}
    return {
        begin[head] + rest.replace(".", "_"): f"{head}.{rest}" for head, _, rest in (n.partition(".") for n in names)
    }


@lru_cache
def _schemes(config: UNetConfig) -> Table:
    """Every name of every module, in all schemes -> kohya's."""
    table, official = {}, invert(unet_table(config))
    for kohya, name in _diffusers_names().items():
        network, _, inner = name.partition(".")
        written = [kohya, name, inner]
        if network == "unet":
            if ours := rename(inner, official):
                written += [UNET_PREFIX + ours, "diffusion_model." + ours, LORA_UNET + ours.replace(".", "_")]
        else:
            short = inner.removeprefix("text_model.")  # transformers 5 has dropped this level
            written += [short, f"text_encoder.{short}", TEXT_PREFIX + inner, kohya.replace(LORA_TEXT, "lora_te1_", 1)]
        table |= dict.fromkeys(written, kohya)
    return table
