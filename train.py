"""DreamBooth: teaches a Stable Diffusion one subject from a few photographs (Ruiz et al. 2023).

    python train.py                                         the embedded model, four pictures, a few minutes on a CPU
    python train.py --model v1-5-pruned-emaonly.safetensors --instance-data-dir dog \\
        --instance-prompt "a photo of sks dog" --class-prompt "a photo of a dog"

Read it from top to bottom: it is the algorithm.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ldm import cli, data, dreambooth, sheet
from ldm.model import StableDiffusion
from ldm.run import Run
from ldm.settings import Settings, parse

TINY = Path(__file__).parent / "weights" / "tiny" / "train.toml"


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(argv, TINY)
    run = Run(settings.output_dir)
    photographs = data.find_pictures(settings.instance_data_dir, "--instance-data-dir")
    sd = StableDiffusion.load(
        settings.model,
        cli.device(settings.device),
        ema=settings.ema,
        prediction=settings.prediction_type,
        variant=settings.variant,
    )
    print(sd.about)
    class_pictures = plan(sd, settings, run, photographs)
    run.start(settings)

    # The base model before it has seen the subject: what it makes of the prompts, and what it knows of the class.
    before = sample(sd, settings, "before")
    sheet.grid(before).save(run.folder / "sheets" / "before.png")
    prompts, kinds = [settings.instance_prompt], [("instance", photographs)]
    if class_pictures is not None:
        class_pictures.generate(sd, settings.sample_batch_size)
        prompts, kinds = [*prompts, settings.class_prompt], [*kinds, ("class", class_pictures.paths)]

    # Pictures become latents once; the autoencoder stays frozen.
    rows = []
    for kind, paths in kinds:
        mean, std = dreambooth.encode_pictures(sd, paths, settings.resolution, f"{kind} pictures")
        rows.append(data.LatentRows(kind, mean, std, sd.schedule.timesteps))

    parameters = dreambooth.trainable(sd, settings.train_text_encoder)
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=1e-2)
    batch = settings.train_batch_size
    is_class = torch.arange(len(rows) * batch, device=sd.device) >= batch  # instance rows first, class rows after

    bar = tqdm(range(1, settings.max_train_steps + 1), desc="training", unit="step")
    for step in bar:
        began = time.perf_counter()
        drawn = [kind.draw(settings.seed, (step - 1) * batch, batch) for kind in rows]
        z, noise, t = (torch.cat(column) for column in zip(*drawn, strict=True))
        context = sd.encode_prompt(prompts).repeat_interleave(batch, dim=0)  # (B, L, D)
        prediction = sd.unet(sd.schedule.add_noise(z, noise, t), t, context)
        target = sd.schedule.target(z, noise, t)
        loss, subject, prior = dreambooth.dreambooth_loss(prediction, target, is_class, settings.prior_loss_weight)

        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()

        metrics = {"loss": loss.item(), "subject_loss": subject.item(), "prior_loss": prior.item()}
        run.log(step=step, **metrics, grad_norm=norm.item(), seconds=round(time.perf_counter() - began, 4))
        bar.set_postfix({name: f"{value:.4f}" for name, value in metrics.items()}, refresh=False)

    after = sample(sd, settings, "after")
    sheet.grid(after).save(run.folder / "sheets" / "after.png")
    pairs = [row for pair in zip(before, after, strict=True) for row in pair]
    shown = [("photographs of the subject", [data.square(path, settings.resolution) for path in photographs])]
    sheet.grid(shown + pairs).save(run.folder / "sheets" / "before_after.png")
    model = run.model_path(settings.layout)
    sd.save(model, settings.layout)
    print(f"model: {model}\nsheet: {run.folder / 'sheets' / 'before_after.png'}")


def plan(sd: StableDiffusion, settings: Settings, run: Run, photographs: list[Path]) -> dreambooth.ClassPictures | None:
    """Finds out all that could be wrong with the input while nothing is written yet. Returns the class pictures."""
    sd.latent_shape(settings.resolution, settings.resolution)
    sd.schedule.spaced(settings.sample_steps)
    pictures, class_pictures = photographs, None
    if settings.with_prior_preservation:
        recipe = {
            "prompt": settings.class_prompt,
            "sampler": settings.sampler,
            "steps": settings.sample_steps,
            "guidance_scale": settings.guidance_scale,
            "resolution": settings.resolution,
            "model": sd.fingerprint(),
        }
        folder = settings.class_data_dir or run.folder / "class"
        class_pictures = dreambooth.ClassPictures(folder, settings.num_class_images, settings.seed, recipe)
        pictures = pictures + [path for path in class_pictures.paths if path.exists()]
    for path in pictures:
        data.load_picture(path, settings.resolution)
    return class_pictures


def sample(sd: StableDiffusion, settings: Settings, when: str) -> list[sheet.Row]:
    """A row of pictures for each validation prompt, the same seeds in every row and every time."""
    prompts = settings.validation_prompt or tuple(filter(None, (settings.instance_prompt, settings.class_prompt)))
    count, size = settings.num_validation_images, settings.resolution
    seeds = range(settings.seed, settings.seed + count)
    batches = [seeds[i : i + settings.sample_batch_size] for i in range(0, count, settings.sample_batch_size)]
    rows = []
    with tqdm(total=len(prompts) * len(batches) * settings.sample_steps, desc=f"sheet {when}", unit="step") as bar:
        for prompt in prompts:
            pictures = []
            for batch in batches:
                pictures += sd.generate(
                    prompt,
                    steps=settings.sample_steps,
                    guidance=settings.guidance_scale,
                    sampler=settings.sampler,
                    seeds=batch,
                    height=size,
                    width=size,
                    progress=bar.update,
                )
            rows.append((f"{prompt} ({when})", pictures))
    return rows


if __name__ == "__main__":
    with cli.reported("train.py"):
        main()
