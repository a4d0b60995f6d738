"""AdamW over one adapter, with parameters given at every step."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tinkex_py.errors import InvalidData
from tinkex_py.local.lora import Adapter
from tinkex_py.types import AdamParams

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class AdapterOptimizer:
    """torch.optim.AdamW with the adapter's gradients handed in and its state handed out by name."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._adamw = torch.optim.AdamW(adapter.parameters.values(), lr=0.0)

    def step(self, settings: AdamParams) -> dict[str, float]:
        """Consume the summed gradients and change the weights.

        Without gradients nothing changes and no moment decays.

        Returns:
            grad_norm: global L2 norm before clipping.

        Raises:
            InvalidData: a gradient is not finite; the gradients are dropped and the weights stay.
        """
        gradients = self._adapter.take_gradients()
        if not gradients:
            return {"grad_norm": 0.0}
        norm = math.sqrt(sum(float(gradient.double().square().sum().item()) for gradient in gradients.values()))
        if not math.isfinite(norm):
            raise InvalidData(
                f"the gradient norm is {norm}: the gradients were dropped and the weights left as they were"
            )
        scale = min(1.0, settings.grad_clip_norm / norm) if settings.grad_clip_norm > 0 and norm > 0 else 1.0
        for group in self._adamw.param_groups:
            group["lr"] = settings.learning_rate
            group["betas"] = (settings.beta1, settings.beta2)
            group["eps"] = settings.eps
            group["weight_decay"] = settings.weight_decay
        for key, parameter in self._adapter.parameters.items():
            parameter.grad = gradients[key] if scale == 1.0 else gradients[key].mul_(scale)
        self._adamw.step()  # pyright: ignore[reportUnknownMemberType]
        self._adamw.zero_grad(set_to_none=True)
        self._adapter.version += 1
        return {"grad_norm": norm}

    def state(self) -> dict[str, Tensor]:
        """A copy of the moments on the CPU; empty before the first step."""
        return {
            f"{key}/{moment}": self._adamw.state[parameter][moment].detach().cpu().clone()
            for key, parameter in self._adapter.parameters.items()
            if parameter in self._adamw.state
            for moment in _MOMENTS
        }

    def set_state(self, saved: Mapping[str, Tensor]) -> None:
        """Restore what `state` handed out.

        Raises:
            InvalidData: it belongs to another adapter.
        """
        if not saved:
            return
        for key, parameter in self._adapter.parameters.items():
            missing = [moment for moment in _MOMENTS if f"{key}/{moment}" not in saved]
            if missing:
                raise InvalidData(f"the checkpoint's optimizer state lacks {missing} of {key}")
            if any(saved[f"{key}/{moment}"].shape != parameter.shape for moment in _MOMENTS if moment != "step"):
                raise InvalidData(f"the checkpoint's optimizer state of {key} has another shape than the weights")
            self._adamw.state[parameter] = {
                # AdamW keeps its step counter on the CPU whatever the device.
                moment: saved[f"{key}/{moment}"].clone().to("cpu" if moment == "step" else parameter.device)
                for moment in _MOMENTS
            }
