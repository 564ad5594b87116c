"""Samplers as step tables: for every U-Net evaluation a timestep and a K x (K+2) matrix, computed in float64.

The state has K = 4 slots. Slot 0 is the VP-scaled latent x that the U-Net sees. One evaluation does

    state' = update @ [state; output; noise]

with `output` the guided output of the U-Net and `noise` standard normal. Every sampler below is one function
`(schedule, steps) -> StepTable`; the coefficients follow the papers and equal diffusers' schedulers. Unprimed
quantities belong to the current noise level, primed ones (`_next`) to the one that the step goes to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..contract import SLOTS
from ..errors import StepsError, UnknownSchedulerError, shown
from .schedule import SPACINGS, Schedule, karras_sigmas, sigma_to_timestep, spaced_timesteps

OUTPUT, NOISE = SLOTS, SLOTS + 1
"""Columns of an update matrix; columns 0 to K-1 are the slots of the state."""

Linear = tuple[float, float]
"""(p, q): a quantity that is p x + q output."""


@dataclass(frozen=True)
class StepTable:
    """Everything the loop needs to know about a sampler.

    timesteps [E] and updates [E, K, K+2], float64, one of each per U-Net evaluation; draws [E] says where diffusers
    draws noise (also where its factor is zero, so that the random numbers stay in step); initial_scale turns standard
    normal noise into the first latent; scales [E] are the factors that turn the latents after each evaluation into
    diffusers', which are not VP-scaled for every sampler.
    """

    timesteps: np.ndarray
    updates: np.ndarray
    draws: np.ndarray
    initial_scale: float
    scales: np.ndarray

    def __len__(self) -> int:
        return len(self.timesteps)


class _TableBuilder:
    """Collects the rows of a StepTable."""

    def __init__(self) -> None:
        self.timesteps: list[float] = []
        self.updates: list[np.ndarray] = []
        self.draws: list[bool] = []
        self.scales: list[float] = []

    def add(self, timestep: float, update: np.ndarray, draw: bool = False, scale: float = 1.0) -> None:
        self.timesteps.append(float(timestep))
        self.updates.append(update)
        self.draws.append(draw)
        self.scales.append(scale)

    def table(self, initial_scale: float = 1.0) -> StepTable:
        return StepTable(
            np.array(self.timesteps),
            np.stack(self.updates),
            np.array(self.draws),
            float(initial_scale),
            np.array(self.scales),
        )


def _single(x: float, output: float, noise: float = 0.0) -> np.ndarray:
    """The update of a sampler without memory: x' = x * slot 0 + output * output + noise * noise."""
    update = np.zeros((SLOTS, SLOTS + 2))
    update[0, [0, OUTPUT, NOISE]] = x, output, noise
    return update


def _multistep(x: float, weights: list[float], native: Linear) -> np.ndarray:
    """x' = x * slot 0 + sum of weights[j] * m_j, newest first, where m_0 = p x + q output is pushed into slots 1 to
    3."""
    update = np.zeros((SLOTS, SLOTS + 2))
    p, q = native
    update[0, 0], update[0, OUTPUT] = x + weights[0] * p, weights[0] * q
    update[0, 1 : len(weights)] = weights[1:]
    update[1, 0], update[1, OUTPUT] = p, q
    for slot in range(2, SLOTS):
        update[slot, slot - 1] = 1.0
    return update


def _as_x0(prediction_type: str, alpha: float, sigma: float) -> Linear:
    """The predicted clean latent as p x + q output."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    return (alpha, -sigma) if prediction_type == "v_prediction" else (0.0, 1.0)


def _as_epsilon(prediction_type: str, alpha: float, sigma: float) -> Linear:
    """The predicted noise as p x + q output."""
    if prediction_type == "epsilon":
        return 0.0, 1.0
    return (sigma, alpha) if prediction_type == "v_prediction" else (1 / sigma, -alpha / sigma)


def _vp(s: float) -> tuple[float, float]:
    """alpha and sigma of a k-diffusion noise level s."""
    alpha = 1 / math.sqrt(1 + s * s)
    return alpha, s * alpha


def ddim(schedule: Schedule, steps: int, eta: float = 0.0) -> StepTable:
    """DDIM, arXiv 2010.02502 equations 12 and 16. Equals DDIMScheduler, whose step always goes to t - T // steps."""
    builder, stride = _TableBuilder(), schedule.train_timesteps // steps
    final = 1.0 if schedule.config.get("set_alpha_to_one", True) else schedule.alphas_cumprod[0]
    for t in np.round(spaced_timesteps(schedule, steps, "leading")).astype(int):
        ab = schedule.alphas_cumprod[t]
        ab_next = schedule.alphas_cumprod[t - stride] if t >= stride else final
        deviation = eta * math.sqrt((1 - ab_next) / (1 - ab) * (1 - ab / ab_next))
        direction = math.sqrt(max(1 - ab_next - deviation**2, 0.0))
        alpha, sigma = math.sqrt(ab), math.sqrt(1 - ab)
        x0, epsilon = (
            _as_x0(schedule.prediction_type, alpha, sigma),
            _as_epsilon(schedule.prediction_type, alpha, sigma),
        )
        x, output = (math.sqrt(ab_next) * x0[i] + direction * epsilon[i] for i in (0, 1))
        builder.add(t, _single(x, output, deviation), draw=eta > 0)
    return builder.table()


def ddpm(schedule: Schedule, steps: int) -> StepTable:
    """DDPM, arXiv 2006.11239 equation 7, on a strided grid. Equals DDPMScheduler with fixed_small or fixed_large
    variance."""
    variance_type = schedule.option("variance_type", "fixed_small", ("fixed_small", "fixed_small_log", "fixed_large"))
    builder = _TableBuilder()
    grid = np.round(spaced_timesteps(schedule, steps, "leading")).astype(int)
    for t, t_next in zip(grid, np.append(grid[1:], -1)):
        ab = schedule.alphas_cumprod[t]
        ab_next = schedule.alphas_cumprod[t_next] if t_next >= 0 else 1.0
        beta = 1 - ab / ab_next
        x0 = _as_x0(schedule.prediction_type, math.sqrt(ab), math.sqrt(1 - ab))
        towards_x0 = math.sqrt(ab_next) * beta / (1 - ab)
        keep = math.sqrt(ab / ab_next) * (1 - ab_next) / (1 - ab)
        variance = beta if variance_type == "fixed_large" else max((1 - ab_next) / (1 - ab) * beta, 1e-20)
        builder.add(
            t, _single(keep + towards_x0 * x0[0], towards_x0 * x0[1], math.sqrt(variance) if t > 0 else 0.0), draw=t > 0
        )
    return builder.table()


def _euler_grid(schedule: Schedule, steps: int, karras: bool) -> tuple[np.ndarray, np.ndarray, float]:
    """Timesteps, noise levels with the final one appended, and the scale of the first latent."""
    levels = schedule.sigmas()
    timesteps = spaced_timesteps(schedule, steps, "linspace")
    sigmas = np.interp(timesteps, np.arange(len(levels)), levels)
    if karras:
        low, high = schedule.config.get("sigma_min"), schedule.config.get("sigma_max")
        sigmas = karras_sigmas(sigmas[-1] if low is None else low, sigmas[0] if high is None else high, len(sigmas))
        timesteps = sigma_to_timestep(sigmas, levels)
    # diffusers starts from s z or sqrt(s^2 + 1) z, in its own (VE) scale.
    scale = 1.0 if schedule.config.get("timestep_spacing", "linspace") == "leading" else _vp(sigmas[0])[1]
    return timesteps, sigmas, scale


def euler(schedule: Schedule, steps: int) -> StepTable:
    """Euler, algorithm 2 of arXiv 2206.00364 without churn. Equals EulerDiscreteScheduler."""
    _refuse_sigma_options(schedule)
    schedule.option("interpolation_type", "linear", ("linear",))
    schedule.option("timestep_type", "discrete", ("discrete",))
    timesteps, sigmas, scale = _euler_grid(schedule, steps, karras=bool(schedule.config.get("use_karras_sigmas")))
    sigmas = np.append(sigmas, _final_sigma(schedule))
    return _euler_table(schedule, timesteps, sigmas, sigmas[1:], np.zeros(len(timesteps)), scale, draw=False)


def euler_ancestral(schedule: Schedule, steps: int) -> StepTable:
    """Euler with ancestral noise (k-diffusion, sample_euler_ancestral). Equals EulerAncestralDiscreteScheduler."""
    timesteps, sigmas, scale = _euler_grid(schedule, steps, karras=False)
    sigmas = np.append(sigmas, 0.0)
    s, s_next = sigmas[:-1], sigmas[1:]
    up = np.sqrt(s_next**2 * (s**2 - s_next**2) / s**2)
    return _euler_table(schedule, timesteps, sigmas, np.sqrt(s_next**2 - up**2), up, scale, draw=True)


def _euler_table(
    schedule: Schedule,
    timesteps: np.ndarray,
    sigmas: np.ndarray,
    down: np.ndarray,
    up: np.ndarray,
    scale: float,
    draw: bool,
) -> StepTable:
    """y' = y + (down - s) epsilon + up z in the VE scale y = x / alpha; the last state is left in that scale, as
    diffusers does."""
    builder, last = _TableBuilder(), len(timesteps) - 1
    for i, t in enumerate(timesteps):
        alpha, sigma = _vp(sigmas[i])
        alpha_next = 1.0 if i == last else _vp(sigmas[i + 1])[0]
        p, q = _as_epsilon(schedule.prediction_type, alpha, sigma)
        stride = alpha_next * (down[i] - sigmas[i])
        builder.add(
            t, _single(alpha_next / alpha + stride * p, stride * q, alpha_next * up[i]), draw, scale=1 / alpha_next
        )
    return builder.table(scale)


def _final_sigma(schedule: Schedule) -> float:
    kind = schedule.option("final_sigmas_type", "zero", ("zero", "sigma_min"))
    return 0.0 if kind == "zero" else float(schedule.sigmas()[0])


def _refuse_sigma_options(schedule: Schedule) -> None:
    for name in ("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas"):
        schedule.option(name, False, (False, None))


def dpmpp_2m(schedule: Schedule, steps: int, karras: bool | None = None) -> StepTable:
    """DPM-Solver++(2M), arXiv 2211.01095 algorithm 2. Equals DPMSolverMultistepScheduler, algorithm dpmsolver++, order
    1 or 2.

    `karras` asks for the noise levels of arXiv 2206.00364; None does what the configuration says.
    """
    _refuse_sigma_options(schedule)
    schedule.option("algorithm_type", "dpmsolver++", ("dpmsolver++",))
    order = schedule.option("solver_order", 2, (1, 2))
    heun = schedule.option("solver_type", "midpoint", ("midpoint", "heun")) == "heun"
    timesteps, sigmas = _dpm_grid(
        schedule, steps, bool(schedule.config.get("use_karras_sigmas")) if karras is None else karras
    )
    builder, count, h_last = _TableBuilder(), len(timesteps), math.nan
    final_is_first_order = (
        schedule.config.get("euler_at_final", False)
        or sigmas[-1] == 0
        or (schedule.config.get("lower_order_final", True) and count < 15)
    )
    for i, t in enumerate(timesteps):
        (alpha, sigma), (alpha_next, sigma_next) = _vp(sigmas[i]), _vp(sigmas[i + 1])
        h = math.log(sigmas[i] / sigmas[i + 1]) if sigmas[i + 1] > 0 else math.inf
        gain = alpha_next * -math.expm1(-h)
        if i == 0 or order == 1 or (i == count - 1 and final_is_first_order):
            weights = [gain]
        else:
            slope = alpha_next * (math.expm1(-h) / h + 1) if heun else gain / 2
            weights = [gain + slope * h / h_last, -slope * h / h_last]
        builder.add(t, _multistep(sigma_next / sigma, weights, _as_x0(schedule.prediction_type, alpha, sigma)))
        h_last = h
    return builder.table()


def _dpm_grid(schedule: Schedule, steps: int, karras: bool) -> tuple[np.ndarray, np.ndarray]:
    """Integer timesteps, and noise levels with the final one appended, as DPMSolverMultistepScheduler spaces them."""
    levels = schedule.sigmas()
    if karras:
        sigmas = karras_sigmas(levels[0], levels[-1], steps)
        timesteps = sigma_to_timestep(sigmas, levels)
        if schedule.config.get("beta_schedule") != "squaredcos_cap_v2":
            timesteps = np.round(timesteps)
        timesteps = timesteps.astype(int)
    else:
        timesteps = _dpm_timesteps(schedule, steps, levels)
        sigmas = np.interp(timesteps, np.arange(len(levels)), levels)
    return timesteps, np.append(sigmas, _final_sigma(schedule))


def _dpm_timesteps(schedule: Schedule, steps: int, levels: np.ndarray) -> np.ndarray:
    """One point more than steps, of which the last is dropped."""
    clipped = float(schedule.config.get("lambda_min_clipped", -math.inf))
    total = int(np.sum(-np.log(levels) >= clipped))
    spacing = schedule.option("timestep_spacing", "linspace", SPACINGS)
    if spacing == "linspace":
        return np.round(np.linspace(0, total - 1, steps + 1))[:0:-1].astype(int)
    if spacing == "leading":
        return np.arange(steps, 0, -1) * (total // (steps + 1)) + int(schedule.config.get("steps_offset", 0))
    return np.round(np.arange(total, 0, -schedule.train_timesteps / steps)).astype(int) - 1


def pndm(schedule: Schedule, steps: int) -> StepTable:
    """PLMS: pseudo linear multistep, arXiv 2202.09778, with steps + 1 evaluations. Equals PNDMScheduler with
    skip_prk_steps.

    That option is taken as true where scheduler_config.json lacks it, as every Stable Diffusion model ships it: the
    Runge-Kutta warm-up would need a fifth slot.
    """
    schedule.option("skip_prk_steps", True, (True,))
    stride, builder = schedule.train_timesteps // steps, _TableBuilder()
    grid = np.round(spaced_timesteps(schedule, steps, "leading")).astype(int)
    final = 1.0 if schedule.config.get("set_alpha_to_one", False) else schedule.alphas_cumprod[0]
    evaluated = [grid[0], *grid[1:2], *grid[1:]]
    for i, t in enumerate(evaluated):
        start, end = (t, t - stride) if i != 1 else (t + stride, t)
        x, slope_x, slope = _plms_transfer(schedule, start, end, final)
        if i == 1:  # the first step once more, from the saved x, with the average of both outputs
            update = np.zeros((SLOTS, SLOTS + 2))
            update[0, [3, 1, OUTPUT]] = x + slope_x, slope / 2, slope / 2
            update[1, 1] = 1.0
        else:
            update = _multistep(x + slope_x, [slope * w for w in _ADAMS_BASHFORTH[min(max(i - 1, 0), 3)]], (0.0, 1.0))
        if i == 0:
            update[3, :] = 0.0
            update[3, 0] = 1.0
        builder.add(t, update)
    return builder.table()


_ADAMS_BASHFORTH = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


def _plms_transfer(schedule: Schedule, t: int, t_next: int, final: float) -> tuple[float, float, float]:
    """Equation 9 of arXiv 2202.09778 as x' = (a + b) x + c output; b is not zero where the model predicts v."""
    ab = schedule.alphas_cumprod[t]
    ab_next = schedule.alphas_cumprod[t_next] if t_next >= 0 else final
    slope = -(ab_next - ab) / (ab * math.sqrt(1 - ab_next) + math.sqrt(ab * (1 - ab) * ab_next))
    p, q = _as_epsilon(schedule.prediction_type, math.sqrt(ab), math.sqrt(1 - ab))
    return math.sqrt(ab_next / ab), slope * p, slope * q


SAMPLERS: dict[str, Callable[..., StepTable]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "euler": euler,
    "euler_a": euler_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_karras": lambda schedule, steps: dpmpp_2m(schedule, steps, karras=True),
    "pndm": pndm,
}
LABELS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "euler": "Euler",
    "euler_a": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_karras": "DPM++ 2M Karras",
    "pndm": "PLMS",
}
"""What pictures' metadata call the samplers."""

_CLASSES = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "PNDMScheduler": "pndm",
}


def sampler_name(name: str | None, schedule: Schedule) -> str:
    """The name in SAMPLERS that is meant by a name, a diffusers class name, or None (what the model was shipped
    with)."""
    asked = schedule.config.get("_class_name") if name is None else name
    known = _CLASSES.get(asked, asked) if isinstance(asked, str) else None
    if known not in SAMPLERS:
        whose = "the model's own scheduler" if name is None else "scheduler"
        raise UnknownSchedulerError(f"{whose} {shown(asked)} is not known; known: {', '.join(SAMPLERS)}")
    return known


def step_table(name: str, schedule: Schedule, steps: int, eta: float = 0.0) -> StepTable:
    """The table of a sampler in SAMPLERS; `eta` counts for DDIM only, as in diffusers. StepsError where there is
    none."""
    problem = StepsError(
        f"{name} has no {steps} steps on a schedule of {schedule.train_timesteps} timesteps with "
        f"steps_offset={schedule.config.get('steps_offset', 0)}; take fewer"
    )
    try:
        with np.errstate(all="ignore"):
            table = ddim(schedule, steps, eta) if name == "ddim" else SAMPLERS[name](schedule, steps)
            finite = np.isfinite(table.updates.astype(np.float32)).all() and np.isfinite(table.scales).all()
    except (ZeroDivisionError, IndexError) as error:  # noise levels that coincide, timesteps past the last one
        raise problem from error
    if not finite:
        raise problem
    return table
