"""Requests and made-up jobs, for those who drive the loop themselves."""

import inspect

import numpy as np

from engine.contract import SLOTS
from engine.family import STABLE_DIFFUSION
from engine.job import Job, Row, step_inputs
from engine.request import Request
from engine.sampling.noise import Draws, TorchGenerator
from engine.sampling.table import StepTable


def made_up_job(rows=2, height=8, width=8, evaluations=3, noise=False, seed=0, channels=128) -> Job:
    """A job whose updates are random, and small enough for its state to stay finite."""
    random = np.random.default_rng(seed)
    updates = 0.3 * random.standard_normal((evaluations, SLOTS, SLOTS + 2))
    if not noise:
        updates[..., -1] = 0.0  # as in every table of a sampler that draws none
    ones = np.ones(evaluations)
    timesteps = np.linspace(900.5, 3.0, evaluations)
    unclipped = {name: np.zeros((evaluations, n)) for name, n in (("clipped", SLOTS), ("clips", 3), ("variances", 2))}
    table = StepTable(timesteps, updates, np.full(evaluations, noise), 1.0, ones, ones, ones, **unclipped)
    texts = [
        Row({"context": random.standard_normal((77, channels)).astype(np.float32)}, float(weight))
        for weight in random.standard_normal(rows)
    ]
    draws = Draws(TorchGenerator(seed), (1, 4, height, width), table.draws) if noise else None
    latents = random.standard_normal((4, height, width)).astype(np.float32)
    return Job(latents, table, tuple(texts), step_inputs(table, STABLE_DIFFUSION["denoiser"]), draws)


def start(backend, jobs):
    """Lanes in which these jobs are."""
    lanes = backend.lanes(len(jobs), *jobs[0].latents.shape[1:])
    for lane, job in enumerate(jobs):
        lanes.admit(lane, job)
    return lanes


def run(backend, jobs):
    """The same after all their evaluations."""
    lanes = start(backend, jobs)
    for index in range(len(jobs[0].table)):
        lanes.step([index] * len(jobs))
    return lanes


def request_of(pipeline, options) -> Request:
    """The request that `Pipeline.__call__` makes of these arguments, for latents."""
    defaults = {name: one.default for name, one in inspect.signature(type(pipeline).__call__).parameters.items()}
    arguments = {**defaults, "output_type": "latent", "progress": False, **options}
    return Request.check(pipeline.limits, *[arguments[name] for name in defaults if name != "self"])
