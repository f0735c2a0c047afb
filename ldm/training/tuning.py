"""Which parameters train: the choice that the settings make."""

from ldm.dreambooth import FullTuning, Trainable
from ldm.model import StableDiffusion
from ldm.training.settings import Settings
from ldm.training.token_tuning import TokenTuning, begin_token


def tuning_of(sd: StableDiffusion, settings: Settings) -> Trainable:
    """What trains: the whole networks, a new token with them, or the token alone. Adds the token to the model."""
    token = begin_token(sd, settings)
    return TokenTuning(sd, settings, token) if settings.train == "token" else FullTuning(sd, settings, token)
