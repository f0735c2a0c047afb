"""The host never waits for the device inside a denoising step: on torch's meta device there is no value to read."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldm import samplers
from ldm.config import ScheduleConfig
from ldm.guidance import denoiser
from ldm.schedule import Schedule

META = torch.device("meta")


class NoWaiting(TorchDispatchMode):
    """Inside, copying to another device raises, unless it says that nobody has to wait for it."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        before = {a.device for a in args if isinstance(a, torch.Tensor)}
        moved = isinstance(result, torch.Tensor) and before and result.device not in before
        if moved and not kwargs.get("non_blocking"):
            raise RuntimeError(f"{operation} waits for a copy")
        return result


@pytest.fixture(scope="module")
def sd(random_model):
    sd = random_model()
    for network in sd.networks().values():
        network.to(META)
    return sd


@torch.no_grad()
def sample(sd, sampler, steps, guidance=5.0):
    """Samples latents on the meta device, as `StableDiffusion.generate` does it."""
    x = torch.empty(2, 4, 8, 8, device=META)
    context = torch.empty(4 if guidance != 1.0 else 2, 24, 24, device=META)
    denoise = denoiser(sd.unet, sd.schedule, context, guidance, rescale=0.5)
    with NoWaiting():
        noise = partial(torch.empty_like, x)
        return samplers.SAMPLERS[sampler](denoise, x, sd.schedule, steps, eta=0.5, noise=noise)


@pytest.mark.parametrize(
    "sampler, prediction, guidance",
    [*((sampler, "v", 5.0) for sampler in samplers.SAMPLERS), ("ddim", "eps", 5.0), ("ddim", "eps", 1.0)],
)
def test_a_denoising_step_reads_nothing(sampler, prediction, guidance, sd, monkeypatch):
    monkeypatch.setattr(sd, "schedule", Schedule(ScheduleConfig(prediction=prediction)))
    z = sample(sd, sampler, steps=3, guidance=guidance)  # plms has a past at its third step, and dpmpp_2m at its second
    assert z.shape == (2, 4, 8, 8) and z.device == META


@pytest.mark.parametrize(
    "read",
    [
        lambda eps: eps.mean().item(),
        lambda eps: bool(eps.isfinite().all()),
        lambda eps: eps[eps > 0],  # its size depends on values
        lambda eps: eps.cpu(),
        lambda eps: torch.zeros(1).to(eps.device),
    ],
    ids=["item", "if", "mask", "cpu", "copy"],
)
def test_a_read_in_a_denoising_step_would_be_found(read, sd, monkeypatch):
    forward = sd.unet.forward

    def reading(x, t, context):
        eps = forward(x, t, context)
        read(eps)
        return eps

    monkeypatch.setattr(sd.unet, "forward", reading)
    with pytest.raises((RuntimeError, NotImplementedError)):
        sample(sd, "ddim", steps=1)
