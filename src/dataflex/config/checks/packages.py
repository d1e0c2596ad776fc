"""Checks of the packages that keys need. Packages are looked up, never imported."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from packaging.requirements import Requirement

from dataflex.config.arguments import required_packages
from dataflex.config.checks.values import truthy, word
from dataflex.config.loading import RunConfig
from dataflex.errors import Problem, unknown

TRACKERS: dict[str, tuple[str, ...]] = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub", "mlflow"),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard",),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Value of ``report_to`` -> modules that the tracker's callback imports."""

_BITSANDBYTES = (
    "adamw_bnb_8bit", "adamw_8bit", "ademamix", "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit",
    "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit",
    "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
)  # fmt: skip
_GALORE = (
    "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
)  # fmt: skip
OPTIMIZERS: dict[str, str] = {
    **dict.fromkeys(_BITSANDBYTES, "bitsandbytes"),
    **dict.fromkeys(_GALORE, "galore_torch"),
    **dict.fromkeys(("apollo_adamw", "apollo_adamw_layerwise"), "apollo_torch"),
    **dict.fromkeys(("lomo", "adalomo"), "lomo_optim"),
    **dict.fromkeys(("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"), "schedulefree"),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), "torchao"),
    "adamw_apex_fused": "apex",
    "adamw_anyprecision": "torchdistx",
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "grokadamw": "grokadamw",
    "stable_adamw": "optimi",
}
"""Value of ``optim`` -> module of the optimizer. All other optimizers are part of PyTorch or transformers."""

VALUES: dict[str, dict[str, str]] = {
    "optim": OPTIMIZERS,
    "flash_attn": {"fa2": "flash_attn", "fa3": "flash_attn_interface"},
    "fp8_backend": {"torchao": "torchao", "te": "transformer_engine", "msamp": "msamp"},
}
"""Key -> value -> module that the value needs."""

QUANTIZATION = {"bnb": "bitsandbytes", "hqq": "hqq", "eetq": "eetq"}
"""Value of ``quantization_method`` -> module that quantizes a model while it is loaded."""

FLAGS = {
    "use_liger_kernel": "liger_kernel",
    "use_hyper_parallel": "hyper_parallel",
}
"""Key -> module that it needs if it is true. LLaMA-Factory's own parser checks further packages."""

_INSTALL = {
    "flash_attn_interface": "flash-attn", "optimi": "torch-optimi", "azureml": "azureml-core",
    "comet_ml": "comet-ml", "galore_torch": "galore-torch", "apollo_torch": "apollo-torch", "flash_attn": "flash-attn",
    "liger_kernel": "liger-kernel", "transformer_engine": "transformer-engine",
    "lomo_optim": "lomo-optim",
}  # fmt: skip
"""Module -> name of its package, if the two names differ."""


def problems_of_packages(config: RunConfig) -> Iterator[Problem]:
    """Yield a problem for each key that needs packages which are not installed."""
    yield from _trackers(config)
    for key, values in VALUES.items():
        value = word(config, key, "")
        if value in values and not _there(values[value]):
            yield Problem(key, f"{value} needs the package {_name(values[value])}{_missing(values[value])}")
    for key, module in FLAGS.items():
        if truthy(config, key) and not _there(module):
            yield Problem(key, f"needs the package {_name(module)}{_missing(module)}")
    method = word(config, "quantization_method", "bnb")
    if truthy(config, "quantization_bit") and method in QUANTIZATION and not _there(QUANTIZATION[method]):
        module = QUANTIZATION[method]
        yield Problem("quantization_bit", f"with quantization_method: {method} needs {module}{_missing(module)}")
    yield from _required(config)


def _trackers(config: RunConfig) -> Iterator[Problem]:
    given = config.llamafactory.get("report_to")
    words = given.split(",") if isinstance(given, str) else given if isinstance(given, list) else []
    for name in (str(each).strip() for each in words):
        if name in ("all", "none", ""):
            continue
        if name not in TRACKERS:
            yield Problem("report_to", unknown("tracker", name, [*TRACKERS, "all", "none"]))
            continue
        modules = [module for module in TRACKERS[name] if not _there(module)]
        # transformers accepts either of the two packages.
        if name == "tensorboard" and _there("tensorboardX"):
            modules = []
        if modules:
            names = " and ".join(map(_name, modules))
            yield Problem("report_to", f"{name} needs the package {names}{_missing(*modules)} Or set report_to: none.")
    if isinstance(given, str) and "," in given:
        yield Problem("report_to", f"several trackers must be a list, got {given!r}; write [{given}].")


def _required(config: RunConfig) -> Iterator[Problem]:
    """Yield the missing packages that LLaMA-Factory's own parser requires, all packages of a key together."""
    missing: dict[str, list[str]] = {}
    for key, text in required_packages():
        if truthy(config, key) and not _satisfied(text):
            missing.setdefault(key, []).append(text)
    for key, texts in missing.items():
        packages = f"{'package' if len(texts) == 1 else 'packages'} {' and '.join(texts)}"
        command = f"pip install {' '.join(map(_quoted, texts))}"
        yield Problem(key, f"needs the {packages}, not installed here; run {command}.")


@cache
def _there(module: str) -> bool:
    return find_spec(module) is not None


def _satisfied(text: str) -> bool:
    requirement = Requirement(text)
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def _name(module: str) -> str:
    return _INSTALL.get(module, module)


def _missing(*modules: str) -> str:
    return f", which is not installed; run pip install {' '.join(map(_name, modules))}."


def _quoted(text: str) -> str:
    return f"'{text}'" if ">" in text else text
