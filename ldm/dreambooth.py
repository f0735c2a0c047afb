"""What makes fine-tuning DreamBooth (Ruiz et al. 2023): the loss, what trains, and what it is fed."""

from torch import Tensor, nn

from ldm.model import StableDiffusion


def dreambooth_loss(
    prediction: Tensor, target: Tensor, is_class: Tensor, prior_weight: float, row_weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Subject term plus weighted prior-preservation term (DreamBooth, eq. 2).

    prediction, target: (B, C, h, w); is_class: (B,) bool, True for rows of the class prior.
    row_weight: (B,) factors on the rows' errors, 1 if None.
    Returns (loss, subject_mse, prior_mse), scalars in the units of the target squared. The mean of no rows is 0.
    """
    error = (prediction.float() - target.float()).square().flatten(1).mean(1)  # (B,)
    if row_weight is not None:
        error = error * row_weight
    subject, prior = _mean(error[~is_class]), _mean(error[is_class])
    return subject + prior_weight * prior, subject, prior


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(len(values), 1)


def min_snr_weight(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """Row weights (B,) that tame the easy, little-noised steps. Min-SNR, Hang et al. 2023, section 3.4.

    snr: (B,) of the rows' steps; prediction: "eps" or "v", whose errors are x_0's times snr, or snr + 1.
    """
    return snr.clamp(max=gamma) / (snr if prediction == "eps" else snr + 1.0)


class Trainee(nn.Module):
    """What trains, as one module with one forward pass: the UNet, and the text encoder before it if that trains."""

    def __init__(self, sd: StableDiffusion, text_encoder: bool, checkpointing: bool = False):
        """checkpointing: compute activations again in the backward pass instead of keeping them."""
        super().__init__()
        for network in sd.networks().values():
            network.requires_grad_(False)
        self.unet = sd.unet.requires_grad_(True)
        self.text_encoder = sd.text_encoder.requires_grad_(True) if text_encoder else None
        self.unet.checkpointing = sd.text_encoder.text_model.checkpointing = checkpointing

    @property
    def text_encoder_trains(self) -> bool:
        return self.text_encoder is not None and next(self.text_encoder.parameters()).requires_grad

    def forward(self, x: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        """x: (B, 4, h, w); t: (B,); prompts: ids (P, L) if the text encoder trains, else context (P, L, D).

        Each of the P prompts serves B / P rows, in order. Returns the prediction, (B, 4, h, w).
        """
        context = self.text_encoder(prompts) if self.text_encoder is not None else prompts
        return self.unet(x, t, context.repeat_interleave(len(x) // len(prompts), dim=0))
