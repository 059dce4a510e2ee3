"""Check the packages that some options require, before anything is loaded."""

import torch
from transformers import PreTrainedModel, Seq2SeqTrainingArguments, Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    is_azureml_available,
    is_flytekit_available,
)

from ..errors import UserError

# integration -> package, if the names differ
PACKAGES = {"comet_ml": "comet-ml", "azure_ml": "azureml-core", "flyte": "flytekit", "kubeflow": "kubeflow"}


def check_reporting(report_to: list[str]) -> None:
    """Raise `UserError` for an integration that transformers doesn't have, or whose package isn't installed."""
    available = set(get_available_reporting_integrations())
    # not in the list: flyte, and azure_ml if mlflow is installed
    available |= {"azure_ml"} if is_azureml_available() else set()
    available |= {"flyte"} if is_flytekit_available() else set()
    for name in report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"--report_to must be one of none, all, {', '.join(INTEGRATION_TO_CALLBACK)}, got {name!r}"
            )
        if name not in available:
            raise UserError(f"--report_to {name} requires a package: pip install {PACKAGES.get(name, name)}")


def check_optimizer(args: Seq2SeqTrainingArguments, model: PreTrainedModel) -> None:
    """Raise `UserError` if the optimizer or the schedule can't be created. Trainer would create them last."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"--optim {args.optim.value}: {_in_one_line(error)}") from error
    try:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
        options = args.lr_scheduler_kwargs or {}
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=dict(options))
    except (ValueError, TypeError) as error:
        name = args.lr_scheduler_type.value
        raise UserError(f"--lr_scheduler_type {name}: {_in_one_line(error)} (see --lr_scheduler_kwargs)") from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
