"""Routes of the protocol (JSON form) in front of a model class that has no server for a CPU.

Runs with the Python of a peer's venv, or with this package's own for a model that needs torch and peft alone:

    python thin_server.py PORT FOLDER twinkle|open-rl

`FOLDER/tiny-qwen3` is the base model, and checkpoints are written to `FOLDER/checkpoints`. Requests are executed in the
order in which they arrive. Every route calls the methods that the handlers of the real server call.
"""

import shutil
import sys
import traceback
from pathlib import Path
from typing import Any, Protocol

import fastapi
import torch
import uvicorn
from fastapi.responses import JSONResponse

MODEL = "tiny-qwen3"
LORA_DROPOUT = 0.05
SLOTS = 12


class Backend(Protocol):
    """What a model class can do; the results are the fields of the protocol."""

    version: str

    def create(self, model_id: str, lora: dict[str, Any]) -> None: ...
    def forward(self, model_id: str, data: list[Any], loss_fn: str) -> dict[str, Any]: ...
    def forward_backward(self, model_id: str, data: list[Any], loss_fn: str) -> dict[str, Any]: ...
    def optim_step(self, model_id: str, adam: dict[str, float]) -> dict[str, float]: ...
    def save(self, model_id: str, folder: Path, name: str) -> None: ...
    def load(self, model_id: str, folder: Path, name: str, *, optimizer: bool) -> None: ...
    def unload(self, model_id: str) -> None: ...


class Twinkle:
    """Twinkle's `TwinkleCompatTransformersModel` on the CPU, in float32, called as its handlers do.

    Its server needs Ray with a GPU.
    """

    def __init__(self, base: Path) -> None:
        import importlib.metadata

        import twinkle
        from twinkle.server.model.backends.transformers_model import TwinkleCompatTransformersModel
        from twinkle.utils.platforms import Platform

        self.version = f"twinkle-kit {importlib.metadata.version('twinkle-kit')} (its model class)"
        Platform.get_local_device = staticmethod(lambda *_args, **_options: "cpu")
        twinkle.initialize(mode="local")
        self._base = str(base)
        self._model = TwinkleCompatTransformersModel(
            model_id=self._base, mixed_precision="no", max_loras=SLOTS, max_r=32, torch_dtype=torch.float32
        )

    def create(self, model_id: str, lora: dict[str, Any]) -> None:
        from peft import LoraConfig

        config = LoraConfig(r=lora["rank"], target_modules="all-linear")
        self._model.add_adapter_to_model(adapter_name=model_id, config_or_dir=config)
        self._model.set_template("Template", adapter_name=model_id, model_id=self._base)
        self._model.set_processor("InputProcessor", adapter_name=model_id)
        self._model.set_optimizer("Adam", adapter_name=model_id)

    def forward(self, model_id: str, data: list[Any], loss_fn: str) -> dict[str, Any]:
        del loss_fn  # as its handler does
        outputs, loss = self._model.tinker_forward_only(inputs=self._datums(data), adapter_name=model_id)
        return self._answer("CrossEntropyLossReturn", outputs, loss)

    def forward_backward(self, model_id: str, data: list[Any], loss_fn: str) -> dict[str, Any]:
        outputs, loss = self._model.tinker_forward_backward(
            inputs=self._datums(data), adapter_name=model_id, loss_fn=loss_fn
        )
        name = "ImportanceSamplingLossReturn" if loss_fn == "importance_sampling" else "CrossEntropyLossReturn"
        return self._answer(name, outputs, loss)

    def optim_step(self, model_id: str, adam: dict[str, float]) -> dict[str, float]:
        from tinker import types

        self._model.tinker_step(adam_params=types.AdamParams(**adam), adapter_name=model_id)
        return self._model.tinker_calculate_metric(is_training=True, adapter_name=model_id)

    def save(self, model_id: str, folder: Path, name: str) -> None:
        self._model.save(name=name, output_dir=str(folder), adapter_name=model_id, save_optimizer=True)

    def load(self, model_id: str, folder: Path, name: str, *, optimizer: bool) -> None:
        self._model.load(name=name, output_dir=str(folder), adapter_name=model_id, load_optimizer=optimizer)

    def unload(self, model_id: str) -> None:
        self._model.remove_adapter(model_id)

    @staticmethod
    def _datums(data: list[Any]) -> list[Any]:
        from tinker import types

        return [types.Datum.model_validate(one) for one in data]

    @staticmethod
    def _answer(name: str, outputs: list[Any], loss: float) -> dict[str, Any]:
        from tinker import types

        answer = types.ForwardBackwardOutput(
            loss_fn_output_type=name, loss_fn_outputs=outputs, metrics={"loss:avg": loss}
        )
        return answer.model_dump(mode="json")


class OpenRL:
    """What newer code of open-rl computes, which has no package: a forward pass is in eval mode, a backward pass in
    train mode, with a `lora_dropout` of 0.05."""

    version = "open-rl's way of its passes, in torch and peft"

    def __init__(self, base: Path) -> None:
        import transformers

        self._base = base
        self._transformers = transformers
        self._models: dict[str, tuple[Any, torch.optim.AdamW]] = {}

    def create(self, model_id: str, lora: dict[str, Any]) -> None:
        from peft import LoraConfig, get_peft_model

        base = self._transformers.AutoModelForCausalLM.from_pretrained(self._base, dtype=torch.float32)
        if lora.get("seed") is not None:
            torch.manual_seed(lora["seed"])
        config = LoraConfig(
            r=lora["rank"], target_modules="all-linear", lora_dropout=LORA_DROPOUT, task_type="CAUSAL_LM"
        )
        model = get_peft_model(base, config)
        self._models[model_id] = model, torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])

    def forward(self, model_id: str, data: list[Any], loss_fn: str) -> dict[str, Any]:
        model, _ = self._models[model_id]
        model.eval()
        with torch.no_grad():
            return self._answer(*self._passed(model, data, loss_fn))

    def forward_backward(self, model_id: str, data: list[Any], loss_fn: str) -> dict[str, Any]:
        model, _ = self._models[model_id]
        model.train()
        logprobs, loss = self._passed(model, data, loss_fn)
        loss.backward()
        return self._answer(logprobs, loss)

    def optim_step(self, model_id: str, adam: dict[str, float]) -> dict[str, float]:
        model, optimizer = self._models[model_id]
        weights = [one for one in model.parameters() if one.requires_grad]
        limit = adam.get("grad_clip_norm", 0.0)
        metrics = {"grad_norm": float(torch.nn.utils.clip_grad_norm_(weights, limit))} if limit > 0 else {}
        for group in optimizer.param_groups:
            group |= {
                "lr": adam["learning_rate"],
                "betas": (adam["beta1"], adam["beta2"]),
                "eps": adam["eps"],
                "weight_decay": adam.get("weight_decay", 0.0),
            }
        optimizer.step()
        optimizer.zero_grad()
        return metrics

    def save(self, model_id: str, folder: Path, name: str) -> None:
        model, optimizer = self._models[model_id]
        model.save_pretrained(folder / name)
        torch.save(optimizer.state_dict(), folder / name / "optimizer.pt")

    def load(self, model_id: str, folder: Path, name: str, *, optimizer: bool) -> None:
        from peft import load_peft_weights, set_peft_model_state_dict

        model, own = self._models[model_id]
        set_peft_model_state_dict(model, load_peft_weights(str(folder / name), device="cpu"))
        if optimizer:
            own.load_state_dict(torch.load(folder / name / "optimizer.pt", weights_only=True))

    def unload(self, model_id: str) -> None:
        del self._models[model_id]

    def _passed(self, model: Any, data: list[Any], loss_fn: str) -> tuple[list[torch.Tensor], torch.Tensor]:
        rows = []
        total = torch.zeros(())
        for one in data:
            ids = torch.tensor([[token for chunk in one["model_input"]["chunks"] for token in chunk["tokens"]]])
            inputs = {name: torch.tensor(field["data"]) for name, field in one["loss_fn_inputs"].items()}
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
            own = logprobs.gather(1, inputs["target_tokens"].reshape(-1, 1)).squeeze(1)
            if loss_fn == "cross_entropy":
                total = total - (own * inputs.get("weights", torch.ones(()))).sum()
            else:
                ratio = (own - inputs["logprobs"]).exp()
                surrogate = {
                    "importance_sampling": ratio * inputs["advantages"],
                    "ppo": torch.minimum(ratio * inputs["advantages"], ratio.clamp(0.8, 1.2) * inputs["advantages"]),
                    "cispo": ratio.detach().clamp(0.0, 4.0) * own * inputs["advantages"],
                }
                total = total - surrogate[loss_fn].sum()
            rows.append(own.detach())
        return rows, total

    @staticmethod
    def _answer(logprobs: list[torch.Tensor], loss: torch.Tensor) -> dict[str, Any]:
        fields = [{"data": row.tolist(), "dtype": "float32", "shape": [len(row)]} for row in logprobs]
        outputs = [{"logprobs": field} for field in fields]
        return {"loss_fn_output_type": "scalar", "loss_fn_outputs": outputs, "metrics": {"loss:sum": float(loss)}}


class Server:
    """The state behind the routes."""

    def __init__(self, backend: Backend, folder: Path) -> None:
        self.backend = backend
        self.checkpoints = folder / "checkpoints"
        self.checkpoints.mkdir(exist_ok=True)
        self.results: list[dict[str, Any]] = []
        self.runs: dict[str, int] = {}

    def submitted(self, model_id: str, work: Any) -> dict[str, Any]:
        """Does the work at once, and keeps its result for `retrieve_future`."""
        try:
            self.results.append(work())
        except Exception as error:  # noqa: BLE001  # whatever the model class raises is the result
            traceback.print_exc()
            self.results.append({"error": f"{type(error).__name__}: {error}", "category": "server"})
        return {"request_id": str(len(self.results) - 1), "model_id": model_id}

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["base_model"] != MODEL:
            raise fastapi.HTTPException(404, f"model {body['base_model']!r} is not served here")
        model_id = f"model-{len(self.runs)}"
        self.runs[model_id] = body["lora_config"]["rank"]

        def work() -> dict[str, Any]:
            self.backend.create(model_id, body["lora_config"])
            return {"model_id": model_id, "type": "create_model"}

        return self.submitted(model_id, work)

    def save(self, body: dict[str, Any]) -> dict[str, Any]:
        model_id, name = body["model_id"], body["path"]

        def work() -> dict[str, Any]:
            (self.checkpoints / model_id).mkdir(exist_ok=True)
            self.backend.save(model_id, self.checkpoints / model_id, name)
            return {"path": f"tinker://{model_id}/weights/{name}", "type": "save_weights"}

        return self.submitted(model_id, work)

    def load(self, body: dict[str, Any]) -> dict[str, Any]:
        if "model_id" not in body:
            raise fastapi.HTTPException(
                422, [{"type": "missing", "loc": ["body", "model_id"], "msg": "Field required"}]
            )
        run, _, name = body["path"].removeprefix("tinker://").split("/")

        def work() -> dict[str, Any]:
            self.backend.load(body["model_id"], self.checkpoints / run, name, optimizer=body.get("optimizer", False))
            return {"path": body["path"], "type": "load_weights"}

        return self.submitted(body["model_id"], work)


def application(server: Server) -> fastapi.FastAPI:
    """Returns the routes. Bodies of other types than JSON are refused with 422, as FastAPI does."""
    app = fastapi.FastAPI()
    post, backend = app.post, server.backend

    @app.get("/api/v1/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok"}

    @app.get("/api/v1/get_server_capabilities")
    async def capabilities() -> dict[str, Any]:
        models = [{"model_name": MODEL, "trainable": True, "sampleable": False}]
        return {"supported_models": models, "version": backend.version}

    @post("/api/v1/create_session")
    async def create_session() -> dict[str, Any]:
        return {"session_id": "session-0", "type": "create_session"}

    @post("/api/v1/session_heartbeat")
    async def heartbeat() -> dict[str, Any]:
        return {"type": "session_heartbeat"}

    @post("/api/v1/create_model")
    async def create_model(body: dict[str, Any]) -> dict[str, Any]:
        return server.create(body)

    @post("/api/v1/get_info")
    async def get_info(body: dict[str, Any]) -> dict[str, Any]:
        known = {"model_name": MODEL, "model_data": {"model_name": MODEL}, "is_lora": True}
        return {**known, "model_id": body["model_id"], "lora_rank": server.runs[body["model_id"]], "type": "get_info"}

    @post("/api/v1/unload_model")
    async def unload_model(body: dict[str, Any]) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            backend.unload(body["model_id"])
            return {"model_id": body["model_id"], "type": "unload_model"}

        return server.submitted(body["model_id"], work)

    @post("/api/v1/forward")
    async def forward(body: dict[str, Any]) -> dict[str, Any]:
        known(server, body["model_id"])
        given = body["forward_input"]
        return server.submitted(
            body["model_id"], lambda: backend.forward(body["model_id"], given["data"], given["loss_fn"])
        )

    @post("/api/v1/forward_backward")
    async def forward_backward(body: dict[str, Any]) -> dict[str, Any]:
        known(server, body["model_id"])
        given = body["forward_backward_input"]
        return server.submitted(
            body["model_id"], lambda: backend.forward_backward(body["model_id"], given["data"], given["loss_fn"])
        )

    @post("/api/v1/optim_step")
    async def optim_step(body: dict[str, Any]) -> dict[str, Any]:
        known(server, body["model_id"])
        return server.submitted(
            body["model_id"], lambda: {"metrics": backend.optim_step(body["model_id"], body["adam_params"])}
        )

    @post("/api/v1/save_weights")
    async def save_weights(body: dict[str, Any]) -> dict[str, Any]:
        return server.save(body)

    @post("/api/v1/load_weights")
    async def load_weights(body: dict[str, Any]) -> dict[str, Any]:
        return server.load(body)

    @app.delete("/api/v1/training_runs/{run}/checkpoints/weights/{name}")
    async def delete_checkpoint(run: str, name: str) -> dict[str, Any]:
        if run not in server.runs or not (server.checkpoints / run / Path(name).name).is_dir():
            raise fastapi.HTTPException(404, f"checkpoint {name!r} of run {run!r} not found")
        shutil.rmtree(server.checkpoints / run / Path(name).name)
        return {}

    @post("/api/v1/weights_info")
    async def weights_info(body: dict[str, Any]) -> dict[str, Any]:
        run = body["tinker_path"].removeprefix("tinker://").partition("/")[0]
        return {"base_model": MODEL, "is_lora": True, "lora_rank": server.runs[run]}

    @post("/api/v1/retrieve_future")
    async def retrieve_future(body: dict[str, Any]) -> JSONResponse:
        return JSONResponse(server.results[int(body["request_id"])])

    return app


def known(server: Server, model_id: str) -> None:
    if model_id not in server.runs:
        raise fastapi.HTTPException(404, f"Model {model_id!r} not found")


def main(port: str, folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    base = Path(folder) / MODEL
    backend: Backend = Twinkle(base) if kind == "twinkle" else OpenRL(base)
    uvicorn.run(application(Server(backend, Path(folder))), host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
