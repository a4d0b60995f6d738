"""The package as a whole: what importing it loads, and what it offers."""

import importlib
import inspect
import pickle
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

import tinkex_py
from tinkex_py import errors

PUBLIC = """
APIStatusError AdamParams AsyncRestClient AsyncSamplingClient AsyncServiceClient AsyncTrainingClient
Authentication BadRequest BaseLossOutput BillingRequired Checkpoint CheckpointPath ClientClosed ConfigError
Conflict ConnectionFailed CustomLossOutput Datum DownloadProgress DuplicateRegularizerNames EncodedTextChunk
Executor ForwardBackwardOutput GetInfoResponse GradientDiagnosis GradientTracker InPlaceMutation InvalidBaseLoss
InvalidData InvalidResponse InvalidSpec InvalidTermResult LoraConfig Metric MissingExtra ModelInput
NonFiniteLoss NotFound OptimStepResponse OptimizerParams PartialFailure PermissionDenied Pipeline PipelineError
PrecedingRequestFailed QueueState RateLimited Regularizer RegularizerError RegularizerOutput RegularizerSpec
RegularizerTimeout RequestFailed RequestInsideStep ResultLost RetryPolicy SampleResponse SampledSequence
SamplingParams SaveWeightsResponse SequenceLost ServerCapabilities ServerError SessionQuery SessionSummary
SurrogateMismatch TensorData Term TermResult TimeoutExceeded TinkexConfig TinkexError TrainingRun TransportError
Unprocessable UnsupportedFeature WeightController __version__ controllers execute packed_field per_datum
schedules split sum_over_datums telemetry
"""


def run(program: str) -> str:
    result = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_loads_neither_torch_nor_an_http_library():
    heavy = ("torch", "httpx", "httpcore", "transformers", "starlette", "uvicorn", "numpy", "pydantic")
    assert run(f"import sys, tinkex_py; print([name for name in {heavy!r} if name in sys.modules])") == "[]"


def test_talking_to_a_service_loads_no_torch_until_a_loss_is_composed():
    program = """
import sys
from tinkex_py import AsyncServiceClient, Datum, ModelInput, TinkexConfig, AdamParams
AsyncServiceClient(TinkexConfig(base_url="http://127.0.0.1:1", api_key="x"))
Datum(model_input=ModelInput.from_ints([1]), loss_fn_inputs={"target_tokens": [1]})
print("torch" in sys.modules)
"""
    assert run(program) == "False"


READY_MADE = {
    "regularizers": "Consistency ElasticNet Entropy GradientPenalty JensenShannon KLDivergence L1 L2 Orthogonality "
    "SampledEntropy SampledKL",
    "base_losses": "CISPO DPO ImportanceSampling NLL PPO",
}


@pytest.mark.parametrize("package", READY_MADE)
def test_ready_made_terms_are_public_and_loaded_when_used(package: str):
    module = importlib.import_module(f"tinkex_py.{package}")
    assert sorted(module.__all__) == READY_MADE[package].split()
    for name in module.__all__:
        assert inspect.getdoc(getattr(module, name)), name
    assert run(f"import sys, tinkex_py.{package}; print('torch' in sys.modules)") == "False"


def test_every_public_name_resolves():
    assert len(set(tinkex_py.__all__)) == len(tinkex_py.__all__)
    for name in tinkex_py.__all__:
        assert getattr(tinkex_py, name) is not None
    assert set(tinkex_py.__all__) <= set(dir(tinkex_py))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = tinkex_py.nonsense


def test_the_public_names_are_these():
    assert sorted(tinkex_py.__all__) == sorted(PUBLIC.split())


def test_all_errors_are_public():
    classes = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, errors.TinkexError)
    }
    assert classes <= set(tinkex_py.__all__)


def test_public_things_have_docstrings():
    for name in tinkex_py.__all__:
        value = getattr(tinkex_py, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name


def test_every_error_survives_pickling():
    made = [
        errors.APIStatusError("m", status=418, body={"a": 1}, attempts=3),
        errors.NotFound("m", status=404, request_id="r"),
        errors.RequestFailed("m", category="user", request_id="r", handed_over=(3, 4)),
        errors.PartialFailure("m", applied=[(0, 2)], missing=[(2, 3)], category="user", request_id="r"),
        errors.ResultLost("m", request_id="r"),
        errors.MissingExtra("peft", "local"),
        errors.DuplicateRegularizerNames(["a", "b"]),
        errors.RegularizerTimeout("m", name="kl", timeout=3.0),
        errors.NonFiniteLoss("m", name="kl"),
        errors.SequenceLost("m"),
    ]
    for error in made:
        error.accumulated = 2
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert "2 backward pass(es)" in str(again)
        assert vars(again) == vars(error)


def test_the_stdlib_classes_that_fit():
    pairs = {
        "ConfigError": ValueError,
        "InvalidData": ValueError,
        "MissingExtra": ImportError,
        "ConnectionFailed": ConnectionError,
        "TimeoutExceeded": TimeoutError,
        "PermissionDenied": PermissionError,
        "NotFound": LookupError,
        "RegularizerTimeout": TimeoutError,
        "InvalidSpec": ValueError,
        "InvalidBaseLoss": TypeError,
    }
    for name, base in pairs.items():
        assert issubclass(getattr(tinkex_py, name), base)


def test_the_version_is_the_distributions():
    from importlib.metadata import version

    assert version("tinkex-py") == tinkex_py.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", tinkex_py.__version__)


def required(extra: str | None) -> set[str]:
    """Names of the distributions that the package itself, or one of its extras, asks for."""
    names: set[str] = set()
    for line in requires("tinkex-py") or []:
        requirement, _, marker = line.partition(";")
        wanted = f"extra == '{extra}'" in marker.replace('"', "'") if extra else "extra" not in marker
        if wanted:
            names.add(re.split(r"[\s<>=!~\[]", requirement, maxsplit=1)[0])
    return names


def test_row_154_what_the_package_is_built_on():
    assert {"anyio", "httpx", "torch", "pydantic", "structlog", "tenacity"} <= required(None)


def test_row_155_the_suite_runs_in_strict_mode(request):
    assert "pytest-asyncio" in required("test")
    assert request.config.getini("asyncio_mode") == "strict"


def test_row_156_the_top_level():
    root = Path(__file__).parents[1]
    names = {path.name for path in root.iterdir()}
    assert {"pyproject.toml", "tinkex_py", "tests", "examples", "docs", "CHANGELOG.md"} <= names
    assert "src" not in names
    assert (root / "tinkex_py" / "__init__.py").is_file()


def test_the_package_is_typed():
    root = Path(tinkex_py.__file__).parent
    assert (root / "py.typed").exists()
    assert (root / "__init__.pyi").exists()


def test_both_sdks_live_in_one_process():
    program = """
import importlib
from tinkex_py.transport import wire
importlib.import_module("tinker.proto.tinker_public_pb2")
print(wire.ForwardBackwardRequest(model_id="m").model_id)
"""
    assert run(program) == "m"


def test_the_clients_offer_what_the_design_says():
    offered = {
        "AsyncServiceClient": [
            "aclose",
            "create_lora_training_client",
            "create_sampling_client",
            "create_training_client_from_state",
            "from_env",
            "get_server_capabilities",
            "local",
        ],
        "AsyncTrainingClient": [
            "accumulated",
            "aclose",
            "forward",
            "forward_backward",
            "forward_backward_custom",
            "get_info",
            "get_tokenizer",
            "load_state",
            "optim_step",
            "save_state",
            "save_weights_and_get_sampling_client",
        ],
        "AsyncSamplingClient": ["aclose", "sample"],
    }
    for name, members in offered.items():
        for member in members:
            assert hasattr(getattr(tinkex_py, name), member), f"{name}.{member}"
    signature = inspect.signature(tinkex_py.AsyncTrainingClient.forward_backward_custom)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    assert list(defaults)[1:3] == ["data", "base_loss"]
    expected = {
        "regularizers": (),
        "track_grad_norms": False,
        "parallel": True,
        "timeout": 30.0,
        "max_concurrency": 32,
        "max_threads": None,
    }
    assert {name: defaults[name] for name in expected} == expected
    assert all(signature.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in expected)
    created = inspect.signature(tinkex_py.AsyncServiceClient.create_lora_training_client).parameters
    assert {"base_model", "rank", "seed", "train_mlp", "train_attn", "train_unembed", "lora_config"} <= set(created)


def test_only_the_transport_knows_the_http_libraries():
    root = Path(tinkex_py.__file__).parent
    knowing = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if re.search(r"^\s*(import|from) (httpx|httpcore|h11)", path.read_text(), re.MULTILINE)
    }
    assert knowing == {f"transport/{name}.py" for name in ("adapters", "connections", "http")}
