"""The public names. `__init__.py` loads each of them at its first use; type checkers read them here."""

from . import telemetry as telemetry
from .client import (
    AsyncSamplingClient as AsyncSamplingClient,
    AsyncServiceClient as AsyncServiceClient,
    AsyncTrainingClient as AsyncTrainingClient,
)
from .config import (
    TinkexConfig as TinkexConfig,
)
from .errors import (
    APIStatusError as APIStatusError,
    Authentication as Authentication,
    BadRequest as BadRequest,
    BillingRequired as BillingRequired,
    ClientClosed as ClientClosed,
    ConfigError as ConfigError,
    Conflict as Conflict,
    ConnectionFailed as ConnectionFailed,
    DuplicateRegularizerNames as DuplicateRegularizerNames,
    InPlaceMutation as InPlaceMutation,
    InvalidBaseLoss as InvalidBaseLoss,
    InvalidData as InvalidData,
    InvalidResponse as InvalidResponse,
    InvalidSpec as InvalidSpec,
    InvalidTermResult as InvalidTermResult,
    MissingExtra as MissingExtra,
    NonFiniteLoss as NonFiniteLoss,
    NotFound as NotFound,
    PermissionDenied as PermissionDenied,
    PipelineError as PipelineError,
    PrecedingRequestFailed as PrecedingRequestFailed,
    RateLimited as RateLimited,
    RegularizerError as RegularizerError,
    RegularizerTimeout as RegularizerTimeout,
    RequestFailed as RequestFailed,
    RequestInsideStep as RequestInsideStep,
    SequenceLost as SequenceLost,
    ServerError as ServerError,
    SurrogateMismatch as SurrogateMismatch,
    TimeoutExceeded as TimeoutExceeded,
    TinkexError as TinkexError,
    TransportError as TransportError,
    Unprocessable as Unprocessable,
    UnsupportedFeature as UnsupportedFeature,
)
from .losses import (
    BaseLossOutput as BaseLossOutput,
    CustomLossOutput as CustomLossOutput,
    Executor as Executor,
    GradientTracker as GradientTracker,
    Metric as Metric,
    Pipeline as Pipeline,
    Regularizer as Regularizer,
    RegularizerOutput as RegularizerOutput,
    RegularizerSpec as RegularizerSpec,
    Term as Term,
    TermResult as TermResult,
    execute as execute,
    packed_field as packed_field,
    per_datum as per_datum,
    split as split,
)
from .transport.retry import (
    RetryPolicy as RetryPolicy,
)
from .types import (
    AdamParams as AdamParams,
    Datum as Datum,
    EncodedTextChunk as EncodedTextChunk,
    ForwardBackwardOutput as ForwardBackwardOutput,
    GetInfoResponse as GetInfoResponse,
    LoraConfig as LoraConfig,
    ModelInput as ModelInput,
    OptimStepResponse as OptimStepResponse,
    SampledSequence as SampledSequence,
    SampleResponse as SampleResponse,
    SamplingParams as SamplingParams,
    SaveWeightsResponse as SaveWeightsResponse,
    ServerCapabilities as ServerCapabilities,
    TensorData as TensorData,
)
from .version import __version__ as __version__
