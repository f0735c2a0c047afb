"""Says once how long the rest of a run takes, when its first steps have been timed."""

WARM_UP, STEPS, SECONDS = 2, 10, 15.0  # steps that are not timed; steps or seconds that are, whichever is first


class Pace:
    """Times the steps of a run. total: the last step."""

    def __init__(self, total: int):
        self.total = total
        self._calls, self._seconds, self._first, self._has_said = 0, 0.0, 0, False

    def after(self, step: int, seconds: float) -> str | None:
        """What is left, once, when enough steps are timed and some are left; else None. Called after each step.

        seconds: that the step took, without validations and saves.
        """
        self._calls += 1
        if self._calls <= WARM_UP:
            self._first = step
            return None
        self._seconds += seconds
        timed, left = step - self._first, self.total - step
        is_enough = timed > 0 and (timed >= STEPS or self._seconds >= SECONDS)
        if self._has_said or not is_enough or not left:
            return None
        self._has_said, each = True, self._seconds / timed
        steps = "1 step" if left == 1 else f"{left:,} steps"
        return f"about {duration(left * each)} of training left: {steps} of {each:.2g} s"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits: "40 seconds", "12 minutes", "2.5 hours"."""
    if seconds < 100:
        return f"{max(1, round(seconds))} seconds" if seconds >= 1.5 else "1 second"
    return f"{seconds / 60:.0f} minutes" if seconds < 100 * 60 else f"{seconds / 3600:.1f} hours"
