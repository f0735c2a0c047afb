"""Settings of what a run measures while it trains."""

from dataclasses import dataclass
from pathlib import Path

from ldm.runtime import cli
from ldm.settings.setting import Group, setting

BEST_METRICS = ("score", "validation_loss")


@dataclass(frozen=True)
class ValidationSettings(Group):
    """Validation while it trains"""

    validation_steps: int | None = setting(
        None,
        "steps between validations: a sheet, losses of held-out pictures, language drift; none if not given",
        type=cli.positive,
        may_change=True,
    )
    validation_data_dir: str | None = setting(
        None, "folder with held-out pictures of the subject, which are not trained on", path=True, may_change=True
    )
    hold_out: int = setting(0, "hold this many of the photographs out, chosen by the seed, instead of a folder")
    best_metric: str = setting(
        "score",
        "best/ keeps the model with the highest score, which weighs learning, over-fitting and harm to the class, or "
        "with the lowest loss of the held-out pictures",
        choices=BEST_METRICS,
    )
    num_drift_images: int = setting(
        16, "pictures of the class prompt that measure language drift at each validation; 0: none", may_change=True
    )

    @property
    def holds_out(self) -> bool:
        """Whether there are held-out pictures."""
        return self.hold_out > 0 or self.validation_data_dir is not None

    @property
    def keeps_best(self) -> bool:
        """Whether the run keeps its best model in best/."""
        return self.validation_steps is not None and self.holds_out

    def problem(self) -> str | None:
        if not 0 <= self.hold_out <= cli.MAX_COUNT:
            return f"--hold-out {self.hold_out} is not a whole number from 0"
        if not 0 <= self.num_drift_images <= MAX_DRIFT_IMAGES or self.num_drift_images == 1:
            return f"--num-drift-images {self.num_drift_images} is not 0, nor a number from 2 to {MAX_DRIFT_IMAGES}"
        if self.holds_out and self.validation_steps is None:
            return "held-out pictures need --validation-steps: the number of steps between validations"
        if self.hold_out and self.validation_data_dir:
            return "--hold-out and --validation-data-dir both choose the held-out pictures; leave one of them out"
        folders = [Path(folder).resolve() for folder in (self.validation_data_dir, self.instance_data_dir) if folder]
        if self.validation_data_dir and len(set(folders)) < len(folders):
            return f"--validation-data-dir {self.validation_data_dir} is --instance-data-dir too; give other pictures"
        return None


MAX_DRIFT_IMAGES = 1000
