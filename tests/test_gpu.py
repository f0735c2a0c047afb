"""What only a GPU can show. Run with `pytest -m gpu`; skipped without CUDA."""

from dataclasses import replace

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize(
    "flags", [{}, {"gradient_checkpointing": True}, {"mixed_precision": "bf16"}, {"train_batch_size": 2}], ids=str
)
def test_the_peak_of_a_training_step_is_within_15_percent_of_the_prediction(flags):
    """SD1 at full size, 512 pixels, against the largest number of bytes that CUDA's allocator has given out."""
    from ldm import StableDiffusion
    from ldm.config import SD1
    from ldm.dreambooth import FullTuning, dreambooth_loss
    from ldm.training import Settings
    from ldm.training.memory import Rehearsal
    from ldm.training.optimizer import adamw
    from ldm.training.precision import Precision

    device = torch.device("cuda")
    settings = replace(Settings(instance_prompt="a sks dog", class_prompt="a dog"), **flags)
    with torch.device("meta"):
        sd = StableDiffusion(SD1)
    rehearsal = Rehearsal(sd, FullTuning, settings, device)
    rehearsal.prepare()
    predicted = rehearsal.training_step(1).total

    before = torch.cuda.memory_allocated()
    for network in sd.networks().values():
        network.to_empty(device=device)
        for parameter in network.parameters():
            torch.nn.init.constant_(parameter, 1e-3)
    precision, trainable = Precision(settings.mixed_precision, device), FullTuning(sd, settings)
    optimizer = adamw(trainable.parameter_groups(settings), settings.use_8bit_adam)
    prompts = [p for p in (settings.instance_prompt, settings.class_prompt) for _ in range(settings.train_batch_size)]
    is_class = torch.tensor([prompt == settings.class_prompt for prompt in prompts], device=device)
    sd.forget_encoder()
    sd.freeze(sd.vae, precision.dtype)
    trainable.prepare(tuple(dict.fromkeys(prompts)), precision.dtype)
    for step in range(3):
        if step == 1:  # the first step has no moments yet
            torch.cuda.reset_peak_memory_stats()
        optimizer.zero_grad(set_to_none=True)
        noisy = torch.randn(len(prompts), 4, 64, 64, device=device)
        with precision.autocast():
            prediction = trainable(noisy, torch.randint(1000, (len(prompts),), device=device), prompts)
        precision.backward(dreambooth_loss(prediction, noisy, is_class, 1.0).total)
        del prediction
        torch.nn.utils.clip_grad_norm_(list(trainable.trained.values()), settings.max_grad_norm)
        optimizer.step()
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.15)
