"""Says once how long the rest of a run takes, when its first steps have been timed."""

import time

WARM_UP, STEPS, SECONDS = 2, 10, 15.0  # steps that are not timed; steps or seconds that are, whichever is first


class Pace:
    """Times the steps of a run. total: the last step."""

    def __init__(self, total: int):
        self.total = total
        self._calls, self._began, self._first, self._has_said = 0, 0.0, 0, False

    def after(self, step: int) -> str | None:
        """What is left, once, when enough steps are timed and some are left; else None. Called after each step."""
        self._calls += 1
        if self._calls == WARM_UP:
            self._began, self._first = time.perf_counter(), step
        timed, left, seconds = step - self._first, self.total - step, time.perf_counter() - self._began
        is_enough = self._calls > WARM_UP and timed > 0 and (timed >= STEPS or seconds >= SECONDS)
        if self._has_said or not is_enough or not left:
            return None
        self._has_said = True
        return f"about {duration(left * seconds / timed)} of training left: {left:,} steps of {seconds / timed:.2g} s"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits: "40 seconds", "12 minutes", "2.5 hours"."""
    if seconds < 100:
        return f"{max(1, round(seconds))} seconds" if seconds >= 1.5 else "1 second"
    return f"{seconds / 60:.0f} minutes" if seconds < 100 * 60 else f"{seconds / 3600:.1f} hours"
