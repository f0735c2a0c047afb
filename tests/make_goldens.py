"""Writes what diffusers and transformers compute with the embedded model, for tests that run without them.

python tests/make_goldens.py          # needs the parity extra; writes goldens/tiny.json and goldens/tiny.png
"""

import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

BASE = Path(__file__).resolve().parent.parent / "weights" / "tiny" / "base"
NUMBERS, PICTURE = (Path(__file__).parent / "goldens" / name for name in ("tiny.json", "tiny.png"))

PROMPTS = ["a photo of a red cat on the beach", ""]
STEPS = [1, 801]  # timesteps for the UNet
SAMPLING = {"steps": 10, "guidance": 4.0, "seed": 3}


def wave(*shape: int) -> Tensor:
    """An input that does not depend on any library's version: sin(0), sin(0.7), sin(1.4), ..."""
    count = torch.Size(shape).numel()
    return torch.sin(0.7 * torch.arange(count, dtype=torch.float64)).float().view(shape)


@torch.no_grad()
def compute(base: Path) -> tuple[dict[str, Tensor], Image.Image]:
    """Outputs of the three networks for `wave` and PROMPTS, and a complete DDIM picture of the first prompt."""
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    ids = pipe.tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    context = pipe.text_encoder(ids)[0]
    size = pipe.unet.config.sample_size
    posterior = pipe.vae.encode(wave(1, 3, 4 * size, 4 * size)).latent_dist
    outputs = {
        "text encoder": context,
        "unet": pipe.unet(wave(2, 4, size, size), torch.tensor(STEPS), context).sample,
        "vae mean": posterior.mean,
        "vae std": posterior.std,
        "vae decoded": pipe.vae.decode(3.0 * wave(1, 4, size, size)).sample,
    }
    picture = pipe(
        PROMPTS[0],
        num_inference_steps=SAMPLING["steps"],
        guidance_scale=SAMPLING["guidance"],
        generator=torch.Generator().manual_seed(SAMPLING["seed"]),
    ).images[0]
    return outputs, picture


def digest(tensor: Tensor, count: int = 96) -> dict[str, list]:
    """A summary that identifies a tensor: its shape and `count` of its numbers, evenly spaced."""
    flat = tensor.flatten()
    return {"shape": list(tensor.shape), "values": [flat[i * len(flat) // count].item() for i in range(count)]}


def main() -> None:
    import diffusers
    import transformers

    from ldm import StableDiffusion

    outputs, picture = compute(BASE)
    made_by = {library.__name__: library.__version__ for library in (diffusers, transformers, torch)}
    record = {"made_by": made_by, "model": StableDiffusion.load(BASE).source_fingerprint()}
    record |= {name: digest(tensor) for name, tensor in outputs.items()}
    NUMBERS.parent.mkdir(exist_ok=True)
    NUMBERS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    picture.save(PICTURE)


if __name__ == "__main__":
    main()
