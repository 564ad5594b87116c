"""The exporter: a model of torch and diffusers becomes a bundle."""

from .libraries import leave_nothing_behind

leave_nothing_behind()
