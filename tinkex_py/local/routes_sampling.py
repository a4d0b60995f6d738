"""Routes of sampling."""

import uuid
from collections.abc import Callable
from concurrent.futures import Future

from fastapi import Request

from tinkex_py.errors import InvalidData, TinkexError, UnsupportedFeature
from tinkex_py.local import wire_format
from tinkex_py.local.bodies import SMALL_BODY
from tinkex_py.local.core import INFLIGHT, Core, Refused, SamplingSession
from tinkex_py.local.data import SampleRequest, SampleResult
from tinkex_py.local.http import Running, api_router, json_digest, size_of
from tinkex_py.local.records import CheckpointInfo
from tinkex_py.local.results import CLONE, Success, failed
from tinkex_py.local.sample_queue import Weights
from tinkex_py.local.schemas import (
    JoinResponse,
    SampleBody,
    SamplerId,
    SampleSubmittedResponse,
    SamplingSessionBody,
    SamplingSessionResponse,
)
from tinkex_py.types import Sampler as SamplerResponse

router = api_router()


@router.post("/create_sampling_session")
async def create_sampling_session(body: SamplingSessionBody, core: Running) -> SamplingSessionResponse:
    """Creates a sampling session on named weights or on the base model."""
    core.open_session(body.session_id)
    sampler_id = f"{body.session_id}:sample:{body.sampling_session_seq_id}"
    sampler = await _sampler(core, sampler_id, body.base_model, body.model_path)
    if core.samplers.setdefault(sampler_id, sampler) != sampler:
        raise Refused(400, f"sampling session number {body.sampling_session_seq_id} was already used for other weights")
    return SamplingSessionResponse(sampling_session_id=sampler_id)


@router.get("/samplers/{sampler_id}")
async def get_sampler(sampler_id: str, core: Running) -> SamplerResponse:
    """Describes a sampling session."""
    sampler = core.sampling_session(sampler_id)
    return SamplerResponse(
        sampler_id=sampler.sampler_id, base_model=core.engine.model.name, model_path=sampler.model_path
    )


@router.post("/asample")
async def asample(body: SampleBody, request: Request, core: Running) -> SampleSubmittedResponse:
    """Samples sequences; a repeat under the same number returns the future of the first request."""
    if body.sampling_session_id is not None:
        sampler = core.sampling_session(body.sampling_session_id)
    else:
        sampler = await _sampler(core, f"direct:{uuid.uuid4().hex}", body.base_model, body.model_path)
    # A small image can be much to read.
    small = size_of(request) <= SMALL_BODY and body.target_prompt_logprobs is None and not core.engine.model.images
    read = _reading(core, body)() if small else await core.aside(_reading(core, body))
    if body.seq_id is None or body.sampling_session_id is None:
        request_id = core.follow(_submit(core, sampler, read))
    else:
        scope = "seq_id", sampler.sampler_id, body.seq_id
        request_id = core.numbered(scope, await json_digest(request, core), lambda: _submit(core, sampler, read))
        core.results.announce(request_id, (sampler.sampler_id, body.seq_id // CLONE))
    ids = [f"{request_id}:{index}" for index in range(body.num_samples)]
    return SampleSubmittedResponse(request_id=request_id, sample_sequence_ids=ids)


@router.post("/join_sampling_session")
async def join_sampling_session(body: SamplerId, core: Running) -> JoinResponse:
    """Returns a number for another client of a sampling session; its creator has 0."""
    sampler = core.sampling_session(body.sampling_session_id)
    core.sampler_clients[sampler.sampler_id] = core.sampler_clients.get(sampler.sampler_id, 0) + 1
    return JoinResponse(client_counter=core.sampler_clients[sampler.sampler_id])


async def _sampler(core: Core, sampler_id: str, base_model: str | None, model_path: str | None) -> SamplingSession:
    name = core.engine.model.name
    if base_model is not None and base_model != name:
        raise Refused(400, f"base model {base_model!r} is not served here. Served: {name!r}")
    if model_path is None:
        if base_model is None:
            raise Refused(400, f"sampling needs a base_model ({name!r}) or a model_path (tinker://...)")
        return SamplingSession(sampler_id)
    source = await core.stored(lambda store: store.find(model_path, "weights", "sampler_weights"))
    if source.run.base_model != name:
        raise Refused(400, f"{model_path!r} belongs to base model {source.run.base_model!r}. Served: {name!r}")
    return SamplingSession(sampler_id, model_path=model_path)


def _reading(core: Core, body: SampleBody) -> Callable[[], SampleRequest | TinkexError]:
    """Returns what checks a request; it returns the error of an invalid one, which fails its future."""

    def read() -> SampleRequest | TinkexError:
        try:
            request = _sample_request(core, body)
            core.engine.check_sample(request)
        except (InvalidData, UnsupportedFeature) as error:
            return error
        return request

    return read


def _submit(core: Core, sampler: SamplingSession, read: SampleRequest | TinkexError) -> "Future[Success]":
    """Queues a request; an invalid one returns a failed future."""
    if core.samples.is_full:
        limit = core.options.max_waiting_samples
        raise Refused(429, f"{limit} sampling requests wait already: retry in a second")
    if isinstance(read, SampleRequest):
        return core.samples.add(_weights(core, sampler), read, _success)
    return failed(read)


def _success(result: SampleResult) -> Success:
    return Success(lambda: wire_format.sample_json(result), wire_format.sample_protobuf(result))


def _weights(core: Core, sampler: SamplingSession) -> Weights:
    path, snapshot, model_id = sampler.model_path, sampler.snapshot, sampler.inflight_of
    if snapshot is not None:
        return Weights(("snapshot", snapshot.folder), lambda: snapshot)
    if model_id is not None:
        return Weights(("inflight", model_id), lambda: _inflight(core, model_id), live=True)
    if path is not None:
        return Weights(("path", path), lambda: core.store.find(path))
    return Weights(("base",), lambda: None)


def _inflight(core: Core, model_id: str) -> CheckpointInfo:
    source = core.store.get(model_id, "ephemeral", INFLIGHT)
    if source is None:
        raise InvalidData(f"the inflight weights of model {model_id!r} are gone, because the model was unloaded")
    return source


def _sample_request(core: Core, body: SampleBody) -> SampleRequest:
    settings = body.sampling_params
    stop = settings.stop
    stop_tokens = core.engine.model.eos_token_ids if stop is None else frozenset[int]()
    stop_texts: tuple[str, ...] = ()
    if isinstance(stop, str):
        stop_texts = (stop,)
    elif stop:
        stop_texts = tuple(item for item in stop if isinstance(item, str))
        stop_tokens = frozenset(item for item in stop if isinstance(item, int))
    if "" in stop_texts:
        raise InvalidData("stop contains an empty text: leave it out")
    targets = body.target_prompt_logprobs
    room = wire_format.DenseRoom(core.engine.model.vocabulary_size, core.options.max_body_bytes)
    prompt = wire_format.input_from_json("prompt", body.prompt, core.engine.model.read_image)
    return SampleRequest(
        prompt=prompt.tokens,
        images=prompt.images,
        num_samples=body.num_samples,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        stop_tokens=stop_tokens,
        stop_texts=stop_texts,
        prompt_logprobs=body.prompt_logprobs,
        prompt_logprobs_last=body.prompt_logprobs_last_n,
        topk_prompt_logprobs=body.topk_prompt_logprobs,
        topk_sample_logprobs=body.topk_sample_logprobs,
        target_logprobs=None if targets is None else wire_format.ids_from_json("target_prompt_logprobs", targets, room),
        alt_tokens=body.prompt_alt_tokens_k,
    )
