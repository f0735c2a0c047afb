"""Settings of what a run writes: its folder, checkpoints, sheets and metrics."""

from dataclasses import dataclass
from importlib.util import find_spec

from ldm import samplers
from ldm.runtime import cli
from ldm.sampling import contact_sheet
from ldm.settings.setting import Group, not_a_number, setting


@dataclass(frozen=True)
class Output(Group):
    """The run and its checkpoints"""

    output_dir: str | None = setting(
        None, "a new folder for the run; runs/dreambooth, numbered if taken", path=True, may_change=True
    )
    resume_from_checkpoint: str | None = setting(
        None, "resume from this checkpoint folder, or from the latest one of the run", path=True, may_change=True
    )
    dry_run: bool = setting(
        False, "say what the run will do, write nothing, and stop", may_change=True, action="store_true"
    )
    checkpointing_steps: int = setting(500, "number of steps between checkpoints", type=cli.positive, may_change=True)
    checkpoints_total_limit: int | None = setting(
        None, "number of checkpoints to keep; all if not given", type=cli.positive, may_change=True
    )
    layout: str = setting("official", "layout of the saved model", choices=("official", "diffusers"), may_change=True)
    report_to: str = setting(
        "none",
        "also send the metrics to this tracker; needs the tracking extra",
        choices=("none", "tensorboard", "wandb"),
        may_change=True,
    )

    def problem(self) -> str | None:
        if self.report_to != "none" and find_spec(self.report_to) is None:
            return f'--report-to {self.report_to} needs the tracking extra: pip install -e ".[tracking]"'
        return None


@dataclass(frozen=True)
class Sampling(Group):
    """Pictures that the run makes"""

    validation_prompt: tuple[str, ...] = setting(
        (),
        "prompt of one row of the before/after sheet, repeatable; instance and class prompt if not given",
        action="append",
        may_change=True,
    )
    num_validation_images: int = setting(4, "pictures in a row of the sheet", type=cli.positive, may_change=True)
    sampler: str = setting("ddim", "sampler of class pictures and sheets", metavar="NAME")
    sample_steps: int = setting(50, "sampling steps for class pictures and sheets", type=cli.positive)
    guidance_scale: float = setting(7.5, "classifier-free guidance for class pictures and sheets")
    sample_batch_size: int = setting(4, "pictures sampled at once", type=cli.positive, may_change=True)

    def problem(self) -> str | None:
        if problem := not_a_number(self, "guidance_scale"):
            return problem
        samplers.find(self.sampler)
        rows = len(self.validation_prompt or self.prompts)
        contact_sheet.check_size(rows, self.num_validation_images, self.resolution, self.resolution)
        return None
