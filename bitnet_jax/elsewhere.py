"""The run of another framework as `forecast` reads it: its settings from a log, from flags or both.

Values are by the names of the flags of `bitnet predict`, without their dashes.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from bitnet_jax import forecast, shrink
from bitnet_jax.fields import UserError, shown

COUPLED = ("adam", "nadam", "radam", "adamax")  # in PyTorch these add the decay to the gradient
DEFAULTS = {  # torch's, and what is usual
    "weight_decay": 0.1,
    "decay_on": "all",
    "lr": None,
    "warmup": 0,
    "schedule": "constant",
    "steps": None,
    "betas": "0.9,0.999",
    "eps": 1e-8,
    "clip": math.inf,
    "tokens_per_batch": None,
    "init": None,
    "tied": False,
    "ternary": False,
    "width": None,
    "layers": 4,
    "ff": None,
}
NEEDED = ("lr", "steps", "width", "tokens_per_batch")
NUMBERS = {  # our name of a number by transformers': of TrainingArguments, and of a configuration
    "weight_decay": "weight_decay",
    "learning_rate": "lr",
    "warmup_steps": "warmup",
    "max_steps": "steps",
    "adam_epsilon": "eps",
    "max_grad_norm": "clip",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "intermediate_size": "ff",
}
WHOLE = ("warmup", "steps", "width", "layers", "ff")
MAY_BE_ZERO = ("weight_decay", "warmup")
BETAS = ("adam_beta1", "adam_beta2")
SCHEDULES = {"constant_with_warmup": "constant"} | {name: name for name in forecast.SCHEDULES}
TITLE = "what its decay was bound to do"


def family(name) -> str | None:
    """`adam` (decay inside) or `adamw` of an optimiser's name; None where it is neither."""
    last = str(name or "").lower().rpartition(".")[2]
    return "adamw" if "adamw" in last else "adam" if last in COUPLED else None


def couples(settings: dict) -> bool:
    """Whether the optimiser adds weight decay to the gradient that Adam normalises."""
    decay = settings.get("weight_decay", 0.0)
    return family(settings.get("optim")) == "adam" and isinstance(decay, int | float) and decay > 0


def of_log(settings: dict) -> dict:
    """What settings by transformers' names say; `auto`, -1 and their like say nothing."""
    values = {}
    for theirs, ours in NUMBERS.items():
        value = settings.get(theirs)
        if type(value) in (int, float) and math.isfinite(value):
            if ours == "warmup" and 0 < value < 1:  # a share of the steps, in transformers 5
                value = value * max(settings.get("max_steps", 0), 0)
            if value > 0 or (value == 0 and ours in MAY_BE_ZERO):
                values[ours] = round(value) if ours in WHOLE else value
    if kind := family(settings.get("optim")):
        values["optimizer"] = kind
    if (schedule := settings.get("lr_scheduler_type")) in SCHEDULES:
        values["schedule"] = SCHEDULES[schedule]
    if all(isinstance(settings.get(name), float) for name in BETAS):
        values["betas"] = ",".join(str(settings[name]) for name in BETAS)
    if isinstance(deviation := settings.get("initializer_range"), float) and deviation > 0:
        values["init"] = f"normal:{deviation:g}"
    if settings.get("tie_word_embeddings") in (True, 1.0):
        values["tied"] = True
    return values


def check(values: dict, rates_known: bool = False) -> None:
    """Raise UserError for what is missing or makes no run; `rates_known`: `lr` is not needed."""
    for name in NEEDED:
        if values.get(name) is None and not (name == "lr" and rates_known):
            raise UserError(f"{flag(name)} is missing: --optimizer needs it")
    check_ranges(values)


def check_ranges(values: dict) -> None:
    """Raise UserError for a value that makes no run."""
    values = DEFAULTS | values
    for name in ("lr", "weight_decay", "eps", "clip"):
        value = values[name]
        if value is not None and (math.isnan(value) or value < 0 or (name == "clip" and not value)):
            raise UserError(f"{flag(name)} {value:g}: must be positive")
    for name in ("steps", "width", "tokens_per_batch", "layers", "ff"):
        value = values[name]
        if value is not None and not 1 <= value < 2**31:
            raise UserError(f"{flag(name)} {value}: must lie in 1 .. {2**31 - 1}")
    if not 0 <= values["warmup"] <= (values["steps"] or math.inf):
        raise UserError(f"--warmup {values['warmup']}: must lie in 0 .. --steps {values['steps']}")
    pair(values["betas"])
    if values["init"]:
        _init(values["init"])


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def setting_of(
    values: dict, probs_V, context: float, points: Sequence[tuple[float, float]] = ()
) -> tuple[shrink.Setting, float]:
    """The setting that checked values describe on a text, and its decay inside Adam.

    `points`, pairs of step and rate, go before `lr` and `schedule`. Raises UserError.
    """
    v = DEFAULTS | values
    width, layers, steps = v["width"], v["layers"], v["steps"]
    if points:
        rates_T = forecast.rates_through(points, steps)
    else:
        rates_T = forecast.rates(v["schedule"], v["lr"], v["warmup"], steps)
    beta1, beta2 = pair(v["betas"])
    uniform, size = _init(v["init"] or f"uniform:{width**-0.5}")
    fan_in, fan_out = forecast.fans(width, layers, v["ff"] or 4 * width)
    rest = float(v["decay_on"] != "matrices")
    # torch's defaults: an embedding of N(0, 1), matrices that keep a third of a variance of 1.
    stream = math.sqrt((size**2 if v["tied"] else 1) + layers * 2 / 3)
    setting = shrink.Setting(
        probs_V, rates_T, np.ones(steps), width, v["tokens_per_batch"], fan_in, fan_out, size,
        uniform, context=context, stream=stream, ternary=v["ternary"], beta1=beta1, beta2=beta2,
        eps=v["eps"], clip=v["clip"], decay_head=rest, decay_norm=float(v["decay_on"] == "all"),
        decay_embedding=rest,
    )  # fmt: skip
    return setting, v["weight_decay"] if v["optimizer"] == "adam" else 0.0


def pair(text: str, what: str | None = None) -> tuple[float, float]:
    """Two numbers FIRST,SECOND: the betas, or `what` names them; raises UserError."""
    try:
        first, second = map(float, text.split(","))
    except ValueError:
        first = second = math.nan
    limit = math.inf if what else 1
    if not (0 <= first < math.inf and 0 <= second < limit and first < limit):
        raise UserError(f"{what or f'--betas {text}'}: use two numbers FIRST,SECOND")
    return first, second


def _init(text: str) -> tuple[bool, float]:
    """Whether an initialisation is uniform, and its bound or deviation; raises UserError."""
    kind, _, size = text.partition(":")
    try:
        value = float(size)
    except ValueError:
        value = math.nan
    if kind not in ("uniform", "normal") or not 0 < value < math.inf:
        raise UserError(f"--init {text}: use uniform:BOUND or normal:DEVIATION")
    return kind == "uniform", value


# ------------------------------------------------------------------- of a run that has been logged


def prediction(
    values: dict,
    points: Sequence[tuple[float, float]],
    text: Callable[[], tuple] | None,
    name: str | None = None,
) -> list[str]:
    """Lines of what `bitnet predict` says of a logged run, or one that names what it lacks.

    `values` as of a log and flags, `points` its learning rates, `text` gives the frequencies of
    its tokens and their context (`setting_of`), `name` is that of the optimiser. Nothing where no
    decay goes through Adam and something is missing. Raises UserError for values that make no run.
    """
    needed = [name for name in ("weight_decay", *NEEDED) if name != "lr" or not points]
    missing = [flag(name) for name in needed if values.get(name) is None]
    missing += ["--text or --counts"] if text is None else []
    kind = values.get("optimizer")
    check_ranges(values)
    if kind is None and name:
        return [f"{TITLE}: bitnet predict knows Adam and AdamW, not {shown(name)}"]
    if kind is None or (missing and (kind != "adam" or values.get("weight_decay") == 0)):
        return []
    if missing:
        return [f"{TITLE}: add {', '.join(missing)}; or {command(values)}"]
    setting, decay = setting_of(values, *text(), points)
    forecast_lines = forecast.terminal_lines(forecast.forecast(setting, decay))
    return [f"{TITLE} (as bitnet predict says it):", *forecast_lines]


def command(values: dict) -> str:
    """The `bitnet predict` of these values; capitals are for what is missing."""
    values = dict.fromkeys(NEEDED) | values
    words = ["bitnet predict --optimizer", str(values["optimizer"])]
    for name in DEFAULTS:
        value = values.get(name)
        if name in values and value is not False:
            words.append(flag(name))
            if value is None:
                words.append(name.upper())
            elif value is not True:
                words.append(f"{value:g}" if isinstance(value, float) else str(value))
    return " ".join([*words, "--counts FILE"])
