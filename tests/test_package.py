"""The package as a whole: what an import loads, and the public names."""

import importlib
import inspect
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest

import tinkex_py

PUBLIC = """
APIStatusError AdamParams AsyncRestClient AsyncSamplingClient AsyncServiceClient AsyncTrainingClient
Authentication BadRequest BaseLossOutput BillingRequired Checkpoint CheckpointPath ClientClosed ConfigError
Conflict ConnectionFailed CustomLossOutput Datum DmelChunk DownloadProgress DuplicateRegularizerNames EncodedTextChunk
Executor ForwardBackwardOutput GetInfoResponse GradientDiagnosis GradientTracker InPlaceMutation InvalidBaseLoss
ImageAssetPointerChunk ImageChunk
InvalidData InvalidResponse InvalidSpec InvalidTermResult LoraConfig Metric MissingEndpoint MissingExtra ModelInput
NonFiniteLoss NotFound OptimStepResponse OptimizerParams PartialFailure PermissionDenied Pipeline PipelineError
PrecedingRequestFailed PromptProvenanceSpan QueueState RateLimited Regularizer RegularizerError
RegularizerOutput RegularizerSpec RegularizerTimeout RequestFailed RequestInsideStep ResultLost RetryPolicy
SampleResponse SampledProvenanceSpan SampledSequence SamplingParams SaveWeightsResponse Scored SequenceLost
ServerCapabilities ServerError SessionQuery SessionSummary
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


def test_a_client_loads_no_torch_until_a_loss_is_composed():
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
    "base_losses": "CISPO CPO Choice ClipCov Corrected DFT DPO DPOP DRO Distillation EAFT Focal GMPO GSPO Hinge IPO "
    "ImportanceSampling KLCov KTO MaskedIS NLL ORPO OffPolicyMask PPO ProbabilityMask Reinforce Rejection "
    "SAPO SLiC SimPO TOPR TruncatedIS Unlikelihood VESPO group_advantages in_varied_groups "
    "overlong_penalty",
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
        value = getattr(tinkex_py, name)
        assert value is not None
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name
    assert set(tinkex_py.__all__) <= set(dir(tinkex_py))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = tinkex_py.nonsense


def test_the_public_names_are_these():
    assert sorted(tinkex_py.__all__) == sorted(PUBLIC.split())


def test_the_version_is_the_distributions():
    from importlib.metadata import version

    assert version("tinkex-py") == tinkex_py.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", tinkex_py.__version__)


def required(extra: str | None) -> set[str]:
    """Names of the distributions that the package itself, or one of its extras, requires."""
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


def test_the_source_distribution_holds_what_a_wheel_needs_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = Path(__file__).parents[1]
    backend = importlib.import_module(
        tomllib.loads((root / "pyproject.toml").read_text())["build-system"]["build-backend"]
    )
    monkeypatch.chdir(root)
    archive = tmp_path / backend.build_sdist(str(tmp_path))
    assert archive.stat().st_size < 1.5e6
    with tarfile.open(archive) as opened:
        for member in opened:  # `filter=` of `extractall` is newer than Python 3.11.2
            (tmp_path / member.name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / member.name).write_bytes(opened.extractfile(member).read())
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    documents = {"CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md"}
    assert {path.name for path in unpacked.iterdir()} == {
        *("tinkex_py", "examples", "pyproject.toml", ".gitignore"),
        *documents,
    }
    assert {path.name for path in (unpacked / "examples").iterdir()} == {"data"}  # a part of the wheel
    monkeypatch.chdir(unpacked)
    with zipfile.ZipFile(tmp_path / backend.build_wheel(str(tmp_path))) as wheel:
        names = set(wheel.namelist())
    package = (path.relative_to(root) for path in (root / "tinkex_py").rglob("*") if path.is_file())
    expected = {path.as_posix() for path in package if path.suffix != ".pyc"}
    assert expected <= names
    assert {"tinkex_py/demo/data/instructions.jsonl", "tinkex_py/demo/data/held_out.jsonl"} <= names
