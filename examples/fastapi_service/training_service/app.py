"""The HTTP routes: `create_app` creates the application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException, Path as PathParameter, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from tinkex_py.integrations.fastapi import add_error_handlers, problem_responses, service_lifespan, service_of
from training_service.jobs import Job, Jobs, running_jobs
from training_service.models import JobRequest, JobResult, JobState
from training_service.settings import Settings

DESCRIPTION = """
Fine-tunes a language model with a composed loss: a base loss plus weighted regularizers.

1. **Start** a job with `POST /jobs`. If too many run, the response is 429, and `Retry-After` says when to try again.
2. **Follow** it: `GET /jobs/{id}/events` is a stream of server-sent events, one per optimizer step.
3. **Fetch** its result: `GET /jobs/{id}/result`. Or **cancel** it: `DELETE /jobs/{id}`.

Errors have the type `application/problem+json`.
"""
TAGS = [
    {"name": "jobs", "description": "Start, list and cancel training jobs."},
    {"name": "progress", "description": "Follow a job, and fetch its result."},
]
STREAM = """event: step
id: 1
data: {"step": 1, "metrics": {"loss/total": 1.25, "loss/base": 1.2}}

event: end
data: {"id": "4f2c9a", "status": "finished", "steps": 1, "steps_made": 1, "loss": 1.25, "error": null, "followers": 1}
"""


def get_jobs(request: Request) -> Jobs:
    return request.app.state.jobs


AllJobs = Annotated[Jobs, Depends(get_jobs)]


def find_job(
    job_id: Annotated[str, PathParameter(title="Job", description="Id that `POST /jobs` returned.")], jobs: AllJobs
) -> Job:
    job = jobs.get(job_id)
    if job is None:
        raise HTTPException(404, f"no job has the id {job_id!r}")
    return job


FoundJob = Annotated[Job, Depends(find_job)]


def create_app(settings: Settings | None = None) -> FastAPI:
    """Creates the application; settings come from the environment unless given."""
    given = settings or Settings.from_environment()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with (
            service_lifespan(given.make_service)(app),
            running_jobs(service_of(app), given.base_model, given.folder, given.limit) as jobs,
        ):
            app.state.jobs = jobs
            yield

    app = FastAPI(
        title="Training service", version="1.0", description=DESCRIPTION, openapi_tags=TAGS, lifespan=lifespan
    )
    add_error_handlers(app, all_errors=True)

    @app.post(
        "/jobs",
        status_code=202,
        tags=["jobs"],
        summary="Start a job",
        response_description="The job, which was started.",
        responses=problem_responses(422, 429, 503),
    )
    async def start_job(body: JobRequest, jobs: AllJobs, response: Response) -> JobState:
        """Starts a job and returns at once. `Location` is the path of the job."""
        job = jobs.start(body)
        response.headers["Location"] = f"/jobs/{job.id}"
        return job.state()

    @app.get("/jobs", tags=["jobs"], summary="List the jobs", response_description="The jobs.")
    async def list_jobs(jobs: AllJobs) -> list[JobState]:
        """Lists the jobs, oldest first. The last hundred ended jobs are kept."""
        return [job.state() for job in jobs.all()]

    @app.get(
        "/jobs/{job_id}",
        tags=["jobs"],
        summary="Read a job",
        response_description="The current state of the job.",
        responses=problem_responses(404, 422),
    )
    async def read_job(job: FoundJob) -> JobState:
        """Returns the status of a job and its progress."""
        return job.state()

    @app.delete(
        "/jobs/{job_id}",
        tags=["jobs"],
        summary="Cancel a job",
        response_description="The job, which has ended.",
        responses=problem_responses(404, 422),
    )
    async def cancel_job(job: FoundJob, jobs: AllJobs) -> JobState:
        """Cancels a job and responds when it has ended. An ended job stays as it is."""
        await jobs.cancel(job)
        return job.state()

    @app.get(
        "/jobs/{job_id}/events",
        tags=["progress"],
        summary="Follow a job",
        response_class=EventSourceResponse,
        response_description="The events, until the job ends or the client disconnects.",
        responses={200: {"content": {"text/event-stream": {"example": STREAM}}}, **problem_responses(404, 422)},
    )
    async def follow_job(
        job: FoundJob,
        last_event_id: Annotated[
            int, Header(ge=0, description="Last step that was received; browsers send it when they reconnect.")
        ] = 0,
    ) -> AsyncIterator[ServerSentEvent]:
        """Sends an event `step` for every optimizer step, from the first on, and an event `end` when the job has ended.

        The `id` of an event is the number of its step.
        """
        async for step in job.steps_after(last_event_id):
            yield ServerSentEvent(event="step", id=str(step.step), data=step)
        yield ServerSentEvent(event="end", data=job.state())

    @app.get(
        "/jobs/{job_id}/result",
        tags=["progress"],
        summary="Read the result of a job",
        response_description="The losses, and the path of the trained adapter.",
        responses=problem_responses(404, 409, 422),
    )
    async def read_result(job: FoundJob) -> JobResult:
        """Returns the result; 409 for a job that still runs, was cancelled or failed."""
        result = job.result()
        if result is None:
            raise HTTPException(409, f"job {job.id} is {job.status}, so it has no result")
        return result

    return app
