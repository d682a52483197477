"""Noise schedules from a strange configuration, checked before anything is allocated."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from harness.diffusion.model_files import CheckpointError, ModelFiles

LEAST_T, MOST_T = 2, 10_000  # timesteps
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
PREDICTIONS = ("epsilon", "v_prediction")
OF_BETAS = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
    "LCMScheduler",
)  # each gives ᾱ_t as DDPMScheduler does for the same betas; they differ in how they sample
READ = (*OF_BETAS, "ScoreSdeVeScheduler", "FlowMatchEulerDiscreteScheduler")
OF_SIGMAS = {
    "EDMEulerScheduler": "EDM",
    "EDMDPMSolverMultistepScheduler": "EDM",
    "CosineDPMSolverMultistepScheduler": "EDM",
    "KarrasVeScheduler": "EDM",
    "CMStochasticIterativeScheduler": "consistency models",
}  # scheduler → whose convention its network follows: σ without betas, scaled inputs, another number than t
ZERO_SNR = "rescale_betas_zero_snr"
ORDERS, MOST_ORDER = ("solver_order", "predictor_order", "corrector_order"), 10  # of answers that a solver keeps
LEAST_SCALING = 10.0  # of an LCMScheduler's timesteps; diffusers' default


def read(files: ModelFiles, folder: str, cls: str) -> Any:
    """The diffusers scheduler `cls` of a scheduler_config.json. Raises CheckpointError."""
    import diffusers

    name = f"{folder}/scheduler_config.json" if folder else "scheduler_config.json"
    if name not in files:
        raise CheckpointError(f"{files.path(folder)}: no scheduler_config.json; fetch it again")
    config = files.configuration(name)
    wrong = _foreign(config) or _fault(config, cls)
    if wrong:
        raise CheckpointError(f"{files.path(name)}: {wrong}")
    owner: Any = getattr(diffusers, cls)
    try:
        made = owner.from_config(_for_all(config, owner))
    except Exception as error:  # a dozen types for arguments that do not fit
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{files.path(name)}: describes no {cls}: {said}") from None
    if type(made) is not owner:
        raise CheckpointError(f"{files.path(name)}: describes a {type(made).__name__}, model_index.json a {cls}")
    signal = getattr(made, "alphas_cumprod", None)
    if signal is not None and not bool(((signal >= 0) & (signal <= 1)).all()):
        raise CheckpointError(f"{files.path(name)}: its betas give no noise schedule (ᾱ outside 0 to 1)")
    if signal is not None and not signal[-1] < 1:
        raise CheckpointError(f"{files.path(name)}: its betas add no noise (ᾱ is 1 at the last timestep)")
    return made


def refusal(cls: str) -> str:
    """Why a class of schedulers that is not in READ is not read, in words that follow its name."""
    if cls in OF_SIGMAS:
        return f"its noise levels are not those of betas; models of {OF_SIGMAS[cls]} are not supported"
    return f"supported: {', '.join(READ)}"


def _for_all(config: Mapping[str, Any], owner: Any) -> dict[str, Any]:
    """The configuration, from which every scheduler of diffusers makes the noise levels that `owner` makes.

    A class that does not know `rescale_betas_zero_snr` ignores it, but keeps it for others, such as a sampler's, which
    then rescale. Betas on a sigmoid are known to DDPMScheduler alone; as `trained_betas` all classes take them.
    """
    told = dict(config)
    if ZERO_SNR not in inspect.signature(owner.__init__).parameters:
        told.pop(ZERO_SNR, None)
    if told.get("beta_schedule") == "sigmoid" and told.get("trained_betas") is None:
        told["trained_betas"] = owner.from_config({**told, ZERO_SNR: False}).betas.tolist()
    return told


def _foreign(config: Mapping[str, Any]) -> str | None:
    """What is wrong with the class that a configuration names, which may be another scheduler of diffusers."""
    import diffusers

    said = config.get("_class_name", "DDPMScheduler")
    if isinstance(said, str) and said.endswith("Scheduler") and said in dir(diffusers):
        return None
    return f"{said!r} is no scheduler of diffusers"


def _fault(config: Mapping[str, Any], cls: str) -> str | None:
    """What keeps a configuration from being a noise schedule, in words."""
    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or not LEAST_T <= steps <= MOST_T:
        return f"num_train_timesteps is {steps!r}; it should be a whole number of {LEAST_T} to {MOST_T:,}"
    if cls == "ScoreSdeVeScheduler":
        low, high = config.get("sigma_min", 0.01), config.get("sigma_max", 1348.0)
        fine = is_number(low) and is_number(high) and 0 < low < high <= 1e6
        return (
            None if fine else f"sigma_min and sigma_max are {low!r} and {high!r}; 0 < sigma_min < sigma_max is needed"
        )
    if cls.startswith("FlowMatch"):
        return _fault_of_a_flow(config)
    return _fault_of_betas(config, steps) or _other_answer(config, cls)


def _fault_of_betas(config: Mapping[str, Any], steps: int) -> str | None:
    for name in ("beta_start", "beta_end"):
        beta = config.get(name, 0.02)
        if not (is_number(beta) and 0 < beta < 1):
            return f"{name} is {beta!r}; it should lie between 0 and 1"
    betas = config.get("trained_betas")
    if betas is not None and not (
        isinstance(betas, list) and len(betas) == steps and all(is_number(b) and 0 <= b <= 1 for b in betas)
    ):
        return f"trained_betas should be {steps} numbers of 0 to 1"
    if config.get("beta_schedule", "linear") not in BETA_SCHEDULES:
        return f"no beta_schedule {config['beta_schedule']!r}; supported: {', '.join(BETA_SCHEDULES)}"
    if config.get("prediction_type", "epsilon") not in PREDICTIONS:
        return f"prediction_type {config['prediction_type']!r} is not supported; supported: {', '.join(PREDICTIONS)}"
    wrong = [n for n in ORDERS if n in config and not (type(config[n]) is int and 1 <= config[n] <= MOST_ORDER)]
    return f"{wrong[0]} is {config[wrong[0]]!r}; it should be a whole number of 1 to {MOST_ORDER}" if wrong else None


def _other_answer(config: Mapping[str, Any], cls: str) -> str | None:
    """What makes the network's levels, its time or its answer another than betas and `prediction_type` say."""
    if config.get("use_flow_sigmas"):
        return (
            "use_flow_sigmas gives the noise levels of a flow instead of those of betas; such models are not supported"
        )
    if config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        return "a network that takes log σ instead of t (timestep_type continuous) is not supported"
    scaling = config.get("timestep_scaling", LEAST_SCALING)
    if cls == "LCMScheduler" and not (is_number(scaling) and scaling >= LEAST_SCALING):
        return (
            f"timestep_scaling is {scaling!r}; below {LEAST_SCALING:g} the answer of a consistency model is not "
            "noise, and such models are not supported"
        )
    return None


EVEN = "bench_even_levels"  # in the config of FLUX's schedule while it is in memory: levels from 1 to 1/steps
DYNAMIC = "use_dynamic_shifting"
OTHER_LEVELS = ("invert_sigmas", "shift_terminal", "use_karras_sigmas",
                "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling")  # fmt: skip
MOST_SHIFT = 1000


DYNAMIC_SHIFT = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}


def at_size(scheduler: Any, patches: int) -> Any:
    """The schedule of FLUX at a fixed number of patches, as diffusers' FluxPipeline has it there.

    With `use_dynamic_shifting` the shift is e^μ, or μ if it is linear, where μ runs from `base_shift` to `max_shift` as
    the patches run from `base_image_seq_len` to `max_image_seq_len`; else it is the scheduler's own. Raises ValueError
    for a shift out of proportion.
    """
    config = scheduler.config
    shift = float(config.shift)
    if config.get(DYNAMIC):
        low, high, first, last = (config.get(name, usual) for name, usual in DYNAMIC_SHIFT.items())
        if first == last:
            raise ValueError(f"base_image_seq_len and max_image_seq_len are both {first}; its shift is not known")
        mu = low + (high - low) * (patches - first) / (last - first)
        linear = config.get("time_shift_type") == "linear"
        shift = mu if linear else math.exp(min(mu, 50.0))
    if not 0 < shift <= MOST_SHIFT:
        raise ValueError(
            f"its shift at {patches:,} patches is {shift:.3g}; it should be above 0 and at most {MOST_SHIFT}"
        )
    made = type(scheduler).from_config(config, shift=shift, use_dynamic_shifting=False)
    made.register_to_config(**{EVEN: True})
    return made


def as_saved(scheduler: Any, dynamic_shift: float | None) -> Any:
    """The scheduler that a pipeline's directory has, of one that `at_size` made; any other as it is.

    dynamic_shift: as in DiffusionModel.
    """
    if not scheduler.config.get(EVEN):
        return scheduler
    config = {key: value for key, value in scheduler.config.items() if key != EVEN}
    changed = {} if dynamic_shift is None else {"shift": dynamic_shift, DYNAMIC: True}
    return type(scheduler).from_config({**config, **changed})


def _fault_of_a_flow(config: Mapping[str, Any]) -> str | None:
    """The same for a flow, whose levels are σ = shift s / (1 + (shift - 1) s) for s = t/T."""
    shift = config.get("shift", 1.0)
    if not (is_number(shift) and 0 < shift <= MOST_SHIFT):
        return f"shift is {shift!r}; it should be above 0 and at most {MOST_SHIFT}"
    for name, usual in DYNAMIC_SHIFT.items():
        value = config.get(name, usual)
        if not (is_number(value) and 0 < value <= 2**20):
            return f"{name} is {value!r}; it should be above 0"
    others = [name for name in OTHER_LEVELS if config.get(name)]
    return f"{others[0]} gives a flow other levels than shift does; such models are not supported" if others else None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
