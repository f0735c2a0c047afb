"""The schedule equals published numbers, and its formulas agree with each other."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.config import ScheduleConfig
from ldm.errors import InputError
from ldm.samplers import SAMPLERS
from ldm.schedule import Schedule

FACTS = json.loads(Path(__file__).parent.parent.joinpath("facts", "schedulers.json").read_text())["schedule"]
SD = Schedule(ScheduleConfig())
V = Schedule(ScheduleConfig(prediction="v"))
ZERO_SNR = Schedule(ScheduleConfig(prediction="v", zero_terminal_snr=True, spacing="trailing"))


def at(table: torch.Tensor, name: str) -> list[float]:
    """The entries of the table at the numbers in the fact's name."""
    return table[[int(word) for word in name.split() if word.isdigit()]].tolist()


def test_betas_and_alpha_bar_are_those_of_stable_diffusion():
    for name, table in {"betas 0 1 2 997 998 999": SD.betas, "abar 0 1 500 998 999": SD.alphas_cumprod}.items():
        assert at(table, name) == pytest.approx(FACTS[name], rel=1e-12)


def test_roots_of_alpha_bar_equal_published_numbers():
    published, abar = FACTS["tinygrad"], SD.alphas_cumprod[[0, -1]]
    assert abar.sqrt().tolist() == pytest.approx(published["sqrt_acp"], rel=2e-6)  # theirs are float32
    assert (1.0 - abar).sqrt().tolist() == pytest.approx(published["sqrt_omacp"], rel=2e-5)


def test_official_buffers_have_the_published_values():
    buffers = SD.official_buffers()
    assert len(buffers) == 12 and {(t.dtype, t.shape) for t in buffers.values()} == {(torch.float32, (1000,))}
    for name, numbers in FACTS["official buffers 0 1 999"].items():
        assert buffers[name][[0, 1, 999]].tolist() == pytest.approx(numbers, rel=1e-6)


def test_leading_steps_are_the_official_ones():
    for steps, rising in FACTS["official steps"].items():
        assert SD.spaced(int(steps)) == rising[::-1]


@pytest.mark.filterwarnings("ignore:.* leading steps begin at")
def test_a_schedule_has_exactly_as_many_steps_as_asked_for():
    for schedule in (SD, ZERO_SNR):
        for steps in range(1, 1000):
            t = schedule.spaced(steps)
            assert len(t) == len(set(t)) == steps and t == sorted(t, reverse=True) and t[0] <= 999 and t[-1] >= 0


@pytest.mark.parametrize("steps", [-1, 0, 1000, 5000])
def test_other_numbers_of_steps_are_refused(steps):
    with pytest.raises(InputError, match="1 to 999"):
        SD.spaced(steps)


def test_trailing_steps_begin_at_the_last_timestep_and_equal_those_of_diffusers():
    assert ZERO_SNR.spaced(10) == FACTS["trailing 10"]
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")
    theirs = diffusers.DDIMScheduler(timestep_spacing="trailing")
    for steps in range(1, 1000):
        theirs.set_timesteps(steps)
        assert (
            ZERO_SNR.spaced(steps) == theirs.timesteps[:steps].tolist()
        )  # for some counts diffusers has one more, a -1


def test_zero_terminal_snr_equals_published_numbers_and_ends_at_noise():
    betas, abar = "zero terminal snr betas 0 1 500 997 998 999", "zero terminal snr abar 0 1 500 997 998 999"
    assert at(ZERO_SNR.betas, betas) == pytest.approx(FACTS[betas], rel=1e-9)
    *before, last = at(ZERO_SNR.alphas_cumprod, abar)
    assert before == pytest.approx(FACTS[abar][:-1], rel=1e-9)
    assert last == 2.0**-24  # not 0; the docstring of Schedule says why

    x0, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    last_step = torch.tensor([999])
    torch.testing.assert_close(ZERO_SNR.add_noise(x0, noise, last_step), noise, rtol=0, atol=2**-12 * 5)
    torch.testing.assert_close(ZERO_SNR.target(x0, noise, last_step), -x0, rtol=0, atol=2**-12 * 5)


def test_zero_terminal_snr_suits_betas_above_those_of_sd():
    """The embedded model's end on 0.02: abar is 2.4e-8 at step 998, below 2**-24, and falls on."""
    schedule = Schedule(ScheduleConfig(beta_end=0.02, prediction="v", zero_terminal_snr=True, spacing="trailing"))
    root = np.cumprod(1 - np.linspace(0.00085**0.5, 0.02**0.5, 1000) ** 2) ** 0.5
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2  # Lin et al. 2023, algorithm 1
    np.testing.assert_allclose(schedule.alphas_cumprod[:-1], expected[:-1], rtol=1e-9)
    assert expected[-2] < 2.0**-24 and 0 < schedule.alphas_cumprod[-1] < schedule.alphas_cumprod[-2]
    with pytest.raises(InputError, match="make NaN"):
        Schedule(ScheduleConfig(beta_end=0.05, prediction="v", zero_terminal_snr=True, spacing="trailing"))


def test_zero_terminal_snr_needs_trailing_steps_and_a_schedule_needs_two_timesteps():
    with pytest.raises(InputError, match="trailing"):
        Schedule(ScheduleConfig(prediction="v", zero_terminal_snr=True))
    with pytest.raises(InputError, match="a schedule of 1 timesteps"):
        Schedule(ScheduleConfig(timesteps=1))


def test_zero_terminal_snr_is_for_models_that_predict_v():
    with pytest.raises(InputError, match="predicts v"):
        Schedule(ScheduleConfig(prediction="eps", zero_terminal_snr=True))


def test_an_unknown_spacing_is_refused():
    with pytest.raises(InputError, match="leading and trailing"):
        Schedule(ScheduleConfig(spacing="linspace"))


def test_between_whole_steps_log_sigma_is_linear():
    def log_sigma(t: float) -> float:
        abar = SD.alpha_bar(t)
        return 0.5 * torch.tensor((1 - abar) / abar, dtype=torch.float64).log().item()

    for low in (0, 1, 500, 998):
        for part in (0.0, 0.25, 0.9, 1.0):
            linear = (1 - part) * log_sigma(low) + part * log_sigma(low + 1)
            assert log_sigma(low + part) == pytest.approx(linear, abs=1e-12)


def test_step_at_is_the_inverse_of_alpha_bar():
    for schedule in (SD, ZERO_SNR):
        for t in (0, 0.125, 1, 17.3, 500, 998.75, 999):
            abar = schedule.alpha_bar(t)
            assert schedule.step_at(((1 - abar) / abar) ** 0.5) == pytest.approx(t, abs=1e-7)
    assert SD.step_at(1e-3) == 0.0 and SD.step_at(1e3) == 999.0


def test_eps_x0_and_v_convert_into_each_other():
    x0, noise = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0, 1, 300, 981, 999])
    for steps in (t, 17, 300.25):  # a tensor of steps, or one step for all rows
        x = SD.add_noise(x0, noise, steps)
        torch.testing.assert_close(SD.x0(noise, x, steps), x0, rtol=0, atol=1e-12)
        torch.testing.assert_close(V.eps(V.target(x0, noise, steps), x, steps), noise, rtol=0, atol=1e-12)
        assert SD.eps(noise, x, steps) is noise and SD.target(x0, noise, steps) is noise
    rows = torch.cat([SD.add_noise(x0[i : i + 1], noise[i : i + 1], int(step)) for i, step in enumerate(t)])
    torch.testing.assert_close(SD.add_noise(x0, noise, t), rows, rtol=0, atol=1e-15)


def test_adding_noise_keeps_the_variance():
    x0, noise = torch.randn(2, 1000, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    x = SD.add_noise(x0, noise, torch.arange(1000))
    assert x.var().item() == pytest.approx(1.0, abs=0.02)


def test_snr_is_alpha_bar_over_one_minus_alpha_bar():
    t = torch.tensor([0, 500, 999])
    assert SD.snr(t).tolist() == pytest.approx([0.99915 / 0.00085, 0.2763326838 / 0.7236673162, 0.0046819], rel=1e-4)


@pytest.mark.parametrize(
    "sampler, steps, first, better",
    [
        ("ddim", 334, 667, 333),
        ("ddim", 400, 799, 333),
        ("ddim", 501, 501, 500),
        ("ddim", 600, 600, 500),
        ("ddim", 900, 900, 500),
        ("dpmpp_2m", 333, 667, 332),  # it spaces one step more than it takes
        ("dpmpp_2m", 500, 501, 499),
    ],
)
def test_leading_steps_that_begin_far_from_noise_give_a_warning(sampler, steps, first, better):
    times = SAMPLERS[sampler].times
    said = f"^{steps} leading steps begin at t = {first} of 1000, far from pure noise; take {better} steps"
    with pytest.warns(UserWarning, match=said) as told:
        assert times(SD, steps)[0] == first
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SD.check_steps(steps)
        SAMPLERS["dpmpp_2m_karras"].times(SD, steps)
        times(ZERO_SNR, steps)
        assert times(SD, better)[0] > 990


@pytest.mark.parametrize("steps", [1, 20, 25, 47, 50, 100, 332, 499, 999])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_other_numbers_of_steps_give_no_warning(sampler, steps):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAMPLERS[sampler].times(SD, steps)
        for even in (250, 333, 500):
            SD.spaced(even)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tables_are_computed_once_for_a_device_and_type(dtype):
    schedule, t = Schedule(ScheduleConfig(prediction="v")), torch.tensor([10, 700])
    x0, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)

    def results() -> list[torch.Tensor]:
        formulas = (schedule.add_noise, schedule.target, schedule.v, schedule.eps, schedule.x0)
        return [formula(x0, noise, t) for formula in formulas] + [schedule.snr(t)]

    before = results()
    assert {result.dtype for result in before[:-1]} == {dtype}
    schedule.alphas_cumprod = None  # nothing reads it again
    assert all(torch.equal(a, b) for a, b in zip(results(), before, strict=True))
