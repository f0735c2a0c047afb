"""Settings of the loss, and of the noise and the timesteps that it is computed at."""

from dataclasses import dataclass, replace

from ldm.errors import InputError
from ldm.schedule import Schedule
from ldm.settings.setting import Group, not_positive, setting


@dataclass(frozen=True)
class Loss(Group):
    """Loss, noise and timesteps"""

    loss: str = setting(
        "l2",
        "error of a prediction: l2, its square; huber, pseudo-Huber, in which large errors count less",
        flags=("--loss-type",),
        choices=("l2", "huber"),
    )
    huber_c: float = setting(0.1, "error around which huber turns from a parabola into a straight line")
    snr_gamma: float | None = setting(None, "min-SNR weighting of the loss; 5 is usual", type=float)
    unmasked_weight: float = setting(
        0.1, "weight of the loss outside the mask of a photograph that has one, 0 to 1; inside it is 1"
    )
    noise_offset: float = setting(
        0.0, "also shift each channel of the noise, by this times a normal number; 0.05 to 0.1 helps dark pictures"
    )
    rescale_betas_zero_snr: bool = setting(
        False,
        "train on a schedule that ends in pure noise, for models that predict v; the saved model says it",
        flags=("--zero-terminal-snr",),
    )
    min_timestep: int = setting(0, "lowest timestep to train at")
    max_timestep: int | None = setting(
        None, "the first timestep above those to train at; the model's 1000 if not given", type=int
    )

    @property
    def huber(self) -> float | None:
        """The c of the pseudo-Huber loss; None for the squared error."""
        return self.huber_c if self.loss == "huber" else None

    def timesteps(self, schedule: Schedule) -> range:
        """The timesteps to train at."""
        return range(self.min_timestep, schedule.timesteps if self.max_timestep is None else self.max_timestep)

    def check_schedule(self, schedule: Schedule) -> None:
        """Raises InputError if a model with this schedule can't train with these settings."""
        steps = self.timesteps(schedule)
        if not 0 <= steps.start < steps.stop <= schedule.timesteps:
            raise InputError(
                f"--min-timestep {steps.start} and --max-timestep {steps.stop} hold no timestep of the model's; they "
                f"should be from 0 to {schedule.timesteps}, the first below the second"
            )
        if self.rescale_betas_zero_snr:
            if schedule.config.prediction == "eps":
                raise InputError(
                    "--rescale-betas-zero-snr needs a model that predicts v, and this one predicts eps, which tells "
                    "nothing about pure noise; leave it out, or give --prediction-type v if the model does predict v"
                )
            Schedule(
                replace(schedule.config, zero_terminal_snr=True, spacing="trailing")
            )  # raises for betas that it does not suit

    def problem(self) -> str | None:
        if problem := not_positive(self, "huber_c", "snr_gamma"):
            return problem
        if not 0 <= self.unmasked_weight <= 1:
            return f"--unmasked-weight {self.unmasked_weight} is not from 0 to 1"
        if not 0 <= self.noise_offset < float("inf"):
            return f"--noise-offset {self.noise_offset} is not a number from 0; 0.05 to 0.1 is usual"
        if self.rescale_betas_zero_snr and self.train == "token":
            return "--rescale-betas-zero-snr changes what the networks learn; leave it out with --train token"
        return None
